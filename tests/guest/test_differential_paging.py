"""Page walks against the processor: random tables, real accesses of rings 0 and 3, and KVM_TRANSLATE.

Whatever `walk` and `page_fault` say of an access must happen to it: the same error code and CR2, or the same byte of
memory reached.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import event_delivery_tables as tables
from fuzz_settings import PROFILE
from kvmpy import Hlt, Kvm, MiB, Vcpu
from kvmpy.errors import EntryRefusedError
from kvmpy.exits import Exit
from kvmpy.x86.cpuid import CpuidTable
from kvmpy.x86.event_delivery.event import exception_name
from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags
from kvmpy.x86.page_walk import Access, page_fault, translate, walk
from kvmpy.x86.registers import CpuState

EXAMPLES = 150 if PROFILE == "dev" else 800

CODE, USER_CODE, HANDLERS = 0x6000, 0x7000, 0xC000
PML4, FIXED, PDPT, PD, PT = 0x1_0000, 0x1_1000, 0x1_4000, 0x1_5000, 0x1_6000
"""The top table; three tables that map what every case needs; the tables under test, one of each level."""
FRAME, LARGE_FRAME, SIZE = 0x2_0000, 2 * MiB, 4 * MiB
P, RW, US, PS, XD = 1, 2, 4, 0x80, 1 << 63
IGNORED = 0x7FF0_0000_0000_0E00  # protection keys are off
HLT = 0xF4


@cache
def supported() -> CpuidTable:
    with Kvm() as kvm:
        return kvm.supported_cpuid()


@cache
def physical_bits() -> int:
    widths = supported().find(0x8000_0008)
    return widths.eax & 0xFF if widths else 36


@cache
def takes(bit: Cr4) -> bool:
    """Whether a guest may set a bit of CR4: some hosts take it though CPUID does not offer the feature."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(supported())
        state = state_for(Attempt(), 0)
        state.sregs.cr4 |= bit
        vcpu.set_cpu_state(state)
        try:
            vcpu.get_events()  # any ioctl that sees registers sets those that wait
        except EntryRefusedError:
            return False
        return True


@dataclass(frozen=True)
class Mapping:
    """The four entries that lead to `address`; `large` makes the PDE a 2 MiB page."""

    address: int
    pml4e: int
    pdpte: int
    pde: int
    pte: int
    large: bool


@dataclass(frozen=True)
class Attempt:
    """One access, and what it depends on besides the tables."""

    ring: int = 0
    access: Access = Access.READ
    write_protect: bool = True
    no_execute: bool = True
    smep: bool = False
    smap: bool = False
    alignment_check: bool = False


CODE_OF = {
    Access.READ: b"\x8a\x03\xf4",  # mov al, [rbx]; hlt
    Access.WRITE: b"\x88\x03\xf4",  # mov [rbx], al; hlt
    Access.FETCH: b"\xff\xe3\xf4",  # jmp rbx, to a HLT
}


