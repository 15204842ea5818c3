"""The rules of KVM_SET_SREGS against KVM_SET_SREGS: a state is refused exactly when it breaks one.

Two hosts' ways are probed and allowed for, never assumed:

* Older kernels do not judge EFER (`NEWER_KERNELS_ONLY`).
* A KVM without VT-x or AMD-V below it (kvm_pvm) answers CPUID leaves 7 and 0xD with the host's values whatever
  KVM_SET_CPUID2 said, and so takes CR4 bits whose feature the table lacks: `FEATURES_OF_THE_HOST`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entry_rule_breaks import GOOD_STATES, KVM_BREAKS, NEWER_KERNELS_ONLY, Break
from fuzz_settings import PROFILE
from kvmpy import Kvm, Vcpu
from kvmpy._value import replace
from kvmpy.errors import EntryRefusedError, KvmError
from kvmpy.kvm.processor_limits import limits_of
from kvmpy.x86 import modes
from kvmpy.x86.cpuid import CpuidEntry, CpuidTable
from kvmpy.x86.entry_rules import KVM, KVM_CR4, ProcessorLimits, violations
from kvmpy.x86.flags import Cr0, Cr4, Efer
from kvmpy.x86.registers import SEGMENT_REGISTERS, CpuState

FEATURES_OF_THE_HOST = Cr4.UMIP | Cr4.FSGSBASE | Cr4.OSXSAVE | Cr4.SMEP | Cr4.SMAP | Cr4.PKE
"""CR4 bits that a kvm_pvm host takes by its own CPUID, not by the vCPU's."""

FEATURES_TO_HIDE = {
    Cr4.UMIP: "umip", Cr4.LA57: "la57", Cr4.FSGSBASE: "fsgsbase", Cr4.PCIDE: "pcid", Cr4.OSXSAVE: "xsave",
    Cr4.SMEP: "smep", Cr4.SMAP: "smap", Cr4.PKE: "pku",
}  # fmt: skip
WIDTHS = 0x8000_0008


@contextmanager
def vcpu_with(table: CpuidTable | None) -> Iterator[Vcpu]:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x10000)
        vcpu = vm.create_vcpu()
        if table is not None:
            vcpu.set_cpuid(table)
        yield vcpu


@cache
def supported() -> CpuidTable:
    with Kvm() as kvm:
        return kvm.supported_cpuid()


def table_for(limits: ProcessorLimits) -> CpuidTable:
    """What the host supports, less what `limits` takes away from the widest processor there is."""
    table = supported().copy()
    for bit, name in FEATURES_TO_HIDE.items():
        if not limits.cr4 & bit:
            table.clear(name)
    if not limits.efer & Efer.NXE:
        table.clear("nx")
    if not limits.x2apic:
        table.clear("x2apic")
    widths = table.find(WIDTHS) or CpuidEntry(WIDTHS, eax=0x3030)
    bits = min(limits.physical_address_bits, widths.eax & 0xFF)
    table.put(replace(widths, eax=widths.eax & ~0xFF | bits))
    return table


def set_sregs(vcpu: Vcpu, state: CpuState) -> EntryRefusedError | None:
    """KVM_SET_SREGS with `state`: the refusal, or None."""
    vcpu.set_cpu_state(state)
    try:
        vcpu.get_events()  # an ioctl that sees registers: dirty ones go first
    except EntryRefusedError as error:
        return error
    return None


@cache
def judges_efer() -> bool:
    """Whether this kernel refuses an EFER bit that no processor has."""
    with vcpu_with(supported()) as vcpu:
        state = modes.real_mode()
        state.sregs.efer = 1 << 1
        vcpu.set_cpu_state(state)
        try:
            vcpu.get_events()
        except KvmError:
            return True
        return False


@cache
def taken_whatever_cpuid_says() -> int:
    """The CR4 bits that a vCPU without any CPUID may set although they need a feature."""
    taken = 0
    with vcpu_with(None) as vcpu:
        for bit in Cr4:
            state = modes.real_mode()
            state.sregs.cr4 |= bit
            if limits_of(vcpu.get_cpuid()).cr4 & bit:
                continue
            vcpu.set_cpu_state(state)
            try:
                vcpu.get_events()
            except KvmError:
                continue
            taken |= int(bit)
    return taken


def broken_rules(vcpu: Vcpu, state: CpuState) -> set[str]:
    """What `violations` says of `state` on this vCPU, on this host."""
    limits = limits_of(vcpu.get_cpuid())
    limits = replace(limits, cr4=limits.cr4 | taken_whatever_cpuid_says())
    broken = {violation.rule for violation in violations(state, sets=(KVM,), processor=limits)}
    return broken if judges_efer() else broken - NEWER_KERNELS_ONLY


def test_this_host_ignores_cpuid_for_no_other_cr4_bits_than_the_known_ones() -> None:
    assert taken_whatever_cpuid_says() & ~FEATURES_OF_THE_HOST == 0


@pytest.mark.parametrize("name", GOOD_STATES)
def test_good_states_are_taken(name: str) -> None:
    state = GOOD_STATES[name]()
    with vcpu_with(supported()) as vcpu:
        assert set_sregs(vcpu, state) is None
        assert broken_rules(vcpu, state) == set()


def test_a_vcpu_without_cpuid_takes_the_states_that_need_no_feature() -> None:
    with vcpu_with(None) as vcpu:
        for name in ("real", "reset", "protected", "virtual-8086"):
            assert set_sregs(vcpu, GOOD_STATES[name]()) is None, name


