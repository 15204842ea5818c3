"""The keyboard controller as guests see it: probed, typed at, and used as the reset button."""

import threading

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import I8042
from pc_interrupts import END_OF_INTERRUPT, take_interrupts

KIB = 1024
SPIN = "1: jmp 1b"

WAIT_FOR_BYTE = """
answer:                             # the next byte of the controller goes to [DI]
    in al, 0x64
    test al, 1                      # status.OBF
    jz answer
    in al, 0x60
    stosb
    ret
"""


def machine_with(source: str, *, irqchip: bool = False) -> tuple[Machine, I8042]:
    image = FlatImage(assemble(source))
    machine = Machine(memory=64 * KIB, irqchip=irqchip)
    keyboard = machine.add(I8042())
    machine.load(image)
    return machine, keyboard


def test_the_controller_answers_the_probe_of_firmware() -> None:
    source = f"""
        mov di, 0x2000
        mov al, 0xad; out 0x64, al; in al, 0x64; stosb      # keyboard off, and nothing waits
        mov al, 0xaa; out 0x64, al; call answer             # self test
        mov al, 0xab; out 0x64, al; call answer             # the keyboard's lines
        mov al, 0x60; out 0x64, al; mov al, 0x00; out 0x60, al
        mov al, 0x20; out 0x64, al; call answer             # the command byte that was just set
        mov al, 0xae; out 0x64, al
        mov al, 0xff; out 0x60, al; call answer; call answer
        mov al, 0xf4; out 0x60, al; call answer
        in al, 0x64; stosb
        hlt
        {WAIT_FOR_BYTE}"""
    machine, _ = machine_with(source)
    with machine:
        assert machine.run(timeout=5).end is End.HALTED
        before, passed, lines, command_byte, ack, test, enabled, after = machine.memory.read(0x2000, 8)
        assert not before & 1
        assert (passed, lines) == (0x55, 0x00)
        assert command_byte & 0x53 == 0x00  # no interrupts, no translation, keyboard on
        assert (ack, test, enabled) == (0xFA, 0xAA, 0xFA)
        assert not after & 1


def test_there_is_no_mouse_and_the_controller_says_so() -> None:
    source = f"""
        mov di, 0x2000
        mov al, 0xa9; out 0x64, al; call answer             # test of the auxiliary port
        mov al, 0xd3; out 0x64, al; mov al, 0x5a; out 0x60, al
        in al, 0x64; stosb                                  # looped back: without status.AUX_OBF
        call answer
        hlt
        {WAIT_FOR_BYTE}"""
    machine, _ = machine_with(source)
    with machine:
        assert machine.run(timeout=5).end is End.HALTED
        port, status, looped = machine.memory.read(0x2000, 3)
        assert port != 0
        assert status & 0x21 == 0x01
        assert looped == 0x5A


def test_keys_arrive_in_order_one_interrupt_each() -> None:
    codes = bytes([0x1E, 0x9E, 0x30, 0xB0, 0xE0, 0x48, 0xE0, 0xC8]) * 25
    source = f"""
        mov di, 0x4000
        mov word ptr [0x2000], 0
        {take_interrupts({1: "keyboard"})}
        out 0x80, al                                        # ready: an edge before that is lost in the controller
    1:  sti
        hlt
        cli
        cmp di, {0x4000 + len(codes)}
        jne 1b
        hlt
    keyboard:
        inc word ptr [0x2000]
        in al, 0x60
        stosb
        {END_OF_INTERRUPT}
        iret"""
    machine, keyboard = machine_with(source, irqchip=True)
    with machine:
        ready = threading.Event()
        machine.map_ports(0x80, 1, write=lambda offset, size, value: ready.set())
        machine.start()
        assert ready.wait(timeout=5)
        for start in range(0, len(codes), 3):
            keyboard.press(codes[start : start + 3])
        assert machine.wait(timeout=10).end is End.HALTED
        assert machine.memory.read(0x4000, len(codes)) == codes
        assert machine.memory.read_u16(0x2000) == len(codes)


def test_keys_pressed_while_the_keyboard_is_off_come_when_it_is_on() -> None:
    source = f"""
        mov di, 0x2000
        mov al, 0xad; out 0x64, al
        out 0x80, al                                        # the host presses a key
        in al, 0x64; stosb
        mov al, 0xae; out 0x64, al
        call answer
        hlt
        {WAIT_FOR_BYTE}"""
    machine, keyboard = machine_with(source)
    with machine:
        machine.map_ports(0x80, 1, write=lambda offset, size, value: keyboard.press(b"\x1c"))
        assert machine.run(timeout=5).end is End.HALTED
        assert not machine.memory.read_u8(0x2000) & 1
        assert machine.memory.read_u8(0x2001) == 0x1C


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("mov al, 0xfe; out 0x64, al", "0x64"),
        ("mov al, 0xd1; out 0x64, al; mov al, 0x02; out 0x60, al", "0x60"),
        ("in al, 0x92; or al, 1; out 0x92, al", "0x92"),
    ],
    ids=["pulse", "output port", "port 0x92"],
)
def test_a_reset_ends_the_run_after_that_instruction(how: str, named: str) -> None:
    machine, _ = machine_with(f"{how}; mov byte ptr [0x2000], 1; {SPIN}")
    with machine:
        outcome = machine.run(timeout=5)
        assert outcome.end is End.RESET
        assert named in outcome.message
        assert machine.memory.read_u8(0x2000) == 0


def test_a_pulse_of_no_line_resets_nothing() -> None:
    machine, _ = machine_with("mov al, 0xff; out 0x64, al; hlt")
    with machine:
        assert machine.run(timeout=5).end is End.HALTED


def test_the_a20_gate_opens_by_controller_and_by_port_0x92() -> None:
    source = f"""
        mov di, 0x2000
        in al, 0x92; and al, 0xfc; out 0x92, al             # closed, without a reset
        in al, 0x92; stosb
        mov al, 0xd1; out 0x64, al; mov al, 0xdf; out 0x60, al
        in al, 0x92; stosb
        mov al, 0xd0; out 0x64, al; call answer             # the output port
        hlt
        {WAIT_FOR_BYTE}"""
    machine, keyboard = machine_with(source)
    with machine:
        assert machine.run(timeout=5).end is End.HALTED
        closed, opened, output_port = machine.memory.read(0x2000, 3)
        assert (closed & 2, opened & 2, output_port & 3) == (0, 2, 3)
        assert keyboard.a20_enabled
