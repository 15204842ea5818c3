"""ACPI tables, read by Intel's own disassembler and compiler (`iasl`), and found in memory as an OS finds them."""

import re
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvmpy.boot import LinuxKernel
from kvmpy.boot.acpi import AcpiTables
from kvmpy.boot.acpi.aml import (
    buffer,
    device,
    eisa_id,
    integer,
    method,
    name,
    name_string,
    package,
    package_length,
    scope,
)
from kvmpy.boot.acpi.system_table import system_table
from kvmpy.boot.e820 import E820Type
from kvmpy.boot.image import LoadedRange
from kvmpy.boot.mp_table import MpTable
from kvmpy.boot.platform import FixedHardware, IsaDevice, MmioDevice, Platform, SleepRegisters
from kvmpy.errors import ImageError, UsageError
from kvmpy.memory import GuestMemory
from kvmpy.pytest_plugin.requirement import skip_or_fail
from linux_images import KERNEL, MIB, ram, vmlinux, xen_note

FIXED = FixedHardware(pm1a_event=0x600, pm1a_control=0x604, pm_timer=0x608, reset=0x60C, reset_value=1, s5=5, sci=9)
REDUCED = SleepRegisters(control=0x600, status=0x601, reset=0x602, reset_value=1, s5=5)
PC = Platform(
    apic_ids=(0, 1, 2, 3),
    serial_ports=(IsaDevice(0x3F8, 4), IsaDevice(0x2F8, 3)),
    keyboard=IsaDevice(0x60, 1),
    clock=IsaDevice(0x70, 8),
    pvpanic=IsaDevice(0x505, None),
    pci=True,
    pci_config=0xB000_0000,
    power=FIXED,
    virtio_mmio=(MmioDevice(0xD000_0000, 0x200, 5), MmioDevice(1 << 40, 0x1000, 16, edge=False)),
)
SMALL = Platform(power=REDUCED)
BARE = Platform()
PLATFORMS = pytest.mark.parametrize("platform", [PC, SMALL, BARE], ids=["pc", "reduced", "bare"])


def tables(platform: Platform, memory: GuestMemory | None = None) -> dict[str, bytes]:
    """All tables, by signature, found as an operating system finds them: RSDP, XSDT, FADT."""
    memory = ram() if memory is None else memory
    rsdp = memory.read(AcpiTables(platform).place(memory, ()).rsdp, 36)
    assert rsdp[:8] == b"RSD PTR "
    assert (sum(rsdp[:20]) & 0xFF, sum(rsdp) & 0xFF) == (0, 0)
    revision, rsdt, length, xsdt = struct.unpack_from("<BIIQ", rsdp, 15)
    assert (revision, length) == (2, 36)
    found = {}
    roots = {}
    for root, width in ((rsdt, 4), (xsdt, 8)):
        table = read_table(memory, root)
        found[table[:4].decode()] = table
        roots[root] = [int.from_bytes(table[at : at + width], "little") for at in range(36, len(table), width)]
    assert roots[rsdt] == roots[xsdt]
    for address in roots[xsdt]:
        table = read_table(memory, address)
        found[table[:4].decode()] = table
    fadt = found["FACP"]
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert struct.unpack_from("<QQ", fadt, 132) == (0, dsdt)
    found["DSDT"] = read_table(memory, dsdt)
    if facs:
        assert facs % 64 == 0
        found["FACS"] = memory.read(facs, 64)
    return found


def read_table(memory: GuestMemory, address: int) -> bytes:
    table = memory.read(address, memory.read_u32(address + 4))
    assert sum(table) & 0xFF == 0
    return table


# iasl