@pytest.mark.parametrize("case", KVM_BREAKS, ids=lambda case: case.rule)
def test_a_broken_rule_is_refused_and_named(case: Break) -> None:
    with vcpu_with(table_for(case.limits)) as vcpu:
        if case.rule in NEWER_KERNELS_ONLY and not judges_efer():
            assert set_sregs(vcpu, case.broken) is None
            pytest.skip("this kernel does not judge EFER in KVM_SET_SREGS")
        assert case.rule in broken_rules(vcpu, case.broken), "the CPUID of this case does not bring its limits about"
        error = set_sregs(vcpu, case.broken)
        assert error is not None
        assert error.ioctl == "KVM_SET_SREGS"
        assert {violation.rule for violation in error.violations} - NEWER_KERNELS_ONLY == {case.rule}
        assert set_sregs(vcpu, case.good()) is None  # nothing of it has stayed


@pytest.mark.parametrize("case", [case for case in KVM_BREAKS if case.rule not in NEWER_KERNELS_ONLY],
                         ids=lambda case: case.rule)  # fmt: skip
def test_the_same_refusal_comes_from_kvm_run(case: Break) -> None:
    with vcpu_with(table_for(case.limits)) as vcpu:
        vcpu.vm.memory.write(0x7C00, b"\xf4")
        vcpu.set_cpu_state(case.broken)
        with pytest.raises(EntryRefusedError) as refused:
            vcpu.run(timeout=2)
        assert {violation.rule for violation in refused.value.violations} - NEWER_KERNELS_ONLY == {case.rule}


# Random states: a good one, and then changes to what the ioctl judges and to what it does not.

SINGLE_BITS = st.integers(0, 63).map(lambda bit: 1 << bit)
INTERESTING = {
    "cr0": st.one_of(st.sampled_from([int(bit) for bit in Cr0]), SINGLE_BITS),
    "cr4": st.one_of(st.sampled_from([int(bit) for bit in Cr4]), SINGLE_BITS),
    "efer": st.one_of(st.sampled_from([int(bit) for bit in Efer]), SINGLE_BITS),
    "cr3": SINGLE_BITS,
    "apic_base": st.one_of(st.sampled_from([1 << 8, 1 << 10, 1 << 11, 3 << 10]), SINGLE_BITS),
    "cr2": st.integers(0, 2**64 - 1),
    "cr8": st.integers(0, 2**64 - 1),
}
Change = Callable[[CpuState], None]


def flip(register: str, bits: int) -> Change:
    return lambda state: setattr(state.sregs, register, getattr(state.sregs, register) ^ bits)


def change_segment(name: str, field: str, value: int) -> Change:
    return lambda state: setattr(state.sregs, name, getattr(state.sregs, name).replace(**{field: value}))


FLIPS = st.sampled_from(sorted(INTERESTING)).flatmap(lambda name: st.builds(flip, st.just(name), INTERESTING[name]))
LONG_CODE = st.builds(change_segment, st.just("cs"), st.just("l"), st.integers(0, 1))
FIELD_BITS = {"base": 64, "limit": 32, "type": 4, "present": 1, "s": 1, "db": 1, "g": 1, "unusable": 1}
SEGMENTS = st.sampled_from(sorted(FIELD_BITS)).flatmap(
    lambda field: st.builds(
        change_segment,
        st.sampled_from(SEGMENT_REGISTERS),
        st.just(field),
        st.integers(0, (1 << FIELD_BITS[field]) - 1),
    )
)
CHANGES = st.lists(st.one_of(FLIPS, FLIPS, LONG_CODE, SEGMENTS), max_size=5)
HIDDEN = st.sets(st.sampled_from(sorted(FEATURES_TO_HIDE)), max_size=3)


@pytest.fixture(scope="module")
def plain() -> Iterator[Vcpu]:
    with vcpu_with(supported()) as vcpu:
        yield vcpu


@settings(max_examples=300 if PROFILE == "dev" else 3000)
@given(name=st.sampled_from(sorted(GOOD_STATES)), changes=CHANGES)
def test_random_states_are_refused_exactly_when_they_break_a_rule(
    plain: Vcpu, name: str, changes: list[Change]
) -> None:
    state = GOOD_STATES[name]()
    for change in changes:
        change(state)
    expected = broken_rules(plain, state)
    error = set_sregs(plain, state)
    assert (error is not None) == bool(expected), (error, expected)
    if error is not None:
        named = {violation.rule for violation in error.violations}
        assert expected <= named
        assert named - expected <= NEWER_KERNELS_ONLY | {"kvm.cr4.bits"}  # broken, but this host does not mind


@given(hidden=HIDDEN, bits=st.integers(0, 2**64 - 1).map(lambda bits: bits & KVM_CR4), width=st.integers(36, 48))
def test_random_cpuid_decides_about_cr4_and_cr3(hidden: set[int], bits: int, width: int) -> None:
    cut = ~sum(hidden)
    with vcpu_with(table_for(ProcessorLimits(cr4=KVM_CR4 & cut, physical_address_bits=width))) as vcpu:
        state = modes.long_mode(0x1000, 0x2000)
        for cr4, cr3 in ((state.sregs.cr4 | bits, 0), (state.sregs.cr4, 1 << 43), (state.sregs.cr4, 1 << width)):
            state.sregs.cr4, state.sregs.cr3 = cr4, cr3
            expected = broken_rules(vcpu, state)
            error = set_sregs(vcpu, state)
            assert (error is not None) == bool(expected), (error, expected)
