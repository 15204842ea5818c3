"""The MP table, read field by field after the MultiProcessor Specification 1.4 and not after kvmpy."""

import struct
from dataclasses import dataclass, field

import pytest

from kvmpy.boot import FlatImage, LinuxKernel, MultibootKernel
from kvmpy.boot.e820 import E820Type
from kvmpy.boot.image import LoadedRange
from kvmpy.boot.mp_table import MpTable
from kvmpy.boot.platform import FixedHardware, Platform
from kvmpy.errors import ImageError
from kvmpy.memory import GuestMemory
from linux_images import BzImageFile, ram
from multiboot_files import Header1, flat_kernel

MIB = 0x10_0000
POWER = FixedHardware(pm1a_event=0x600, pm1a_control=0x604, pm_timer=0x608, reset=0x60C, reset_value=1, s5=5, sci=9)


@dataclass
class Read:
    """What an MP table in guest memory says."""

    address: int
    header: tuple[int, ...]
    processors: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    buses: dict[int, bytes] = field(default_factory=dict)
    ioapics: list[tuple[int, int, int, int]] = field(default_factory=list)
    interrupts: list[tuple[int, ...]] = field(default_factory=list)
    local: list[tuple[int, ...]] = field(default_factory=list)


def read(memory: GuestMemory) -> Read:
    area = memory.read(0xF_0000, 0x1_0000)
    place = next(at for at in range(0, 0x1_0000, 16) if area[at : at + 4] == b"_MP_")
    pointer = area[place : place + 16]
    assert sum(pointer) & 0xFF == 0
    table_address, length, revision, _, *features = struct.unpack("<4xIBBB5B", pointer)
    assert (length, revision, features) == (1, 4, [0, 0, 0, 0, 0])
    size = memory.read_u16(table_address + 4)
    table = memory.read(table_address, size)
    assert table[:4] == b"PCMP"
    assert sum(table) & 0xFF == 0
    _, revision, _, oem_table, oem_size, count, lapic, extended, _, _ = struct.unpack("<HBB20xIHHIHBB", table[4:44])
    found = Read(0xF_0000 + place, (revision, oem_table, oem_size, lapic, extended))
    at, kinds = 44, []
    for _ in range(count):
        kind = table[at]
        kinds.append(kind)
        if kind == 0:
            apic_id, version, flags, signature, features_edx = struct.unpack_from("<BBBII", table, at + 1)
            assert table[at + 12 : at + 20] == bytes(8)
            found.processors.append((apic_id, version, flags, signature, features_edx))
            at += 20
            continue
        if kind == 1:
            found.buses[table[at + 1]] = table[at + 2 : at + 8]
        elif kind == 2:
            found.ioapics.append(struct.unpack_from("<BBBI", table, at + 1))
        else:
            (found.interrupts if kind == 3 else found.local).append(struct.unpack_from("<BHBBBB", table, at + 1))
        at += 8
    assert at == size
    assert kinds == sorted(kinds), "section 4.3: in order of their types"
    return found


def placed(platform: Platform) -> Read:
    memory = ram()
    MpTable(platform).place(memory, ())
    return read(memory)


def test_header_names_the_specification_and_the_local_apics() -> None:
    assert placed(Platform()).header == (4, 0, 0, 0xFEE0_0000, 0)


def test_every_processor_is_enabled_and_the_first_one_boots() -> None:
    found = placed(Platform(apic_ids=(0, 1, 2, 3), signature=0xA10F11, features=0x178B_FBFF))
    assert [(apic_id, flags) for apic_id, _, flags, _, _ in found.processors] == [(0, 3), (1, 1), (2, 1), (3, 1)]
    assert {each[1] for each in found.processors} == {0x14}
    assert {each[3:] for each in found.processors} == {(0xA10F11, 0x178B_FBFF)}


def test_apic_ids_of_more_than_eight_bits_and_the_broadcast_id_are_left_out() -> None:
    found = placed(Platform(apic_ids=tuple(range(300))))
    assert [each[0] for each in found.processors] == list(range(255))