def acpica(tool: str, *arguments: str, folder: Path) -> str:
    """What one of ACPICA's tools says."""
    program = shutil.which(tool)
    if program is None:
        skip_or_fail(f"{tool} is missing (Debian: acpica-tools)")
    done = subprocess.run(
        [program, *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def iasl(*arguments: str, folder: Path) -> str:
    """What the compiler says, which must be nothing bad."""
    said = acpica("iasl", *arguments, folder=folder)
    for line in said.splitlines():
        assert not line.startswith(("Error", "Warning", "Firmware Error")), said
        assert "error" not in line.lower() or "0 Errors" in line, said
        assert "invalid" not in line.lower(), said
    return said


def disassemble(table: bytes, folder: Path) -> str:
    signature = table[:4].decode()
    (folder / f"{signature}.aml").write_bytes(table)
    iasl("-d", f"{signature}.aml", folder=folder)
    return (folder / f"{signature}.dsl").read_text("utf-8")


def fields(text: str) -> list[tuple[str, str]]:
    """The lines "name : value" of a disassembled data table."""
    lines = [line.partition("]")[2] if line.startswith("[") else line for line in text.splitlines()]
    pairs = [line.rpartition(" : ")[::2] for line in lines if " : " in line]
    return [(name.strip(), value.split("[")[0].strip()) for name, value in pairs]


def check_fields(text: str, expected: Mapping[str, str]) -> None:
    found = dict(reversed(fields(text)))  # the first of several with one name counts
    assert {name: found.get(name) for name in expected} == expected


@PLATFORMS
def test_iasl_reads_every_table_without_complaint_and_makes_the_same_bytes_of_what_it_read(
    platform: Platform, tmp_path: Path
) -> None:
    found = tables(platform)
    for signature, table in found.items():
        disassemble(table, tmp_path)
        if signature in ("DSDT", "APIC", "MCFG", "FACP"):
            said = iasl("-oa", f"{signature}.dsl", folder=tmp_path)
            assert "0 Errors, 0 Warnings" in said, said
            again = (tmp_path / f"{signature}.aml").read_bytes()
            # A compiler puts its own name and version into the header.
            assert again[:9] + again[10:28] + again[36:] == table[:9] + table[10:28] + table[36:], signature
    assert set(found) == {"RSDT", "XSDT", "FACP", "APIC", "DSDT"} | (
        {"FACS", "MCFG"} if platform is PC else set()
    )  # fmt: skip


def test_madt_has_processors_ioapic_and_the_one_interrupt_that_differs_from_the_isa_bus(tmp_path: Path) -> None:
    text = disassemble(tables(PC)["APIC"], tmp_path)
    check_fields(text, {"Local Apic Address": "FEE00000", "PC-AT Compatibility": "1", "Address": "FEC00000"})
    pairs = fields(text)
    kinds = [value for name, value in pairs if name == "Subtable Type"]
    assert kinds == ["00"] * 4 + ["01", "02", "04"]
    assert [value for name, value in pairs if name == "Local Apic ID"] == ["00", "01", "02", "03"]
    assert [value for name, value in pairs if name == "Processor Enabled"] == ["1"] * 4
    check_fields(text[text.index("Interrupt Source Override") :], {
        "Source": "09", "Interrupt": "00000009", "Polarity": "1", "Trigger Mode": "3",
    })  # fmt: skip


def test_apic_ids_of_more_than_eight_bits_are_x2apics(tmp_path: Path) -> None:
    text = disassemble(tables(Platform(apic_ids=tuple(range(300))), ram())["APIC"], tmp_path)
    pairs = fields(text)
    kinds = [value for name, value in pairs if name == "Subtable Type"]
    assert kinds == ["00"] * 255 + ["09"] * 45 + ["01", "04", "0A"]
    assert [value for name, value in pairs if name == "Processor x2Apic ID"][-1] == f"{299:08X}"


def test_fadt_of_fixed_hardware_names_its_registers(tmp_path: Path) -> None:
    text = disassemble(tables(PC)["FACP"], tmp_path)
    check_fields(text, {
        "SCI Interrupt": "0009", "SMI Command Port": "00000000", "PM1A Event Block Address": "00000600",
        "PM1A Control Block Address": "00000604", "PM Timer Block Address": "00000608",
        "PM1 Event Block Length": "04", "PM1 Control Block Length": "02", "PM Timer Block Length": "04",
        "32-bit PM Timer (V1)": "1", "Reset Register Supported (V2)": "1", "Hardware Reduced (V5)": "0",
        "Control Method Power Button (V1)": "0", "Control Method Sleep Button (V1)": "1",
        "8042 Present on ports 60/64 (V2)": "1", "CMOS RTC Not Present (V5)": "0", "RTC Century Index": "32",
        "VGA Not Present (V4)": "1", "Value to cause reset": "01",
    })  # fmt: skip
    reset = text[text.index("Reset Register :") :]
    check_fields(reset, {"Space ID": "01", "Bit Width": "08", "Address": "000000000000060C"})


def test_fadt_without_fixed_hardware_is_hardware_reduced(tmp_path: Path) -> None:
    text = disassemble(tables(SMALL)["FACP"], tmp_path)
    check_fields(text, {
        "SCI Interrupt": "0000", "PM1A Event Block Address": "00000000", "PM Timer Block Address": "00000000",
        "Hardware Reduced (V5)": "1", "Reset Register Supported (V2)": "1", "FACS Address": "00000000",
        "8042 Present on ports 60/64 (V2)": "0", "CMOS RTC Not Present (V5)": "1", "RTC Century Index": "00",
    })  # fmt: skip
    control = text[text.index("Sleep Control Register :") :]
    check_fields(control, {"Space ID": "01", "Bit Width": "08", "Address": "0000000000000600"})
    status = text[text.index("Sleep Status Register :") :]
    check_fields(status, {"Space ID": "01", "Address": "0000000000000601"})


def test_a_timer_of_24_bits_is_called_so(tmp_path: Path) -> None:
    power = FixedHardware(0x600, 0x604, 0x608, 0x60C, 1, s5=5, sci=9, timer_bits=24)
    check_fields(disassemble(tables(Platform(power=power))["FACP"], tmp_path), {"32-bit PM Timer (V1)": "0"})


def test_mcfg_says_where_configuration_space_is(tmp_path: Path) -> None:
    check_fields(disassemble(tables(PC)["MCFG"], tmp_path), {
        "Base Address": "00000000B0000000", "Start Bus Number": "00", "End Bus Number": "FF",
    })  # fmt: skip


def squeezed(text: str) -> str:
    """ASL without comments and layout."""
    return " ".join(re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL).split())


DEVICE_TEXT = [
    "Name (\\_S5, Package (0x04) { 0x05, Zero, Zero, Zero })",
    'Device (C003) { Name (_HID, "ACPI0007" ) Name (_UID, 0x03) }',
    'Device (COM1) { Name (_HID, EisaId ("PNP0501") ) Name (_UID, One) Name (_CRS, ResourceTemplate () '
    "{ IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08, ) IRQNoFlags () {4} }) }",
    'Device (COM2) { Name (_HID, EisaId ("PNP0501") ) Name (_UID, 0x02) Name (_CRS, ResourceTemplate () '
    "{ IO (Decode16, 0x02F8, 0x02F8, 0x01, 0x08, ) IRQNoFlags () {3} }) }",
    'Device (KBD) { Name (_HID, EisaId ("PNP0303") ) Name (_CRS, ResourceTemplate () '
    "{ IO (Decode16, 0x0060, 0x0060, 0x01, 0x01, ) IO (Decode16, 0x0064, 0x0064, 0x01, 0x01, ) IRQNoFlags () {1} }) }",
    'Device (RTC) { Name (_HID, EisaId ("PNP0B00") ) Name (_CRS, ResourceTemplate () '
    "{ IO (Decode16, 0x0070, 0x0070, 0x01, 0x02, ) IRQNoFlags () {8} }) }",
    'Device (PVPN) { Name (_HID, "QEMU0001") Name (_CRS, ResourceTemplate () '
    "{ IO (Decode16, 0x0505, 0x0505, 0x01, 0x01, ) }) }",
    'Device (ECAM) { Name (_HID, EisaId ("PNP0C02") ) Name (_CRS, ResourceTemplate () '
    "{ Memory32Fixed (ReadWrite, 0xB0000000, 0x10000000, ) }) }",
    'Device (PCI0) { Name (_HID, EisaId ("PNP0A08") ) Name (_CID, EisaId ("PNP0A03") ) Name (_UID, Zero)',
    "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0x0000, 0x0000, 0x00FF, 0x0000, 0x0100, ,, )",
    "WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, "
    "0x0000, 0x0D00, 0xFFFF, 0x0000, 0xF300, ,, , TypeStatic, DenseTranslation)",
    "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite, "
    "0x00000000, 0xE0000000, 0xFEBFFFFF, 0x00000000, 0x1EC00000, ,, , AddressRangeMemory, TypeStatic)",
    'Device (V000) { Name (_HID, "LNRO0005") Name (_UID, Zero) Name (_CCA, One) Name (_CRS, ResourceTemplate () '
    "{ Memory32Fixed (ReadWrite, 0xD0000000, 0x00000200, ) "
    "Interrupt (ResourceConsumer, Edge, ActiveHigh, Shared, ,, ) { 0x00000005, } }) }",
    "QWordMemory (ResourceConsumer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite, 0x0000000000000000, "
    "0x0000010000000000, 0x0000010000000FFF, 0x0000000000000000, 0x0000000000001000, ,, , AddressRangeMemory, "
    "TypeStatic) Interrupt (ResourceConsumer, Level, ActiveHigh, Shared, ,, ) { 0x00000010, }",
]


def test_dsdt_describes_the_devices(tmp_path: Path) -> None:
    text = squeezed(disassemble(tables(PC)["DSDT"], tmp_path))
    for expected in DEVICE_TEXT:
        assert expected in text


def test_the_interpreter_that_operating_systems_use_runs_the_dsdt(tmp_path: Path) -> None:
    (tmp_path / "dsdt.aml").write_bytes(tables(PC)["DSDT"])
    commands = "evaluate \\_S5; resources \\_SB.COM1; resources \\_SB.V001"
    said = acpica("acpiexec", "-b", commands, "dsdt.aml", folder=tmp_path)
    assert "1 ACPI AML tables successfully acquired and loaded" in said
    sleep = said[said.index("Evaluation of \\_S5") :]
    assert sleep.split("[Integer] = ")[1].startswith("0000000000000005")
    serial = said[said.index("Device: \\_SB.COM1") : said.index("Device: \\_SB.V001")]
    assert "Address Minimum : 03F8" in serial
    assert "Triggering : Edge" in serial
    virtio = said[said.index("Device: \\_SB.V001") :]
    assert "Address Minimum : 0000010000000000" in virtio
    assert "Triggering : Level" in virtio
    assert "Dword00 : 00000010" in virtio


def test_dsdt_of_a_bare_machine_has_its_processor_and_no_way_to_switch_off(tmp_path: Path) -> None:
    text = disassemble(tables(BARE)["DSDT"], tmp_path)
    assert text.count("Device (") == 1
    assert "_S5" not in text


def test_any_number_of_devices_with_any_interrupts_can_be_described(tmp_path: Path) -> None:
    # Interrupts from 16 on are no ISA interrupts: they have another descriptor, and no override in the MADT.
    power = FixedHardware(0x600, 0x604, 0x608, 0x60C, 1, s5=5, sci=20)
    ports = tuple(IsaDevice(0x1000 + 8 * place, irq) for place, irq in enumerate((None, 16, *range(100))))
    devices = tuple(MmioDevice(0xD000_0000 + 0x1000 * place, 0x200, 5) for place in range(300))
    found = tables(Platform(serial_ports=ports, virtio_mmio=devices, power=power))
    text = squeezed(disassemble(found["DSDT"], tmp_path))
    assert "0 Errors, 0 Warnings" in iasl("-oa", "DSDT.dsl", folder=tmp_path)
    assert text.count("PNP0501") == len(ports)
    assert text.count("LNRO0005") == len(devices)
    assert text.count("Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000010, }") == 2
    check_fields(disassemble(found["FACP"], tmp_path), {"SCI Interrupt": "0014"})
    assert "Interrupt Source Override" not in disassemble(found["APIC"], tmp_path)


def test_pci_without_configuration_space_in_memory_is_no_express(tmp_path: Path) -> None:
    text = disassemble(tables(Platform(pci=True))["DSDT"], tmp_path)
    assert 'EisaId ("PNP0A03")' in text
    assert "PNP0A08" not in text
    assert "_CID" not in text


def test_larger_objects_of_aml_come_out_as_they_went_in(tmp_path: Path) -> None:
    # Lengths around every change in the form of a package length, names of one to three parts, all sizes of integers.
    parts = [name(f"B{size:03X}", buffer(bytes(size))) for size in (58, 59, 60, 61, 62, 63, 64, 4085, 4092, 4093)]
    numbers = (0, 1, 2, 0xFF, 0x100, 0xFFFF, 0x1_0000, 0xFFFF_FFFF, 1 << 32, (1 << 64) - 1)
    body = b"".join([
        *parts,
        name("NUMS", package(*numbers)),
        name("TEXT", "hello"),
        scope("\\_SB", device("AAAA", name("_ADR", 0), device("BBBB", name("_HID", eisa_id("PNP0C0A"))))),
        scope("\\_SB.AAAA", name("UNIT", 1)),
        scope("\\_SB.AAAA.BBBB", method("MMMM", 2)),
    ])  # fmt: skip
    text = disassemble(system_table(b"DSDT", 2, body), tmp_path)
    assert "0 Errors, 0 Warnings" in iasl("-oa", "DSDT.dsl", folder=tmp_path)
    assert (tmp_path / "DSDT.aml").read_bytes()[36:] == body
    text = squeezed(text)
    for number in numbers[2:]:
        assert any(f"0x{number:0{digits}X}" in text for digits in (2, 4, 8, 16))
    assert 'Name (TEXT, "hello")' in text
    assert "Method (MMMM, 2, NotSerialized)" in text
    assert 'EisaId ("PNP0C0A")' in text


@pytest.mark.parametrize("path", ["abcd", "TOOLONG", "1ABC", "A-B", "_SB..A", "Ä"])
def test_names_that_acpi_does_not_have_are_refused(path: str) -> None:
    with pytest.raises(UsageError, match="is no name of ACPI"):
        name_string(path)


def test_what_does_not_fit_into_aml_is_refused() -> None:
    with pytest.raises(UsageError, match="64 bits"):
        integer(1 << 64)
    with pytest.raises(UsageError, match="64 bits"):
        integer(-1)
    with pytest.raises(UsageError, match="too large"):
        package_length(1 << 28)


# where they go


def test_they_are_reserved_memory_below_1_mib() -> None:
    placed = AcpiTables(PC).place(ram(), ())
    assert all(used.address >= 0xF_0000 and used.end <= MIB for used in placed.ranges)
    assert {entry.type for entry in placed.memory_map} == {E820Type.RESERVED}
    assert placed.rsdp % 16 == 0


def test_what_does_not_fit_there_goes_to_the_top_of_ram_and_only_the_rsdp_stays() -> None:
    memory = ram()
    placed = AcpiTables(PC).place(memory, [LoadedRange(0xF_0000, 0xFF80, "a BIOS")])
    assert placed.rsdp == 0xF_FF80
    everything = next(used for used in placed.ranges if used.name == "ACPI tables")
    assert 31 * MIB < everything.address < everything.end <= 32 * MIB
    assert any(entry.address == everything.address and entry.type == 2 for entry in placed.memory_map)
    assert read_table(memory, memory.read_u32(placed.rsdp + 24))[:4] == b"XSDT"


def test_a_thousand_processors_fit() -> None:
    platform = Platform(apic_ids=tuple(range(1024)), power=FIXED)
    memory = ram()
    placed = MpTable(platform).place(memory, ())
    placed = AcpiTables(platform).place(memory, placed.ranges)
    assert placed.rsdp < MIB
    assert len(tables(platform, ram())["APIC"]) > 1024 * 8


def test_without_a_place_for_the_rsdp_the_error_says_what_to_do() -> None:
    with pytest.raises(ImageError, match=r"ACPI RSDP: no 0x24 bytes are free .* tables=\(\)"):
        AcpiTables(PC).place(ram(), [LoadedRange(0x9_0000, 0x7_0000, "all of it")])


def test_mp_table_and_madt_agree() -> None:
    for platform in (PC, SMALL):
        madt = tables(platform)["APIC"]
        mp_table = MpTable(platform).configuration()
        processors = [at for at in range(44, len(madt)) if madt[at : at + 2] == b"\0\x08"]
        assert [madt[at + 3] for at in processors[: len(platform.apic_ids)]] == [
            mp_table[44 + 20 * place + 1] for place in range(len(platform.apic_ids))
        ]
        override = madt.find(b"\x02\x0a\0\x09")
        level = struct.pack("<BBHBBBB", 3, 0, 0b1101, 1 if platform.pci else 0, 9, 0, 9)
        assert (override > 0) == (level in mp_table) == (platform is PC)


# who is told


def test_linux_is_told_where_the_rsdp_is() -> None:
    for kernel, register, field in (
        (LinuxKernel(vmlinux()), "rsi", 0x70),
        (LinuxKernel(vmlinux(note=xen_note(KERNEL + 0x40)), entry="pvh"), "rbx", 32),
    ):
        memory = ram()
        entry = kernel.load(memory, [MpTable(PC), AcpiTables(PC)])
        rsdp = memory.read_u64(getattr(entry.state.regs, register) + field)
        assert memory.read(rsdp, 8) == b"RSD PTR "
        assert {"MP table", "ACPI tables", "ACPI RSDP"} <= {used.name for used in entry.ranges}
