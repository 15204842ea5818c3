"""A PC in one call: its devices are where kernels look for them."""

import pytest

from gnu_toolchain import assemble
from kvmpy import End, GiB, MiB
from kvmpy.boot import FlatImage
from kvmpy.errors import UsageError
from kvmpy.machine import Pc

SOURCE = """
    mov al, 's'; mov dx, 0x3f8; out dx, al
    mov al, 'd'; out 0xe9, al
    mov al, 0x34; out 0x70, al; in al, 0x71; mov [0x2000], al
    mov al, 0x5f; out 0x70, al; in al, 0x71; mov [0x2001], al
    in al, 0x64; mov [0x2002], al
    mov dx, 0xcf8; mov eax, 0x80000000; out dx, eax; mov dx, 0xcfc; in eax, dx; mov [0x2004], eax
    mov dx, 0x604; mov ax, 0x3400; out dx, ax
    cli; hlt
"""


def test_a_guest_finds_the_devices_of_a_pc() -> None:
    said: list[bytes] = []
    with Pc(memory=20 * MiB, vcpus=3, sink=said.append) as pc:
        pc.load(FlatImage(assemble(SOURCE)))
        outcome = pc.run(timeout=10)
        assert outcome.end is End.SHUTDOWN
        assert (pc.serial.text, pc.debug_console.text, said) == ("s", "d", [b"s"])
        beyond_16m, processors, keyboard = pc.memory.read(0x2000, 3)
        assert (beyond_16m, processors) == (4 * MiB // (64 * 1024), 2)
        assert keyboard != 0xFF
        assert pc.memory.read_u32(0x2004) == 0x1237_8086  # the host bridge of an i440FX
        assert not pc.statistics().unclaimed


def test_memory_above_4_gib_is_told_apart() -> None:
    with Pc(memory=5 * GiB) as pc:
        pc.load(FlatImage(assemble("mov al, 0x5c; out 0x70, al; in al, 0x71; mov [0x2000], al; cli; hlt")))
        assert pc.run(timeout=10).end is End.HALTED
        assert pc.memory.read_u8(0x2000) == 2 * GiB // (64 * 1024) >> 8


def test_a_panic_on_its_serial_line_ends_the_run() -> None:
    source = """
        mov si, offset text; mov dx, 0x3f8
    1:  lodsb; test al, al; jz 2f; out dx, al; jmp 1b
    2:  cli; hlt
    text: .asciz "Kernel panic - not syncing: no init\\n"
    """
    with Pc() as pc:
        pc.load(FlatImage(assemble(source)))
        outcome = pc.run(timeout=10)
        assert (outcome.end, outcome.message) == (End.PANIC, "Kernel panic - not syncing: no init")


def test_what_no_machine_can_have_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one vCPU"):
        Pc(vcpus=0)