def test_isa_interrupts_go_to_the_ioapic_input_of_their_number_the_timer_too() -> None:
    found = placed(Platform())
    assert found.buses == {0: b"ISA   "}
    assert found.ioapics == [(0, 0x11, 1, 0xFEC0_0000)]
    assert found.interrupts == [(0, 0, 0, irq, 0, irq) for irq in range(16) if irq != 2]


def test_lint0_takes_the_pics_and_lint1_nmi_on_all_processors() -> None:
    assert placed(Platform(apic_ids=(0, 1))).local == [(3, 0, 0, 0, 0xFF, 0), (1, 0, 0, 0, 0xFF, 1)]


def test_with_a_host_bridge_pci_is_bus_0() -> None:
    found = placed(Platform(pci=True))
    assert found.buses == {0: b"PCI   ", 1: b"ISA   "}
    assert {each[2] for each in found.interrupts} == {1}


def test_acpis_interrupt_is_level_triggered() -> None:
    flags = {each[3]: each[1] for each in placed(Platform(power=POWER)).interrupts}
    assert flags.pop(9) == 0b1101, "level, active high"
    assert set(flags.values()) == {0}


# where it goes


def test_it_is_reserved_memory_where_operating_systems_look() -> None:
    memory = ram()
    done = MpTable(Platform()).place(memory, ())
    (where,) = done.ranges
    assert (where.address, done.rsdp) == (0xF_0000, 0)
    assert [(entry.address, entry.end, entry.type) for entry in done.memory_map] == [
        (where.address, where.end, E820Type.RESERVED)
    ]


def test_it_goes_around_what_is_there_already() -> None:
    memory = ram()
    done = MpTable(Platform()).place(memory, [LoadedRange(0xF_0000, 0x8001, "something")])
    assert done.ranges[0].address == 0xF_8010
    assert read(memory).address == 0xF_8010


def test_without_room_there_it_takes_the_last_kib_of_base_memory() -> None:
    memory = ram()
    done = MpTable(Platform()).place(memory, [LoadedRange(0xE_0000, 0x2_0000, "a BIOS")])
    assert done.ranges[0].address == 0x9_FC00
    assert memory.read(0x9_FC00, 4) == b"_MP_"


def test_without_room_anywhere_the_error_says_what_to_do() -> None:
    with pytest.raises(ImageError, match=r"MP table: no 0x[0-9a-f]+ bytes are free .* tables=\(\)"):
        MpTable(Platform()).place(ram(), [LoadedRange(0x9_0000, 0x8_0000, "all of it")])


# who gets one


def test_kernels_take_the_machines_tables_unless_they_were_given_others() -> None:
    for kernel in (LinuxKernel(BzImageFile().to_bytes()), MultibootKernel(flat_kernel(header()))):
        assert kernel.takes_tables
        memory = ram()
        entry = kernel.load(memory, [MpTable(Platform())])
        assert read(memory).address == 0xF_0000
        assert any(used.name == "MP table" for used in entry.ranges)
    for tables in ((), [MpTable(Platform(apic_ids=(0, 1)))]):
        for kernel in (
            LinuxKernel(BzImageFile().to_bytes(), tables=tables),
            MultibootKernel(flat_kernel(header()), tables=tables),
        ):
            assert not kernel.takes_tables
            memory = ram()
            kernel.load(memory, [MpTable(Platform())])
            if tables:
                assert len(read(memory).processors) == 2
            else:
                assert b"_MP_" not in memory.read(0xF_0000, 0x1_0000)


def test_a_kernel_that_asks_a_bios_gets_none() -> None:
    assert not LinuxKernel(BzImageFile().to_bytes(), entry="real").takes_tables
    assert not hasattr(FlatImage(b"\xf4"), "takes_tables")


def header() -> bytes:
    return Header1(addresses=(0x10_0008, 0x10_0000, 0, 0x10_1000, 0x10_0028)).to_bytes()
