"""Ring 3 of long mode: which ports it may use, and what happens at those that it may not."""

from gnu_toolchain import assemble, assemble_with_symbols
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import DebugConsole, DebugExit
from kvmpy.x86 import long_mode
from kvmpy.x86.gates import Gate, Idt

KIB = 1024
TABLES, STACK, FRAME = 0x2_0000, 0x1_8000, 0x5000


def test_ring_3_of_a_flat_image_uses_ports_and_has_no_other_right() -> None:
    source = """
        mov ax, cs
        mov [0x5000], ax
        mov rsi, offset text; mov ecx, 6; mov edx, 0xe9
        cld
        rep outsb
        xor eax, eax
        mov edx, 0xf4
        out dx, al
        jmp .
        text: .ascii "ring 3" """
    with Machine(memory=1024 * KIB, irqchip=False) as machine:
        console = machine.add(DebugConsole())
        machine.add(DebugExit())
        machine.load(FlatImage(assemble(source, bits=64), mode="long", ring=3))
        assert machine.run(timeout=5).end is End.EXITED
        assert console.text == "ring 3"
        assert machine.memory.read_u16(0x5000) & 3 == 3


# The guest's #GP handler, in ring 0, keeps the frame of the exception: error code, RIP, CS, RFLAGS, RSP, SS.
SOURCE = f"""
user:
    mov al, 'u'; out 0xe9, al
    {{what}}
    mov al, '!'; out 0xe9, al
    jmp .
general_protection:
    cld
    mov rsi, rsp
    mov edi, {FRAME:#x}
    mov ecx, 6
    rep movsq
    mov al, 'k'; out 0xe9, al
    hlt
"""


def run_in_ring_3(what: str, ports: tuple[tuple[int, int], ...]) -> tuple[str, list[int], dict[str, int], list[int]]:
    """The console's text, the frame of the #GP, the program's labels, and the values that reached port 0x80."""
    code, symbols = assemble_with_symbols(SOURCE.format(what=what), bits=64)
    with Machine(memory=1024 * KIB, irqchip=False) as machine:
        console = machine.add(DebugConsole())
        seen: list[int] = []
        machine.map_ports(0x80, 8, write=lambda offset, size, value: seen.append(value))
        machine.memory.write(0x1000, code)
        idt = Idt()
        idt[13] = Gate("interrupt", symbols["general_protection"])
        state = long_mode.prepare(
            machine.memory, entry=symbols["user"], tables=TABLES, stack=STACK, ring=3, ports=ports, idt=idt,
        )  # fmt: skip
        machine.vcpus[0].set_cpu_state(state)
        assert machine.run(timeout=5).end is End.HALTED
        return console.text, [machine.memory.read_u64(FRAME + 8 * at) for at in range(6)], symbols, seen


def test_a_port_that_the_bitmap_denies_is_a_general_protection_fault() -> None:
    text, frame, symbols, seen = run_in_ring_3("denied: out 0x80, al", ((0xE9, 1),))
    assert text == "uk"
    assert seen == []
    error_code, rip, cs, _, rsp, ss = frame
    assert error_code == 0
    assert rip == symbols["denied"]
    assert (cs & 3, ss & 3) == (3, 3)
    assert rsp == STACK


def test_a_wide_access_needs_all_its_ports() -> None:
    allowed = ((0xE9, 1), (0x80, 2))
    text, frame, symbols, seen = run_in_ring_3("out 0x80, ax; denied: out 0x81, ax", allowed)
    assert text == "uk"
    assert len(seen) == 1
    assert frame[1] == symbols["denied"]


def test_what_only_ring_0_may_do_is_a_general_protection_fault() -> None:
    for instruction in ("hlt", "cli", "mov cr3, rax", "lidt [0x5000]", "wrmsr"):
        text, frame, symbols, _ = run_in_ring_3(f"denied: {instruction}", ((0xE9, 1),))
        assert text == "uk", instruction
        assert frame[:2] == [0, symbols["denied"]], instruction