@contextmanager
def guest(mapping: Mapping) -> Iterator[Vcpu]:
    """A new VM for every mapping: KVM need not notice when somebody else than the guest changes page tables."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=SIZE)
        memory = vm.memory
        prepared = tables.tables()
        for vector in range(32):
            tables.gate64(prepared, vector, offset=HANDLERS + vector)
        memory.write(0, prepared.data)
        memory.write(tables.TSS + 4, struct.pack("<Q", tables.KERNEL_STACK))
        memory.fill(HANDLERS, 32, HLT)
        memory.fill(FRAME, 0x1000, HLT)
        memory.fill(LARGE_FRAME, 2 * MiB, HLT)
        for table in range(3):
            memory.write_u64(PML4 + 0x1000 * table, PML4 + 0x1000 * (table + 1) | P | RW | US)
        for page in range(0, PML4, 0x1000):
            memory.write_u64(FIXED + 0x2000 + 8 * (page >> 12), page | P | RW | (US if page == USER_CODE else 0))
        at = mapping.address
        for table, shift, entry in (
            (PML4, 39, mapping.pml4e), (PDPT, 30, mapping.pdpte), (PD, 21, mapping.pde), (PT, 12, mapping.pte),
        ):  # fmt: skip
            memory.write_u64(table + 8 * (at >> shift & 0x1FF), entry)
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(supported())
        yield vcpu


def state_for(attempt: Attempt, address: int) -> CpuState:
    state = tables.long(attempt.ring)
    regs, sregs = state.regs, state.sregs
    regs.rip = USER_CODE if attempt.ring else CODE
    regs.rbx, regs.rax = address, 0x5A
    regs.rsp = tables.KERNEL_STACK - 0x800
    regs.rflags = 2 | (Rflags.AC if attempt.alignment_check else 0)
    sregs.cr3 = PML4
    sregs.cr0 = sregs.cr0 & ~int(Cr0.WP) | (Cr0.WP if attempt.write_protect else 0)
    sregs.cr4 |= (Cr4.SMEP if attempt.smep else 0) | (Cr4.SMAP if attempt.smap else 0)
    sregs.efer = sregs.efer & ~int(Efer.NXE) | (Efer.NXE if attempt.no_execute else 0)
    return state


def expectation(vcpu: Vcpu, attempt: Attempt, state: CpuState) -> tuple[str, int | None]:
    """What shall happen, in words, and the physical address that is reached."""
    address = state.regs.rbx
    found = walk(
        vcpu.vm.memory, state.sregs, address, physical_bits=physical_bits(), gigabyte_pages=gigabyte_pages_work()
    )
    fault = page_fault(found, state.sregs, attempt.access, user=attempt.ring == 3, rflags=state.regs.rflags)
    if fault is not None:
        return f"#PF, error code {int(fault):#x}, CR2 {address:#x}", None
    return "done", found.physical


def happened(vcpu: Vcpu, event: Exit, attempt: Attempt, state: CpuState) -> str:
    """What did happen, in the same words."""
    if event != Hlt():
        return str(event)
    after = vcpu.cpu_state()
    rip = after.regs.rip - 1
    start = state.regs.rip
    finished = state.regs.rbx if attempt.access is Access.FETCH else start + 2
    if not attempt.ring and rip == finished:
        return "done"
    if not HANDLERS <= rip < HANDLERS + 32:
        return f"HLT at {rip:#x}"
    code, saved_rip = struct.unpack("<QQ", vcpu.vm.memory.read(after.regs.rsp, 16))
    vector = rip - HANDLERS
    if attempt.ring and vector == 13 and (code, saved_rip) == (0, finished):
        return "done"  # HLT in ring 3
    blamed = state.regs.rbx if attempt.access is Access.FETCH else start
    where = "" if saved_rip == blamed else f", RIP {saved_rip:#x}"
    return f"{exception_name(vector)}, error code {code:#x}, CR2 {after.sregs.cr2:#x}{where}"


def compare(vcpu: Vcpu, attempt: Attempt, address: int, value: int) -> None:
    memory = vcpu.vm.memory
    state = state_for(attempt, address)
    state.regs.rax = value
    memory.write(USER_CODE if attempt.ring else CODE, CODE_OF[attempt.access])
    expected, physical = expectation(vcpu, attempt, state)
    before = 0
    if physical is not None and attempt.access is not Access.FETCH:
        before = memory.read_u8(physical)
        memory.write_u8(physical, value ^ 0xFF)
    vcpu.set_cpu_state(state)
    seen = happened(vcpu, vcpu.run(timeout=5), attempt, state)
    story = walk(memory, state.sregs, address, physical_bits=physical_bits())
    assert seen == expected, f"{attempt}\n{story}"
    if physical is not None:
        if attempt.access is Access.WRITE:
            assert memory.read_u8(physical) == value
        elif attempt.access is Access.READ and not attempt.ring:
            assert vcpu.regs.rax & 0xFF == value ^ 0xFF
        if attempt.access is not Access.FETCH:
            memory.write_u8(physical, before)


def canonical(index: int, rest: int) -> int:
    """The address of PML4 entry `index`, with 39 further bits."""
    return (0xFFFF << 48 if index > 255 else 0) | index << 39 | rest


def good_mapping(*, large: bool = False, address: int = canonical(7, 0x12_3456_7ABC & ~0xFFF | 0xABC)) -> Mapping:
    table = P | RW | US
    return Mapping(
        address, PDPT | table, PD | table, (LARGE_FRAME | PS if large else PT) | table, FRAME | table, large=large
    )


@cache
def gigabyte_pages_work() -> bool:
    """Whether a PDPTE can map a page. On kvm_pvm PS is reserved there although CPUID offers 1 GiB pages."""
    mapping = replace(good_mapping(address=canonical(7, 0x2_0123)), pdpte=P | RW | US | PS)
    with guest(mapping) as vcpu:
        vcpu.vm.memory.write(CODE, CODE_OF[Access.READ])
        state = state_for(Attempt(), mapping.address)
        vcpu.set_cpu_state(state)
        return happened(vcpu, vcpu.run(timeout=5), Attempt(), state) == "done"


def test_gigabyte_pages_need_the_feature() -> None:
    assert supported().has("pdpe1gb") or not gigabyte_pages_work()


# Random tables

ONE_IN_8, ONE_IN_16 = st.integers(0, 7).map(lambda n: n == 7), st.integers(0, 15).map(lambda n: n == 15)


@st.composite
def entries(draw: st.DrawFn, target: int, spoilers: list[int]) -> int:
    """An entry that leads to `target`, sometimes with a permission less, or one of the `spoilers`, reserved bits."""
    entry = target | draw(st.integers(0, 2**64 - 1)) & IGNORED
    entry |= 0 if draw(ONE_IN_16) else P
    entry |= 0 if draw(ONE_IN_8) else RW
    entry |= 0 if draw(ONE_IN_8) else US
    entry |= XD if draw(ONE_IN_16) else 0
    spoiled = draw(ONE_IN_16)
    if spoilers and spoiled:
        entry |= draw(st.sampled_from(spoilers))
    return entry


# kvm_pvm keeps one PML4 entry, the lowest of the upper half, to itself: ring 3 takes #PF there whatever the tables say.
# All others from 1 to 511 were compared one by one.
SLOTS = [slot for slot in range(1, 512) if slot != 256 or not Path("/sys/module/kvm_pvm").exists()]


@st.composite
def mappings(draw: st.DrawFn) -> Mapping:
    beyond = [1 << bit for bit in range(physical_bits(), 52)]
    large = draw(st.booleans())
    between = [1 << bit for bit in range(13, 21)]  # in the entry of a large page, below its frame
    leaf_permissions = draw(st.sampled_from([0, 0, US, RW]))  # whole kernels are mapped without US, programs read-only
    mapping = Mapping(
        canonical(draw(st.sampled_from(SLOTS)), draw(st.integers(0, 2**39 - 1))),
        draw(entries(PDPT, [*beyond, PS])),
        draw(entries(PD, [*beyond, PS])),
        draw(entries(LARGE_FRAME | PS if large else PT, beyond + between if large else beyond)),
        draw(entries(FRAME | draw(st.sampled_from([0, PS])), beyond)),
        large,
    )
    name = "pde" if large else "pte"
    return replace(mapping, **{name: getattr(mapping, name) & ~leaf_permissions})


NO_EXECUTE = st.integers(0, 7).map(bool)
ATTEMPTS = st.builds(
    Attempt,
    ring=st.sampled_from([0, 3]),
    access=st.sampled_from(list(Access)),
    write_protect=st.booleans(),
    no_execute=NO_EXECUTE,
    smep=st.booleans().map(lambda on: on and takes(Cr4.SMEP)),
    smap=st.booleans().map(lambda on: on and takes(Cr4.SMAP)),
    alignment_check=st.booleans(),
)


@settings(max_examples=EXAMPLES)
@given(
    mapping=mappings(),
    attempts=st.lists(ATTEMPTS, min_size=1, max_size=6),
    no_execute=NO_EXECUTE,
    value=st.integers(0, 255),
)
def test_random_accesses_through_random_tables(
    mapping: Mapping, attempts: list[Attempt], no_execute: bool, value: int
) -> None:
    with guest(mapping) as vcpu:
        for attempt in attempts:
            # EFER.NXE is the same for the whole VM: kvm_pvm keeps what it derived from the tables for ring 3 when only
            # that bit changes between two runs, and then does not see that XD has become a reserved bit.
            compare(vcpu, replace(attempt, no_execute=no_execute), mapping.address, value)


@pytest.mark.parametrize("large", [False, True], ids=["4 KiB", "2 MiB"])
@pytest.mark.parametrize("lacking", [0, RW, US, RW | US], ids=["all", "no RW", "no US", "neither"])
@pytest.mark.parametrize("no_execute", [False, True], ids=["executable", "XD"])
def test_every_kind_of_access_to_every_kind_of_page(large: bool, lacking: int, no_execute: bool) -> None:
    mapping = good_mapping(large=large)
    name = "pde" if large else "pte"
    entry = getattr(mapping, name) & ~lacking | (XD if no_execute else 0)
    with guest(replace(mapping, **{name: entry})) as vcpu:
        for ring in (0, 3):
            for access in Access:
                for write_protect in (False, True):
                    compare(vcpu, Attempt(ring, access, write_protect), mapping.address, 0x33)


def reserved_bits(level: str, large: bool) -> list[int]:
    """The bits of an entry that must be 0, XD without EFER.NXE included."""
    bits = [XD, *(1 << bit for bit in range(physical_bits(), 52))]
    if level == "pml4e" or (level == "pdpte" and not gigabyte_pages_work()):
        bits.append(PS)
    if level == "pde" and large:
        bits += [1 << bit for bit in range(13, 21)]
    return bits


@pytest.mark.parametrize(
    ("level", "large"), [("pml4e", False), ("pdpte", False), ("pde", False), ("pde", True), ("pte", False)]
)
def test_every_reserved_bit(level: str, large: bool) -> None:
    mapping = good_mapping(large=large)
    for bit in reserved_bits(level, large):
        with guest(replace(mapping, **{level: getattr(mapping, level) | bit})) as vcpu:
            for attempt in (Attempt(no_execute=False), Attempt(3, Access.WRITE, no_execute=False)):
                expected, _ = expectation(vcpu, attempt, state_for(attempt, mapping.address))
                assert f"error code {9 if attempt.ring == 0 else 15:#x}" in expected
                compare(vcpu, attempt, mapping.address, 0x55)


@pytest.mark.parametrize("alignment_check", [False, True], ids=["AC=0", "AC=1"])
@pytest.mark.parametrize("feature", ["smep", "smap"])
@pytest.mark.parametrize("user", [False, True], ids=["supervisor page", "user page"])
def test_smep_and_smap(feature: str, user: bool, alignment_check: bool) -> None:
    if not takes(Cr4[feature.upper()]):
        pytest.skip(f"this host's KVM has no {feature.upper()}")
    mapping = good_mapping()
    with guest(mapping if user else replace(mapping, pte=mapping.pte & ~US)) as vcpu:
        for ring in (0, 3):
            for access in Access:
                attempt = Attempt(ring, access, alignment_check=alignment_check, **{feature: True})
                compare(vcpu, attempt, mapping.address, 0x44)


# KVM_TRANSLATE


@settings(max_examples=EXAMPLES)
@given(mapping=mappings(), attempt=ATTEMPTS)
def test_kvm_translate_finds_the_same(mapping: Mapping, attempt: Attempt) -> None:
    attempt = replace(attempt, ring=0, smap=False)  # KVM looks with the rights of a supervisor that reads
    with guest(mapping) as vcpu:
        state = state_for(attempt, mapping.address)
        vcpu.set_cpu_state(state)
        expected, physical = expectation(vcpu, replace(attempt, access=Access.READ), state)
        answer = vcpu.translate(mapping.address)
        assert bool(answer.valid) == (physical is not None), expected
        if physical is not None:
            assert answer.physical_address == physical
            assert translate(vcpu.vm.memory, state.sregs, mapping.address) == physical


@given(address=st.integers(0, PML4 - 1))
def test_kvm_translate_of_what_every_guest_maps(address: int) -> None:
    with guest(good_mapping()) as vcpu:
        state = state_for(Attempt(), 0)
        vcpu.set_cpu_state(state)
        assert vcpu.translate(address).physical_address == translate(vcpu.vm.memory, state.sregs, address) == address
