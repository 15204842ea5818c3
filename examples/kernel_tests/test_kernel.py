"""Tests of a small kernel: each part of it runs in a guest, with tests in C that print KTAP over the serial port.

    pytest examples/kernel_tests

The fixtures come with kvmpy; there is nothing to set up. `kvm_guest_c` compiles, `kvm_boot` runs the guest to its end,
`kvm_tap` shows each test in the guest as a result of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kvmpy.guest.program import GuestProgram
    from kvmpy.pytest_plugin import KvmBoot, KvmGuestAsm, KvmGuestC, KvmMachine, KvmTap

PARTS = {
    "string": ("kernel/string.c",),
    "frames": ("kernel/frames.c",),
    "interrupts": ("kernel/interrupts.c", "kernel/entries.S"),
}


def build(part: str, kvm_guest_c: KvmGuestC) -> GuestProgram:
    """One part of the kernel, with its tests. Compiled once in a session, whoever asks."""
    return kvm_guest_c(*PARTS[part], f"guest_tests/{part}_tests.c")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_passes_its_own_tests(part: str, kvm_guest_c: KvmGuestC, kvm_boot: KvmBoot, kvm_tap: KvmTap) -> None:
    result = kvm_boot(build(part, kvm_guest_c))
    kvm_tap(result)
    assert result.exit_code == 0


def test_the_bitmap_says_which_frames_are_in_use(kvm_guest_c: KvmGuestC, kvm_boot: KvmBoot) -> None:
    """The guest has ended with five frames in use; its memory can still be looked at from here."""
    program = build("frames", kvm_guest_c)
    result = kvm_boot(program)
    bitmap = result.machine.memory.read(program.symbols["frames_in_use"], 8)
    assert bitmap == bytes([0b11111, 0, 0, 0, 0, 0, 0, 0])


def test_the_boot_sector_greets_and_waits(kvm_guest_asm: KvmGuestAsm, kvm_boot: KvmBoot) -> None:
    """A guest that does not end by itself: it is stopped when it has said what is waited for."""
    sector = kvm_guest_asm(
        """
            mov dx, 0x3f8
            mov si, offset text
        next:
            lodsb
            test al, al
            jz wait
            out dx, al
            jmp next
        wait:
            jmp wait
        text:
            .asciz "Loading...\\r\\n"
            .org 510
            .byte 0x55, 0xaa
        """,
        address=0x7C00,
    )
    assert len(sector.image) == 512
    result = kvm_boot(sector, until="\n")
    assert result.console == "Loading...\r\n"
    assert result.outcome.end == "stopped"


def test_a_character_that_is_typed_comes_back(kvm_guest_asm: KvmGuestAsm, kvm_machine: KvmMachine) -> None:
    """A conversation: the machine runs in a thread of its own meanwhile."""
    from kvmpy.boot import FlatImage

    echo = kvm_guest_asm(
        """
        next:
            mov dx, 0x3fd       # line status: bit 0 says that a character has come
            in al, dx
            test al, 1
            jz next
            mov dx, 0x3f8
            in al, dx
            out dx, al
            jmp next
        """
    )
    machine = kvm_machine(memory=1 << 20)
    machine.load(FlatImage(echo.image, echo.address))
    machine.start()
    for word in ("hello", "kernel"):
        machine.console.send(word.encode())
        machine.console.expect(word, timeout=10)
    assert machine.stop().end == "stopped"
