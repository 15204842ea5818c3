"""The guests that are measured: ROM images of 64 KiB that start at the reset vector, the same for every contender.

So no contender gains by the way its guest is loaded: kvmpy, the C loop and QEMU (`-bios`) all map the image below
4 GiB and run the processor from the state after reset. The loop is a plain one, so two more instructions (dec, jnz)
count with each access: next to nothing where the processor runs them, 1.3 us where KVM emulates them.

Each program stands here as assembly source (GNU as, Intel
syntax, linked for ROM_START) and as the machine code that it makes; a test compares the two.
"""

from __future__ import annotations

import struct

__all__ = [
    "DEVICE_MMIO", "DEVICE_PORT", "EXIT_PORT", "MULTIBOOT", "MULTIBOOT_SOURCE", "MULTIBOOT_START", "MULTIBOOT_TEXT",
    "PROGRAMS", "RESULT_PORT", "ROM_START", "SOURCES", "firmware",
    "rom_of",
]  # fmt: skip

ROM_SIZE = 0x1_0000
ROM_START = 0xFFFF_0000

RESULT_PORT = 0x402
"""Four bytes, lowest first, written at the end: how many TSC ticks the accesses took.

The guest looks at the clock itself: QEMU cannot be asked for it, and a host process that waits for a sign of the guest
is woken up late when the machine is busy. The TSC runs at one rate in all guests (`Vcpu.get_tsc_khz`).
"""
EXIT_PORT = 0xF4
"""The guest ends by writing 0 here (QEMU's isa-debug-exit)."""
DEVICE_PORT = 0xE0
DEVICE_MMIO = 0xFF00_0000
"""Where the device is that the guest accesses; QEMU's pc-testdev has registers at both places."""
_START = """
# Real mode, as the reset vector comes here: straight into flat protected mode, without paging.
        .code16
_start: cli
        data32 lgdt cs:[table - 0xffff0000]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        .byte 0x66, 0xea
        .long protected
        .word 8
count:  .long 0
        # Accessed bits set: the processor must not have to write into the ROM.
        .balign 8
gdt:    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
table:  .word 23
        .long gdt
        .code32
protected:
        mov ax, 0x10
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov ecx, [count]
        rdtsc
        mov ebx, eax
"""

_END = """
        rdtsc
        sub eax, ebx
        mov edx, 0x402
        .rept 4
        out dx, al
        shr eax, 8
        .endr
        mov edx, 0xf4
        xor eax, eax
        out dx, al
stop:   hlt
        jmp stop
"""

SOURCES = {
    "port write": f"""{_START}
        mov edx, 0xe0
again:  out dx, al
        dec ecx
        jnz again
{_END}""",
    "port read": f"""{_START}
        mov edx, 0xe0
again:  in al, dx
        dec ecx
        jnz again
{_END}""",
    "MMIO write": f"""{_START}
        mov edi, 0xff000000
again:  mov [edi], eax
        dec ecx
        jnz again
{_END}""",
    "MMIO read": f"""{_START}
        mov edi, 0xff000000
again:  mov eax, [edi]
        dec ecx
        jnz again
{_END}""",
    # As drivers do it: wait until the transmitter is empty (LSR.THRE), then write the character.
    "serial output": f"""{_START}
again:  mov edx, 0x3fd
wait:   in al, dx
        test al, 0x20
        jz wait
        mov edx, 0x3f8
        mov al, 0x2e
        out dx, al
        dec ecx
        jnz again
{_END}""",
    "exit": """
        .code16
_start: mov dx, 0xf4
        xor ax, ax
        out dx, al
stop:   hlt
        jmp stop
""",
}
"""Name -> assembly source."""

