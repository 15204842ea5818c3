"""Walking page tables written by hand, bit by bit, and the error codes of every kind of access."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import RegisterValueError, UsageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags
from kvmpy.x86.page_walk import Access, EntryRead, FailureKind, Walk, page_fault, translate, walk
from kvmpy.x86.paging import PageFault, PagingMode, paging_mode
from kvmpy.x86.registers import SystemRegisters

XD = 1 << 63


def ram(entries: dict[int, int], size: int = 8) -> GuestMemory:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, 0x1_0000))
    for address, value in entries.items():
        memory.write(address, value.to_bytes(size, "little"))
    return memory


def registers(cr0: int = Cr0.PE | Cr0.PG, cr4: int = 0, efer: int = 0, cr3: int = 0x1000) -> SystemRegisters:
    sregs = SystemRegisters()
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = cr0, cr3, cr4, efer
    return sregs


LONG = registers(cr4=Cr4.PAE, efer=Efer.LME | Efer.LMA | Efer.NXE)
PAE = registers(cr4=Cr4.PAE, efer=Efer.NXE)
LEGACY = registers(cr4=Cr4.PSE)


@pytest.mark.parametrize(
    ("sregs", "mode"),
    [
        (registers(cr0=Cr0.PE), PagingMode.NONE),
        (registers(), PagingMode.BITS32),
        (registers(cr4=Cr4.PAE), PagingMode.PAE),
        (registers(cr4=Cr4.PAE, efer=Efer.LME | Efer.LMA), PagingMode.LEVEL4),
        (registers(cr4=Cr4.PAE | Cr4.LA57, efer=Efer.LME | Efer.LMA), PagingMode.LEVEL5),
        (registers(cr0=Cr0.PE, cr4=Cr4.PAE, efer=Efer.LME), PagingMode.NONE),
        (registers(cr4=Cr4.PAE | Cr4.LA57), PagingMode.PAE),
    ],
)
def test_the_registers_select_the_mode(sregs: SystemRegisters, mode: PagingMode) -> None:
    assert paging_mode(sregs) is mode


def test_without_paging_addresses_are_physical() -> None:
    found = walk(ram({}), registers(cr0=Cr0.PE), 0xFEE0_0000)
    assert (found.physical, found.entries, found.page_size) == (0xFEE0_0000, (), 0)


def test_a_4_level_walk_reads_these_entries() -> None:
    # 0x0000_5123_4567_8ABC: PML4 0xa2, PDPT 0x8d, PD 0x2b, PT 0x78.
    entries = {0x1510: 0x2007, 0x2468: 0x3007, 0x3158: 0x4007, 0x43C0: 0x0000_0007_8900_0005}
    found = walk(ram(entries), LONG, 0x0000_5123_4567_8ABC)
    assert found.physical == 0x0000_0007_8900_0ABC
    assert [(entry.level, entry.address, entry.value) for entry in found.entries] == [
        ("PML4E", 0x1510, 0x2007),
        ("PDPTE", 0x2468, 0x3007),
        ("PDE", 0x3158, 0x4007),
        ("PTE", 0x43C0, 0x0000_0007_8900_0005),
    ]
    assert (found.page_size, found.writable, found.user, found.executable) == (0x1000, False, True, True)


def test_a_5_level_walk_begins_one_table_higher() -> None:
    entries = {0x1008: 0x2007, 0x2510: 0x3007, 0x3468: 0x4007, 0x4158: 0x5007, 0x53C0: 0x9007}
    sregs = registers(cr4=Cr4.PAE | Cr4.LA57, efer=Efer.LME | Efer.LMA)
    found = walk(ram(entries), sregs, 0x0001_5123_4567_8ABC)
    assert found.physical == 0x9ABC
    assert found.entries[0] == EntryRead("PML5E", 0x1008, 0x2007)


def test_large_pages_end_the_walk_early() -> None:
    memory = ram({0x1000: 0x2007, 0x2000: 0x3007, 0x3008: 0x4060_0087, 0x2008: 0x8000_0087})
    two_mib = walk(memory, LONG, 0x23_4567)
    assert (two_mib.physical, two_mib.page_size, len(two_mib.entries)) == (0x4063_4567, 0x20_0000, 3)
    one_gib = walk(memory, LONG, 0x4765_4321)
    assert (one_gib.physical, one_gib.page_size, len(one_gib.entries)) == (0x8765_4321, 0x4000_0000, 2)


def test_pae_pointers_are_32_byte_aligned() -> None:
    sregs = registers(cr4=Cr4.PAE, efer=Efer.NXE, cr3=0x1020)
    found = walk(ram({0x1038: 0x2001, 0x2008: XD | 0x40_0083}), sregs, 0xC020_1234)
    assert (found.physical, found.writable, found.user, found.executable) == (0x40_1234, True, False, False)


def test_32_bit_paging_ignores_ps_without_pse() -> None:
    memory = ram({0x1000: 0x2087, 0x2000: 0x9007}, size=4)
    assert walk(memory, registers(), 0).physical == 0x9000
    assert walk(memory, LEGACY, 0).physical == 1 << 32  # a 4 MiB page now, whose bit 13 is address bit 32


def test_pse36_puts_high_address_bits_into_13_to_20() -> None:
    entry = 0x8140_0087 | 0xA5 << 13
    memory = ram({0x1000: entry}, size=4)
    assert walk(memory, LEGACY, 0x12_3456).physical == 0xA5_8152_3456
    narrow = walk(memory, LEGACY, 0, physical_bits=36)
    assert narrow.failure is not None
    assert (narrow.failure.kind, narrow.failure.reserved) == (FailureKind.RESERVED, 0xA0 << 13)


def test_linear_addresses_wrap_at_4_gib_in_32_bit_modes() -> None:
    memory = ram({0x1000: 0x87}, size=4)
    assert translate(memory, LEGACY, 0x1_0000_0123) == 0x123


@pytest.mark.parametrize("address", [1 << 47, 0xFFFF_7FFF_FFFF_FFFF, 1 << 63])
def test_addresses_that_are_not_canonical_have_no_translation(address: int) -> None:
    found = walk(ram({}), LONG, address)
    assert found.failure is not None
    assert found.failure.kind is FailureKind.NOT_CANONICAL
    with pytest.raises(UsageError, match="#GP"):
        page_fault(found, LONG)


def test_addresses_over_64_bits_are_the_callers_mistake() -> None:
    for address in (-1, 1 << 64):
        with pytest.raises(RegisterValueError):
            walk(ram({}), LONG, address)


@pytest.mark.parametrize("missing", range(4))
def test_the_level_that_is_not_present_is_named(missing: int) -> None:
    values = [0x2007, 0x3007, 0x4007, 0x5007]
    values[missing] &= ~1
    found = walk(ram(dict(zip((0x1000, 0x2000, 0x3000, 0x4000), values, strict=True))), LONG, 0)
    assert found.failure is not None
    assert (found.failure.kind, found.failure.level) == (
        FailureKind.NOT_PRESENT,
        ("PML4E", "PDPTE", "PDE", "PTE")[missing],
    )
    assert len(found.entries) == missing + 1
    assert page_fault(found, LONG, Access.WRITE, user=True) == PageFault.W | PageFault.U


def test_a_table_outside_memory_is_told() -> None:
    found = walk(ram({0x1000: 0x8000_0007}), LONG, 0)
    assert found.failure is not None
    assert (found.failure.kind, found.failure.level) == (FailureKind.OUTSIDE_MEMORY, "PDPTE")
    assert "PDPTE table outside memory" in str(found)
    assert page_fault(found, LONG) == PageFault(0)


@pytest.mark.parametrize(
    ("sregs", "entries", "level", "reserved"),
    [
        (LONG, {0x1000: 0x2087}, "PML4E", 0x80),
        (LONG, {0x1000: 0x2007, 0x2000: 0x4000_2087}, "PDPTE", 0x2000),
        (LONG, {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x10_0087}, "PDE", 0x10_0000),
        (PAE, {0x1000: 0x2003}, "PDPTE", 2),
        (PAE, {0x1000: 0x21E1}, "PDPTE", 0x1E0),
        (PAE, {0x1000: 0x2001, 0x2000: 1 << 62 | 0x3007}, "PDE", 1 << 62),
        (registers(cr4=Cr4.PAE), {0x1000: 0x2001, 0x2000: XD | 0x87}, "PDE", XD),
        (registers(cr4=Cr4.PAE, efer=Efer.LMA | Efer.LME), {0x1000: XD | 0x2007}, "PML4E", XD),
    ],
)
def test_reserved_bits_are_named_with_their_level(
    sregs: SystemRegisters, entries: dict[int, int], level: str, reserved: int
) -> None:
    found = walk(ram(entries), sregs, 0)
    assert found.failure is not None
    assert (found.failure.kind, found.failure.level, found.failure.reserved) == (FailureKind.RESERVED, level, reserved)
    assert page_fault(found, sregs) == PageFault.P | PageFault.RSVD


def test_bits_beyond_the_processors_address_width_are_reserved() -> None:
    memory = ram({0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 1 << 40 | 0x87})
    assert walk(memory, LONG, 0, physical_bits=41).physical == 1 << 40
    found = walk(memory, LONG, 0, physical_bits=40)
    assert found.failure is not None
    assert found.failure.reserved == 1 << 40


def test_ps_in_a_pdpte_is_reserved_without_1_gib_pages() -> None:
    found = walk(ram({0x1000: 0x2007, 0x2000: 0x87}), LONG, 0, gigabyte_pages=False)
    assert found.failure is not None
    assert (found.failure.level, found.failure.reserved) == ("PDPTE", 0x80)


def test_pat_of_a_large_page_is_neither_reserved_nor_address() -> None:
    memory = ram({0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x40_1087, 0x2008: 0x8000_1087})
    assert translate(memory, LONG, 0x123) == 0x40_0123
    assert translate(memory, LONG, 0x4000_0123) == 0x8000_0123


def test_entries_that_are_not_present_have_no_reserved_bits() -> None:
    found = walk(ram({0x1000: 0xFFFF_FFFF_FFFF_FFFE}), LONG, 0)
    assert found.failure is not None
    assert found.failure.kind is FailureKind.NOT_PRESENT


@pytest.mark.parametrize("level", range(4))
def test_every_level_can_take_away_a_permission(level: int) -> None:
    def permissions(change: int) -> tuple[bool, bool, bool]:
        values = [0x2007, 0x3007, 0x4007, 0x5007]
        values[level] ^= change
        found = walk(ram(dict(zip((0x1000, 0x2000, 0x3000, 0x4000), values, strict=True))), LONG, 0)
        return found.writable, found.user, found.executable

    assert permissions(0) == (True, True, True)
    assert permissions(2) == (False, True, True)
    assert permissions(4) == (True, False, True)
    assert permissions(XD) == (True, True, False)


def test_global_counts_only_with_pge() -> None:
    memory = ram({0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x187})
    assert not walk(memory, LONG, 0).global_page
    assert walk(memory, registers(cr4=Cr4.PAE | Cr4.PGE, efer=Efer.LMA | Efer.LME), 0).global_page


def page(*, writable: bool = True, user: bool = True, executable: bool = True) -> Walk:
    mode = PagingMode.LEVEL4
    return Walk(0, mode, (), 0, page_size=0x1000, writable=writable, user=user, executable=executable)


def sregs_with(*, wp: bool = False, smep: bool = False, smap: bool = False, nxe: bool = True) -> SystemRegisters:
    return registers(
        cr0=Cr0.PE | Cr0.PG | (Cr0.WP if wp else 0),
        cr4=Cr4.PAE | (Cr4.SMEP if smep else 0) | (Cr4.SMAP if smap else 0),
        efer=Efer.LMA | Efer.LME | (Efer.NXE if nxe else 0),
    )


P, W, U, ID = PageFault.P, PageFault.W, PageFault.U, PageFault.ID


@pytest.mark.parametrize(
    ("found", "access", "user", "expected"),
    [
        (page(), Access.READ, True, None),
        (page(), Access.WRITE, True, None),
        (page(), Access.FETCH, True, None),
        (page(user=False), Access.READ, True, P | U),
        (page(user=False), Access.WRITE, True, P | W | U),
        (page(user=False), Access.FETCH, True, P | U | ID),
        (page(writable=False), Access.WRITE, True, P | W | U),
        (page(writable=False), Access.READ, True, None),
        (page(executable=False), Access.FETCH, True, P | U | ID),
        (page(executable=False), Access.READ, True, None),
        (page(user=False), Access.WRITE, False, None),
        (page(user=False, executable=False), Access.FETCH, False, P | ID),
        (page(), Access.FETCH, False, None),
    ],
)
def test_error_codes_without_extensions(found: Walk, access: Access, user: bool, expected: PageFault | None) -> None:
    assert page_fault(found, sregs_with(), access, user=user) == expected


def test_wp_makes_the_supervisor_obey_read_only_pages() -> None:
    for user_page in (False, True):
        read_only = page(writable=False, user=user_page)
        assert page_fault(read_only, sregs_with(wp=False), Access.WRITE) is None
        assert page_fault(read_only, sregs_with(wp=True), Access.WRITE) == P | W
        assert page_fault(read_only, sregs_with(wp=True), Access.READ) is None


def test_smep_forbids_fetches_from_user_pages() -> None:
    assert page_fault(page(), sregs_with(smep=True), Access.FETCH) == P | ID
    assert page_fault(page(user=False), sregs_with(smep=True), Access.FETCH) is None
    assert page_fault(page(), sregs_with(smep=True), Access.READ) is None
    assert page_fault(page(), sregs_with(smep=True), Access.FETCH, user=True) is None


def test_smap_forbids_data_in_user_pages_unless_ac_is_set() -> None:
    sregs = sregs_with(smap=True)
    assert page_fault(page(), sregs, Access.READ) == P
    assert page_fault(page(), sregs, Access.WRITE) == P | W
    assert page_fault(page(), sregs, Access.READ, rflags=Rflags.AC) is None
    assert page_fault(page(), sregs, Access.READ, rflags=Rflags.AC, implicit=True) == P
    assert page_fault(page(), sregs, Access.FETCH) is None
    assert page_fault(page(), sregs, Access.READ, user=True) is None
    assert page_fault(page(user=False), sregs, Access.READ) is None


def test_implicit_accesses_are_the_supervisors_at_any_privilege() -> None:
    assert page_fault(page(user=False), sregs_with(), Access.READ, user=True, implicit=True) is None


def test_the_fetch_bit_needs_nxe_or_smep() -> None:
    """SDM vol. 3, 4.7: otherwise a fetch looks like a read."""
    supervisor_page = page(user=False)
    assert page_fault(supervisor_page, sregs_with(nxe=False), Access.FETCH, user=True) == P | U
    assert page_fault(supervisor_page, sregs_with(nxe=False, smep=True), Access.FETCH, user=True) == P | U | ID
    assert page_fault(supervisor_page, sregs_with(nxe=True), Access.FETCH, user=True) == P | U | ID
    legacy = registers(efer=Efer.NXE)  # without PAE, NXE has no effect
    assert page_fault(supervisor_page, legacy, Access.FETCH, user=True) == P | U


def test_all_accesses_are_allowed_without_paging() -> None:
    sregs = registers(cr0=Cr0.PE)
    found = walk(ram({}), sregs, 0x1234)
    for access, user in itertools.product(Access, (False, True)):
        assert page_fault(found, sregs, access, user=user) is None


def test_a_walk_prints_its_entries_and_its_end() -> None:
    text = str(walk(ram({0x1000: 0x2007, 0x2000: 0x3007, 0x3000: XD | 0x85}), LONG, 0x1234))
    assert "PML4E at 0x1000: 0x0000000000002007 P RW US" in text
    assert "PDE   at 0x3000: 0x8000000000000085 P US PS XD" in text
    assert text.endswith("physical 0x1234, page of 0x200000 bytes, user r--")
    assert str(walk(ram({}), LONG, 0)).endswith("PML4E not present")


@given(
    st.lists(st.integers(0, (1 << 64) - 1), min_size=512, max_size=512),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([LONG, PAE, LEGACY, registers(cr4=Cr4.PAE | Cr4.LA57, efer=Efer.LMA)]),
)
def test_no_table_makes_the_walk_raise(values: list[int], address: int, sregs: SystemRegisters) -> None:
    memory = ram({0x1000 + 8 * place: value & 0x8000_0000_0000_FFFF | 1 for place, value in enumerate(values)})
    found = walk(memory, sregs, address)
    assert (found.physical is None) == (found.failure is not None)
    str(found)
