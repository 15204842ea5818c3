"""Ports for those who debug guests: consoles at 0xE9 and 0x402, POST codes at 0x80, an exit at 0xF4."""

import pytest

from gnu_toolchain import assemble
from kvmpy import End, GuestFailed, Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import DebugConsole, DebugExit, PostPort
from kvmpy.devices.device import Device

KIB = 1024
SPIN = "1: jmp 1b"


def machine_with(source: str, *devices: Device) -> Machine:
    image = FlatImage(assemble(source))
    machine = Machine(memory=64 * KIB, irqchip=False)
    for device in devices:
        machine.add(device)
    machine.load(image)
    return machine


@pytest.mark.parametrize("port", [0xE9, 0x402])
def test_a_guest_that_finds_a_debug_console_writes_to_it(port: int) -> None:
    source = f"""
        mov dx, {port:#x}
        in al, dx                   # 0xE9: somebody listens
        cmp al, 0xe9
        jne 1f
        mov si, offset text
        mov cx, 6
        cld
        rep outsb
    1:  hlt
        text: .ascii "found\\n" """
    console = DebugConsole(port)
    with machine_with(source, console) as machine:
        assert machine.run(timeout=5).end is End.HALTED
        assert console.text == "found\n"
    with machine_with(source) as machine:
        assert machine.run(timeout=5).end is End.HALTED
        assert {entry.direction for entry in machine.statistics().unclaimed} == {"read"}


def test_what_the_guest_prints_goes_to_the_sink_as_it_comes() -> None:
    seen: list[bytes] = []
    source = "mov al, 'a'; out 0xe9, al; inc al; out 0xe9, al; hlt"
    with machine_with(source, DebugConsole(sink=seen.append)) as machine:
        machine.run(timeout=5)
        assert seen == [b"a", b"b"]


def test_a_sink_that_fails_stops_the_run_and_loses_no_byte() -> None:
    seen = bytearray()

    def sink(data: bytes) -> None:
        if data == b"c" and not failures:
            failures.append(data)
            raise OSError("the disk is full")
        seen.extend(data)

    failures: list[bytes] = []
    source = "mov al, 'a'; 1: out 0xe9, al; inc al; cmp al, 'f'; jne 1b; hlt"
    console = DebugConsole(sink=sink)
    with machine_with(source, console) as machine:
        with pytest.raises(OSError, match="the disk is full"):
            machine.run(timeout=5)
        assert machine.run(timeout=5).end is End.HALTED
        assert seen == console.output == b"abcde"


def test_post_codes_are_listed_and_the_last_one_can_be_read_back() -> None:
    post = PostPort()
    source = """
        in al, 0x80; mov [0x2000], al
        mov al, 1
    1:  out 0x80, al; shl al, 1; jnz 1b
        in al, 0x80; mov [0x2001], al
        hlt"""
    with machine_with(source, post) as machine:
        assert machine.run(timeout=5).end is End.HALTED
        assert post.codes == (1, 2, 4, 8, 0x10, 0x20, 0x40, 0x80)
        assert (post.last, post.count) == (0x80, 8)
        assert machine.memory.read(0x2000, 2) == b"\x00\x80"


@pytest.mark.parametrize(
    ("instruction", "code"),
    [
        ("mov al, 0; out 0xf4, al", 1),
        ("mov al, 0x7f; out 0xf4, al", 0xFF),
        ("mov ax, 0x1234; out 0xf4, ax", 0x2469),
        ("mov eax, 0x12345678; out 0xf4, eax", 0x2468ACF1),
        ("mov al, 5; out 0xf7, al", 11),
    ],
)
def test_the_exit_code_is_what_was_written_twice_and_one(instruction: str, code: int) -> None:
    with machine_with(f"{instruction}; mov byte ptr [0x2000], 1; {SPIN}", DebugExit()) as machine:
        outcome = machine.run(timeout=5)
        assert (outcome.end, outcome.code, outcome.ok) == (End.EXITED, code, code == 1)
        assert machine.memory.read_u8(0x2000) == 0  # the guest got no further


def test_an_exit_code_that_means_failure_raises_when_checked() -> None:
    with machine_with("mov al, 3; out 0xf4, al", DebugExit()) as machine, pytest.raises(GuestFailed) as failed:
        machine.run(timeout=5, check=True)
    assert failed.value.outcome.code == 7


def test_reading_the_exit_port_does_not_exit() -> None:
    with machine_with("in al, 0xf4; mov [0x2000], al; hlt", DebugExit()) as machine:
        assert machine.run(timeout=5).end is End.HALTED
        assert machine.memory.read_u8(0x2000) == 0


def test_after_an_exit_the_guest_can_go_on() -> None:
    with machine_with("mov al, 1; out 0xf4, al; inc al; out 0xf4, al; hlt", DebugExit()) as machine:
        assert machine.run(timeout=5).code == 3
        assert machine.run(timeout=5).code == 5
        assert machine.run(timeout=5).end is End.HALTED


@pytest.mark.parametrize("end", ["hlt", "1: jmp 1b"], ids=["an exit", "none"])
def test_characters_that_waited_in_the_queue_all_arrive_in_order(end: str) -> None:
    source = f"mov cx, 500; mov al, 0; 2: out 0xe9, al; inc al; loop 2b; {end}"
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        console = machine.add(DebugConsole(queued=True))
        machine.load(FlatImage(assemble(source)))
        machine.start(timeout=20)
        console.expect(bytes(range(500 - 256)), timeout=10)
        console.expect(bytes(range(500 - 256)), timeout=10)
        machine.stop()
        assert console.output == bytes(number & 0xFF for number in range(500))
        assert machine.statistics().count("port", 0xE9, "write") == 500