PROGRAMS = {
    "port write": bytes.fromhex(
        "fa2e660f011638000f20c00c010f22c066ea3e00ffff0800000000000f1f40000000000000000000ffff0000009bcf00"
        "ffff00000093cf0017002000ffff66b810008ed88ec08ed08b0d1800ffff0f3189c3bae0000000ee4975fc0f3129d8ba"
        "02040000eec1e808eec1e808eec1e808eec1e808baf400000031c0eef4ebfd"
    ),
    "port read": bytes.fromhex(
        "fa2e660f011638000f20c00c010f22c066ea3e00ffff0800000000000f1f40000000000000000000ffff0000009bcf00"
        "ffff00000093cf0017002000ffff66b810008ed88ec08ed08b0d1800ffff0f3189c3bae0000000ec4975fc0f3129d8ba"
        "02040000eec1e808eec1e808eec1e808eec1e808baf400000031c0eef4ebfd"
    ),
    "MMIO write": bytes.fromhex(
        "fa2e660f011638000f20c00c010f22c066ea3e00ffff0800000000000f1f40000000000000000000ffff0000009bcf00"
        "ffff00000093cf0017002000ffff66b810008ed88ec08ed08b0d1800ffff0f3189c3bf000000ff89074975fb0f3129d8"
        "ba02040000eec1e808eec1e808eec1e808eec1e808baf400000031c0eef4ebfd"
    ),
    "MMIO read": bytes.fromhex(
        "fa2e660f011638000f20c00c010f22c066ea3e00ffff0800000000000f1f40000000000000000000ffff0000009bcf00"
        "ffff00000093cf0017002000ffff66b810008ed88ec08ed08b0d1800ffff0f3189c3bf000000ff8b074975fb0f3129d8"
        "ba02040000eec1e808eec1e808eec1e808eec1e808baf400000031c0eef4ebfd"
    ),
    "serial output": bytes.fromhex(
        "fa2e660f011638000f20c00c010f22c066ea3e00ffff0800000000000f1f40000000000000000000ffff0000009bcf00"
        "ffff00000093cf0017002000ffff66b810008ed88ec08ed08b0d1800ffff0f3189c3bafd030000eca82074fbbaf80300"
        "00b02eee4975eb0f3129d8ba02040000eec1e808eec1e808eec1e808eec1e808baf400000031c0eef4ebfd"
    ),
    "exit": bytes.fromhex("baf40031c0eef4ebfd"),
}
"""Name -> machine code."""

MULTIBOOT_START = 0x10_0000
MULTIBOOT_TEXT = b"Hello, kernel"
MULTIBOOT_SOURCE = """
# A Multiboot 1 header with address fields, and a kernel that prints a line on COM1 and waits for ever.
        .code32
header: .long 0x1badb002, 0x00010000, 0xe4514ffe
        .long header, header, 0, 0, start
start:  mov esi, offset text
        mov edx, 0x3f8
next:   lodsb
        out dx, al
        test al, al
        jnz next
wait:   hlt
        jmp wait
text:   .asciz "Hello, kernel"
"""
MULTIBOOT = bytes.fromhex(
    "02b0ad1b00000100fe4f51e40000100000001000000000000000000020001000be33001000baf8030000acee84c075fa"
    "f4ebfd48656c6c6f2c206b65726e656c00"
)
"""A kernel that any Multiboot loader starts: MULTIBOOT_SOURCE, linked for MULTIBOOT_START."""

_COUNT_OFFSET = 0x18
"""Where the variable `count` of a program is."""


def firmware(name: str, count: int = 0) -> bytes:
    """The ROM with the program `name`, which makes `count` accesses"""
    code = bytearray(PROGRAMS[name])
    if count:
        struct.pack_into("<I", code, _COUNT_OFFSET, count)
    return rom_of(code)


def rom_of(code: bytes | bytearray) -> bytes:
    """A ROM that starts with `code`, in real mode."""
    rom = bytearray(code.ljust(ROM_SIZE, b"\0"))
    rom[0xFFF0:0xFFF3] = b"\xe9\x0d\x00"  # jmp to offset 0, which is 0xd bytes further on in the 64 KiB of segment F000
    return bytes(rom)
