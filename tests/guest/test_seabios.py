"""Debian's SeaBIOS, unmodified, from the reset vector to the end of its search for something to boot."""

import struct
from pathlib import Path

import pytest

from kvmpy import End, Machine, MiB
from kvmpy.boot import FirmwareImage
from kvmpy.boot.smbios import SmbiosTables
from kvmpy.devices import I8042, Cmos, DebugConsole, FwCfg, PciHostBridge, PostPort
from kvmpy.machine import Pc
from kvmpy.machine.platform_tables import platform_of
from kvmpy.pytest_plugin.requirement import skip_or_fail

SEABIOS = Path("/usr/share/seabios")


def seabios(name: str) -> Path:
    image = SEABIOS / name
    if not image.exists():
        skip_or_fail(f"needs {image} (Debian package seabios)")
    return image


def smbios_of(machine: Machine) -> bytes:
    """The structures that the entry point in the BIOS area leads to."""
    area = machine.memory.read(0xF_0000, 0x1_0000)
    entry = area[area.index(b"_SM_") :][:31]
    assert sum(entry) & 0xFF == sum(entry[16:]) & 0xFF == 0
    size, address = struct.unpack_from("<HI", entry, 22)
    return machine.memory.read(address, size)


def test_seabios_hands_on_the_smbios_structures_that_it_is_given() -> None:
    with Pc(memory=16 * MiB) as machine:
        debug = machine.add(DebugConsole(port=0x402))
        fw_cfg = machine.add(FwCfg(ram_size=16 * MiB, memory=machine.memory))
        entry_point, structures = SmbiosTables(platform_of(machine)).for_firmware(machine.memory)
        fw_cfg.add_smbios(entry_point, structures)
        machine.load(FirmwareImage(seabios("bios.bin"), shadow=128 * 1024))
        machine.start(timeout=50)
        debug.expect(b"Scan for VGA option rom", timeout=40)
        machine.stop()
        assert smbios_of(machine) == structures


@pytest.mark.parametrize(("name", "shadow"), [("bios.bin", 128), ("bios-256k.bin", 256)])
def test_seabios_starts_and_reports_that_there_is_nothing_to_boot(name: str, shadow: int) -> None:
    image = FirmwareImage(seabios(name), shadow=shadow * 1024)
    with Machine(memory=16 * MiB) as machine:
        debug = machine.add(DebugConsole(port=0x402))
        machine.add(Cmos(memory_below_4g=16 * MiB))
        machine.add(I8042())
        machine.add(PciHostBridge())
        machine.add(PostPort())
        machine.add(FwCfg(cpus=1, ram_size=16 * MiB, memory=machine.memory))
        machine.load(image)
        machine.start(timeout=50)
        debug.expect(b"SeaBIOS (version", timeout=20)
        debug.expect(b"No bootable device", timeout=45)
        assert machine.stop().end is End.STOPPED
        assert "RamSize: 0x01000000" in debug.text
        # It looked for more than it found, and went on: serial ports nobody claims were probed.
        assert machine.statistics().count("port", 0x402, "write") > 500
        assert any(entry.address == 0x3F9 for entry in machine.statistics().unclaimed)
