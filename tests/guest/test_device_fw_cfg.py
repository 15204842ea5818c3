"""QEMU's firmware configuration device: guests read items by port, and files by DMA."""

from collections.abc import Iterator

import pytest

from gnu_toolchain import assemble, compile_c
from kvmpy import End, Machine, MiB
from kvmpy.boot import ElfImage, FlatImage
from kvmpy.devices import DebugExit, FwCfg
from kvmpy.devices.fw_cfg import Key

CONTENTS = bytes(range(256)) * 40


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(memory=4 * MiB, irqchip=False) as machine:
        yield machine


def test_the_signature_and_the_features_are_read_by_port(machine: Machine) -> None:
    source = """
        mov di, 0x2000; cld
        mov dx, 0x510; mov ax, 0; out dx, ax                # select the signature
        inc dx; mov cx, 6; rep insb                         # two more than there are: zeros
        dec dx; mov ax, 1; out dx, ax                       # select the features
        inc dx; mov cx, 4; rep insb
        hlt"""
    machine.add(FwCfg(memory=machine.memory))
    machine.load(FlatImage(assemble(source)))
    assert machine.run(timeout=5).end is End.HALTED
    assert machine.memory.read(0x2000, 10) == b"QEMU\0\0" + b"\x03\0\0\0"


def test_selecting_again_starts_at_the_beginning(machine: Machine) -> None:
    source = """
        mov di, 0x2000; cld
        mov dx, 0x510; mov ax, 0; out dx, ax; inc dx; mov cx, 2; rep insb
        dec dx; out dx, ax; inc dx; mov cx, 4; rep insb
        hlt"""
    machine.add(FwCfg())
    machine.load(FlatImage(assemble(source)))
    machine.run(timeout=5)
    assert machine.memory.read(0x2000, 6) == b"QEQEMU"


# Everything here is big endian: bswap.
DMA = """
    mov dx, 0x514; in eax, dx; mov [0x2000], eax            # the signature of the DMA interface
    mov dx, 0x518; in eax, dx; mov [0x2004], eax
    mov eax, {control}; bswap eax; mov [0x3000], eax
    mov eax, {length}; bswap eax; mov [0x3004], eax
    mov dword ptr [0x3008], 0
    mov eax, {target}; bswap eax; mov [0x300c], eax
    mov dx, 0x514; xor eax, eax; out dx, eax
    mov dx, 0x518; mov eax, 0x3000; bswap eax; out dx, eax  # the lower half starts the transfer
1:  mov eax, [0x3000]
    bswap eax
    test eax, 0xfffffffe                                    # until only the error bit can be left
    jnz 1b
    mov [0x2008], eax
    hlt
"""
SELECT, READ, WRITE = 8, 2, 16


def dma(machine: Machine, *, control: int, length: int, target: int) -> tuple[FwCfg, int]:
    """A guest's one transfer: the device, and what is left in the descriptor's control field."""
    device = machine.add(FwCfg(memory=machine.memory))
    key = device.add_file("opt/kvmpy/data", CONTENTS)
    source = DMA.format(control=control | key << 16, length=length, target=target)
    machine.load(FlatImage(assemble(source)))
    assert machine.run(timeout=5).end is End.HALTED
    assert machine.memory.read(0x2000, 8) == b"QEMU CFG"
    return device, machine.memory.read_u32(0x2008)


def test_a_file_is_read_by_dma_with_one_exit(machine: Machine) -> None:
    device, left = dma(machine, control=SELECT | READ, length=len(CONTENTS), target=2 * MiB)
    assert left == 0
    assert machine.memory.read(2 * MiB, len(CONTENTS) + 1) == CONTENTS + b"\0"
    assert not device.counters
    assert machine.statistics().count("port", 0x518, "write") == 1


def test_dma_beyond_ram_is_an_error_that_the_guest_sees(machine: Machine) -> None:
    device, left = dma(machine, control=SELECT | READ, length=0x1000, target=8 * MiB)
    assert left == 1
    assert device.counters["dma_error"] == 1


def test_a_dma_write_is_refused(machine: Machine) -> None:
    device, left = dma(machine, control=SELECT | WRITE, length=4, target=2 * MiB)
    assert left == 1
    assert device.counters["dma_error"] == 1


FIND_FILE = """
    static void outw(unsigned short port, unsigned short value)
    { __asm__ volatile ("outw %0, %1" : : "a"(value), "d"(port)); }
    static unsigned char inb(unsigned short port)
    { unsigned char value; __asm__ volatile ("inb %1, %0" : "=a"(value) : "d"(port)); return value; }

    static unsigned take(int bytes)         /* big endian */
    {
        unsigned value = 0;
        while (bytes--)
            value = value << 8 | inb(0x511);
        return value;
    }

    static const char wanted[] = "etc/wanted";

    void _start(void)
    {
        unsigned char *found = (unsigned char *) 0x200000;
        outw(0x510, 0x19);                  /* the directory */
        unsigned files = take(4), key = 0, size = 0;
        while (files--) {
            unsigned this_size = take(4), this_key = take(2), same = 1;
            take(2);
            for (unsigned i = 0; i < 56; i++)
                if (inb(0x511) != (i < sizeof wanted ? wanted[i] : 0))
                    same = 0;
            if (same)
                size = this_size, key = this_key;
        }
        outw(0x510, key);
        for (unsigned i = 0; i < size; i++)
            found[i] = inb(0x511);
        __asm__ volatile ("outl %0, %1" : : "a"(key ? size : 0), "d"((unsigned short) 0xf4));
        for (;;) ;
    }
"""


def test_a_guest_in_c_finds_a_file_by_its_name(machine: Machine) -> None:
    program = compile_c(FIND_FILE)
    device = machine.add(FwCfg(memory=machine.memory, e820=[(0, 4 * MiB, 1)]))
    machine.add(DebugExit())
    device.add_file("etc/want", b"too short a name")
    device.add_file("etc/wanted", b"this is it")
    device.add_file("etc/wanted-too", b"too long a name")
    machine.load(ElfImage(program.elf))
    outcome = machine.run(timeout=20)
    assert outcome.code == 10 << 1 | 1
    assert machine.memory.read(2 * MiB, 11) == b"this is it\0"


def test_the_guest_can_change_nothing_by_port(machine: Machine) -> None:
    source = "mov dx, 0x510; xor ax, ax; out dx, ax; inc dx; mov al, 'X'; out dx, al; in al, dx; mov [0x2000], al; hlt"
    device = machine.add(FwCfg())
    machine.load(FlatImage(assemble(source)))
    assert machine.run(timeout=5).end is End.HALTED
    assert machine.memory.read(0x2000, 1) == b"Q"
    assert device.counters["ignored_write"] == 1
    assert device.state()["items"][Key.SIGNATURE] == (Key.SIGNATURE, b"QEMU")
