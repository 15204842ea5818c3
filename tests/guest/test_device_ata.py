"""The ATA disk: guests read and write it by string instructions, and SeaBIOS boots from it."""

import struct
from pathlib import Path

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Machine, MiB
from kvmpy.boot import FirmwareImage, FlatImage
from kvmpy.devices import I8042, AtaDisk, Cmos, DebugConsole, DebugExit, FwCfg, PciHostBridge, PostPort
from kvmpy.pytest_plugin.requirement import skip_or_fail
from pc_interrupts import take_interrupts

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
CAP_COALESCED_PIO = 162
CONTENT = b"".join(struct.pack("<Q", sector) * 64 for sector in range(256))

COMMAND = """
        mov dx, 0x1f6; mov al, 0xe0; out dx, al
        mov dx, 0x1f2; mov al, {count}; out dx, al
        inc dx; mov al, {sector}; out dx, al
        inc dx; mov al, 0; out dx, al
        inc dx; out dx, al
        mov dx, 0x1f7; mov al, {command}; out dx, al
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


def test_a_sector_is_one_exit_for_a_string_instruction(image: Path) -> None:
    source = f"""
        cld
        {COMMAND.format(count=2, sector=3, command=0x20)}
        mov dx, 0x1f0; mov di, 0x2000
        mov cx, 256; rep insw
        mov cx, 128; rep insd
        mov dx, 0x1f7; in al, dx
        hlt"""
    with Machine(memory=0x10000, irqchip=False) as machine:
        disk = machine.add(AtaDisk(image))
        machine.load(FlatImage(assemble(source)))
        assert machine.run(timeout=5).end is End.HALTED
        assert machine.memory.read(0x2000, 1024) == CONTENT[3 * 512 : 5 * 512]
        assert machine.vcpus[0].regs.rax & 0xFF == 0x50
        assert disk.counters == {}
        statistics = machine.statistics()
        assert statistics.count("port", 0x1F0) == 256 + 128
        assert statistics.total == 6 + 2 + 1 + 1  # the registers, two strings, the status, HLT


def test_a_sector_is_written_and_the_disk_interrupts(image: Path) -> None:
    source = f"""
        {take_interrupts({14: "disk"})}
        cld
        {COMMAND.format(count=1, sector=9, command=0x30)}
        mov dx, 0x1f0; mov si, 0x1000
        mov cx, 256; rep outsw
    1:  sti; hlt; cli
        cmp byte ptr [0x2000], 0
        je 1b
        hlt
    disk:
        push ax; push dx
        mov dx, 0x1f7; in al, dx
        mov [0x2000], al
        mov al, 0x20; out 0xa0, al; out 0x20, al
        pop dx; pop ax
        iret"""
    with Machine(memory=0x10000) as machine:
        disk = machine.add(AtaDisk(image))
        machine.load(FlatImage(assemble(source)))
        code = machine.memory.read(0x1000, 512)
        assert machine.run(timeout=10).end is End.HALTED
        assert machine.memory.read_u8(0x2000) == 0x50
        assert disk.sectors_written == 1
    assert image.read_bytes() == CONTENT[: 9 * 512] + code + CONTENT[10 * 512 :]


def test_the_total_of_exits_counts_what_nobody_answers_and_not_what_is_queued() -> None:
    source = """
        mov dx, 0x300; in al, dx; in al, dx; in ax, dx      # nobody
        mov cx, 3; mov di, 0x2000; rep insb
        mov al, 'x'; out 0xe9, al; out 0xe9, al             # queued until the HLT
        out 0x84, al                                        # a device that cannot be read, or written
        in al, 0x84
        hlt"""
    with Machine(memory=0x10000, irqchip=False) as machine:
        console = machine.add(DebugConsole())
        queued = machine.vm.check_extension(CAP_COALESCED_PIO) > 0
        machine.board.queue_writes(0xE9, True)
        machine.map_ports(0x84, 1)
        machine.load(FlatImage(assemble(source)))
        assert machine.run(timeout=5).end is End.HALTED
        assert console.text == "xx"
        statistics = machine.statistics()
        assert statistics.count("port", 0xE9) == 2
        assert statistics.total == 3 + 1 + 2 + 1 + (0 if queued else 2)


BOOT_SECTOR = """
        mov ax, 0; mov ds, ax; mov es, ax
        mov ah, 0x42; mov si, offset packet; int 0x13       # extended read: sector 1 to 0x8000
        jc failed
        mov ax, 0x0201; mov bx, 0x8200; mov cx, 3; mov dh, 0; int 0x13      # and by cylinder, head, sector: sector 2
        jc failed
        mov ax, 0x0301; mov bx, 0x7c00; mov cx, 6; mov dh, 0; int 0x13      # writes itself to sector 5
        jc failed
        mov al, dl; out 0xf4, al
    failed:
        mov al, 0; out 0xf4, al
    packet: .byte 16, 0; .word 1; .word 0x8000, 0; .quad 1
"""


def test_seabios_boots_from_it_and_int_13h_reads_and_writes(tmp_path: Path) -> None:
    if not SEABIOS.exists():
        skip_or_fail(f"needs {SEABIOS} (Debian package seabios)")
    path = tmp_path / "disk.img"
    boot = assemble(BOOT_SECTOR, address=0x7C00).ljust(510, b"\0") + b"\x55\xaa"
    path.write_bytes(boot + b"A" * 512 + b"B" * 512 + bytes(61 * 512))
    with Machine(memory=16 * MiB) as machine:
        log = machine.add(DebugConsole(port=0x402))
        machine.add(Cmos(memory_below_4g=16 * MiB))
        machine.add(I8042())
        machine.add(PostPort())
        machine.add(DebugExit())
        machine.add(PciHostBridge(present=False))  # without PCI SeaBIOS looks at the ports of ISA disks
        machine.add(FwCfg(ram_size=16 * MiB, memory=machine.memory))
        disk = machine.add(AtaDisk(path))
        machine.load(FirmwareImage(SEABIOS, shadow=256 * 1024))
        outcome = machine.run(timeout=50)
        assert (outcome.end, outcome.code) == (End.EXITED, 0x80 << 1 | 1), log.text
        assert "kvmpy ATA disk" in log.text
        assert machine.memory.read(0x8000, 1024) == b"A" * 512 + b"B" * 512
        assert disk.sectors_written == 1
    assert path.read_bytes()[5 * 512 : 6 * 512] == boot
