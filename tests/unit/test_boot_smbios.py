"""SMBIOS as `dmidecode` reads it, and where operating systems look for it."""

import shutil
import struct
import subprocess
from pathlib import Path
from uuid import UUID

import pytest

from kvmpy.boot.image import LoadedRange
from kvmpy.boot.platform import Platform
from kvmpy.boot.smbios import SmbiosTables
from kvmpy.errors import ImageError
from kvmpy.memory import GuestMemory
from kvmpy.pytest_plugin.requirement import skip_or_fail
from linux_images import MIB, ram

FOUR_CORES = Platform(apic_ids=(0, 1, 2, 3), signature=0xA10F11, features=0x178B_FBFF)


def area(memory: GuestMemory) -> bytes:
    return memory.read(0xF_0000, 0x1_0000)


def entry_3_0(memory: GuestMemory) -> tuple[bytes, bytes]:
    """The 64-bit entry point and the structures, both as they are in memory."""
    place = next(at for at in range(0, 0x1_0000, 16) if area(memory)[at : at + 5] == b"_SM3_")
    entry = area(memory)[place : place + 24]
    assert sum(entry) & 0xFF == 0
    length, major, minor, _, revision, size, address = struct.unpack("<6xBBBBBxIQ", entry)
    assert (length, major, minor, revision) == (24, 3, 0, 1)
    return entry, memory.read(address, size)


def entry_2_1(memory: GuestMemory) -> tuple[bytes, bytes]:
    """The same of the 32-bit entry point."""
    place = next(at for at in range(0, 0x1_0000, 16) if area(memory)[at : at + 4] == b"_SM_")
    entry = area(memory)[place : place + 31]
    assert sum(entry) & 0xFF == 0
    assert entry[16:21] == b"_DMI_"
    assert sum(entry[16:]) & 0xFF == 0
    size, address, count = struct.unpack("<HIH", entry[22:30])
    structures = memory.read(address, size)
    assert count == len(handles(structures))
    assert struct.unpack("<H", entry[8:10])[0] == max(handles(structures).values())
    return entry, structures


def handles(structures: bytes) -> dict[int, int]:
    """Handle -> size of every structure."""
    found, at = {}, 0
    while at < len(structures):
        _, length, handle = struct.unpack_from("<BBH", structures, at)
        end = structures.index(b"\0\0", at + length) + 2
        found[handle] = end - at
        at = end
    return found


def dmidecode(memory: GuestMemory, folder: Path, *, old: bool = False) -> str:
    program = shutil.which("dmidecode") or shutil.which("dmidecode", path="/usr/sbin:/sbin")
    if program is None:
        skip_or_fail("dmidecode is missing (Debian: dmidecode)")
    entry, structures = entry_2_1(memory) if old else entry_3_0(memory)
    # The form of a dump: the structures follow 32 bytes further on, and the entry point says so.
    dump = bytearray(entry)
    if old:
        dump[24:28] = struct.pack("<I", 32)
        dump[21] = dump[4] = 0
        dump[21] = -sum(dump[16:]) & 0xFF
        dump[4] = -sum(dump) & 0xFF
    else:
        dump[16:24] = struct.pack("<Q", 32)
        dump[5] = 0
        dump[5] = -sum(dump) & 0xFF
    (folder / "dump").write_bytes(bytes(dump).ljust(32, b"\0") + structures)
    done = subprocess.run(
        [program, "--from-dump", str(folder / "dump")], capture_output=True, text=True, timeout=30, check=False
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    for complaint in ("BAD", "Invalid", "OUT OF SPEC", "wrong", "truncated", "broken"):
        assert complaint.lower() not in text.lower(), text
    return text


def section(text: str, title: str, number: int = 0) -> dict[str, str]:
    """The values of the structure called `title`."""
    found = [part for part in text.split("\n\n") if f"\n{title}\n" in part][number]
    pairs = (line.strip().partition(": ") for line in found.splitlines()[2:])
    return {name: value for name, _, value in pairs}


@pytest.mark.parametrize("old", [False, True], ids=["3.0", "2.1"])
def test_dmidecode_reads_all_of_it_without_complaint(old: bool, tmp_path: Path) -> None:
    memory = ram()
    SmbiosTables(FOUR_CORES, uuid=UUID("00112233-4455-6677-8899-aabbccddeeff")).place(memory, ())
    text = dmidecode(memory, tmp_path, old=old)
    assert "System is a virtual machine" in text
    assert "ACPI is supported" in text
    system = section(text, "System Information")
    assert (system["Manufacturer"], system["UUID"]) == ("kvmpy", "00112233-4455-6677-8899-aabbccddeeff")
    processor = section(text, "Processor Information")
    assert (processor["Core Count"], processor["ID"]) == ("4", "11 0F A1 00 FF FB 8B 17")
    array = section(text, "Physical Memory Array")
    assert (array["Maximum Capacity"], array["Number Of Devices"]) == ("32 MB", "1")
    assert section(text, "Memory Device")["Size"] == "32 MB"
    mapped = section(text, "Memory Array Mapped Address")
    assert (mapped["Starting Address"], mapped["Ending Address"]) == ("0x00000000000", "0x00001FFFFFF")
    assert text.rstrip().endswith("End Of Table")


def test_memory_above_4_gib_is_a_device_of_its_own(tmp_path: Path) -> None:
    memory = ram((0, 33 * MIB), (1 << 32, 3 * MIB))
    SmbiosTables(FOUR_CORES).place(memory, ())
    text = dmidecode(memory, tmp_path)
    assert section(text, "Physical Memory Array")["Maximum Capacity"] == "36 MB"
    assert [section(text, "Memory Device", number)["Size"] for number in (0, 1)] == ["33 MB", "3 MB"]
    above = section(text, "Memory Array Mapped Address", 1)
    assert (above["Starting Address"], above["Range Size"]) == ("0x00100000000", "3 MB")


def test_very_large_memory_has_the_extended_sizes(tmp_path: Path) -> None:
    # No such guest is made: the structures are told of one, and put to where others would be.
    memory = ram()
    tables = SmbiosTables(Platform(apic_ids=tuple(range(300))))
    made = b"".join(tables.structures([(0, 1 << 43)]))
    tables.place(memory, ())
    entry, _ = entry_3_0(memory)
    memory.write(struct.unpack("<Q", entry[16:24])[0], made)
    text = dmidecode(memory, tmp_path)
    assert section(text, "Physical Memory Array")["Maximum Capacity"] == "8 TB"
    assert section(text, "Memory Device")["Size"] == "8 TB"
    assert section(text, "Memory Array Mapped Address")["Range Size"] == "8 TB"
    assert section(text, "Processor Information")["Core Count"] == "300"


def test_a_machine_without_uuid_has_none(tmp_path: Path) -> None:
    memory = ram()
    SmbiosTables(Platform()).place(memory, ())
    assert section(dmidecode(memory, tmp_path), "System Information")["UUID"] == "Not Settable"


def test_structures_go_to_the_top_of_ram_when_only_the_entry_points_fit() -> None:
    memory = ram()
    placed = SmbiosTables(FOUR_CORES).place(memory, [LoadedRange(0xF_0000, 0xFFC0, "a BIOS")])
    assert [used.address > 31 * MIB for used in placed.ranges] == [True, False]
    assert entry_2_1(memory)[1] == entry_3_0(memory)[1]
    with pytest.raises(ImageError, match="SMBIOS entry points"):
        SmbiosTables(FOUR_CORES).place(memory, [LoadedRange(0xF_0000, 0xFFD0, "a BIOS")])
