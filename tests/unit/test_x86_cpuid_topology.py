"""CPUID of a machine's processors, decoded as an operating system does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_topology_decoding import (
    Cpuid,
    Place,
    by_amd_leaves,
    by_extended_topology,
    by_leaf_4,
    caches,
    initial_apic_id,
    processors_of_package,
)
from kvmpy.x86.cpuid_leaves import EAX, EBX, ECX, EDX, CpuidLeaves
from kvmpy.x86.cpuid_platform import (
    describe_clocks,
    has_hypercall_features,
    hide_hypercall_features,
    set_local_apic,
)
from kvmpy.x86.cpuid_topology import describe_processors, stamp_apic_id

Row = tuple[int, int, int, int, int, int, int]
INTEL = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)
AMD = (0x6874_7541, 0x444D_4163, 0x6974_6E65)
KVM = (0x4B4D_564B, 0x564B_4D56, 0x4D)
COUNTS = [1, 2, 3, 4, 5, 8]


def intel_host() -> CpuidLeaves:
    """A package of 10 cores with two threads each, as KVM_GET_SUPPORTED_CPUID tells of it."""
    ebx, ecx, edx = INTEL
    return CpuidLeaves(
        [
            (0, 0, 0, 0x1F, ebx, ecx, edx),
            (1, 0, 0, 0x50657, 0x0B20_0800, 0x8000_0000, 0x1000_0000),
            (4, 0, 1, 0x2400_4121, 0x01C0_003F, 0x3F, 0),  # data, level 1, two threads
            (4, 1, 1, 0x2400_4122, 0x01C0_003F, 0x3F, 0),  # code, level 1
            (4, 2, 1, 0x2400_4143, 0x03C0_003F, 0x3FF, 0),  # level 2
            (4, 3, 1, 0x2407_C163, 0x02C0_003F, 0x3FFF, 4),  # level 3, all
            (4, 4, 1, 0, 0, 0, 0),
            (7, 0, 1, 0, 1 << 20, 1 << 4, 0),
            (0xB, 0, 1, 1, 2, 0x100, 11),
            (0xB, 1, 1, 5, 20, 0x201, 11),
            (0x15, 0, 0, 2, 200, 0, 0),
            (0x16, 0, 0, 2500, 3900, 100, 0),
            (0x4000_0000, 0, 0, 0x4000_0001, *KVM),
            (0x4000_0001, 0, 0, 0x0100_7EFB, 0, 0, 0),
            (0x8000_0000, 0, 0, 0x8000_0008, 0, 0, 0),
            (0x8000_0007, 0, 0, 0, 0, 0, 0x100),
            (0x8000_0008, 0, 0, 0x302E, 0, 0, 0),
        ]
    )


def amd_host() -> CpuidLeaves:
    """A package of 8 cores with two threads each, on a processor with topology extensions."""
    ebx, ecx, edx = AMD
    return CpuidLeaves(
        [
            (0, 0, 0, 0x10, ebx, ecx, edx),
            (1, 0, 0, 0xA20F10, 0x0510_0800, 0x8000_0000, 0x1000_0000),
            (0xB, 0, 1, 1, 2, 0x100, 5),
            (0xB, 1, 1, 4, 16, 0x201, 5),
            (0x4000_0000, 0, 0, 0x4000_0001, *KVM),
            (0x4000_0001, 0, 0, 0x0100_7EFB, 0, 0, 0),
            (0x8000_0000, 0, 0, 0x8000_0026, ebx, ecx, edx),
            (0x8000_0001, 0, 0, 0xA20F10, 0x2000_0000, 0x0040_0002, 0),
            (0x8000_0007, 0, 0, 0, 0, 0, 0x100),
            (0x8000_0008, 0, 0, 0x3030, 0x1234_5678, 0x0001_400F, 0x10007),
            (0x8000_001D, 0, 1, 0x0000_4121, 0x01C0_003F, 0x3F, 0),
            (0x8000_001D, 1, 1, 0x0000_4122, 0x01C0_003F, 0x3F, 0),
            (0x8000_001D, 2, 1, 0x0000_4143, 0x01C0_003F, 0x3FF, 2),
            (0x8000_001D, 3, 1, 0x0003_C163, 0x03C0_003F, 0x7FFF, 1),
            (0x8000_001E, 0, 0, 5, 0x102, 0, 0),
            (0x8000_0026, 0, 1, 1, 2, 0x100, 5),
            (0x8000_0026, 1, 1, 4, 16, 0x201, 5),
        ]
    )


HOSTS = {"Intel": intel_host, "AMD": amd_host}


def asked(leaves: CpuidLeaves) -> Cpuid:
    """The processor with these leaves, as KVM answers for it: what is missing is zero."""
    packed = CpuidLeaves.unpack(leaves.pack())

    def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        row = packed.get(leaf, subleaf)
        unindexed = packed.get(leaf, 0)
        if row is None and unindexed is not None and not unindexed[4]:
            row = unindexed
        return (0, 0, 0, 0) if row is None else (row[EAX], row[EBX], row[ECX], row[EDX])

    return cpuid


def processors(leaves: CpuidLeaves, count: int) -> list[Cpuid]:
    describe_processors(leaves, count)
    found = []
    for apic_id in range(count):
        stamp_apic_id(leaves, apic_id)
        found.append(asked(leaves))
    return found


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("host", HOSTS)
def test_each_processor_is_a_core_of_one_package(host: str, count: int) -> None:
    cpus = processors(HOSTS[host](), count)
    cores = [Place(0, number, 0) for number in range(count)]
    assert [by_extended_topology(cpu) for cpu in cpus] == cores
    assert [initial_apic_id(cpu) for cpu in cpus] == list(range(count))
    if host == "AMD":
        assert [by_amd_leaves(cpu) for cpu in cpus] == cores
        assert processors_of_package(cpus[0]) == count
        assert cpus[0](0x8000_0008, 0)[2] & 0xFF == count - 1
    else:
        assert [by_extended_topology(cpu, 0x1F) for cpu in cpus] == cores
        assert [by_leaf_4(cpu) for cpu in cpus] == cores
        assert count <= processors_of_package(cpus[0]) < 2 * count


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("host", "leaf"), [("Intel", 4), ("AMD", 0x8000_001D)])
def test_first_and_second_level_caches_are_a_processors_own_and_the_third_is_shared(
    host: str, leaf: int, count: int
) -> None:
    cpus = processors(HOSTS[host](), count)
    found = [list(caches(cpu, leaf, apic_id)) for apic_id, cpu in enumerate(cpus)]
    assert [[(cache.level, cache.kind) for cache in each] for each in found] == [
        [(1, 1), (1, 2), (2, 3), (3, 3)]
    ] * count
    for number in range(3):
        assert len({each[number].shared_by for each in found}) == count
    assert {each[3].shared_by for each in found} == {0}


@pytest.mark.parametrize("host", HOSTS)
def test_one_processor_alone_has_no_siblings(host: str) -> None:
    (cpu,) = processors(HOSTS[host](), 1)
    assert not cpu(1, 0)[3] >> 28 & 1
    assert processors_of_package(cpu) == 1
    assert cpu(0xB, 1)[:2] == (0, 1)
    if host == "AMD":
        assert not cpu(0x8000_0001, 0)[2] & 2  # CmpLegacy


def test_what_says_nothing_of_topology_stays() -> None:
    for host in HOSTS.values():
        leaves, before = host(), {(row[0], row[1]): row for row in host()}
        describe_processors(leaves, 6)
        topological = {1, 4, 0xB, 0x1F, 0x8000_0001, 0x8000_0008, 0x8000_001D, 0x8000_001E, 0x8000_0026}
        assert [row for row in leaves if row[0] not in topological] == [
            row for key, row in before.items() if key[0] not in topological
        ]
        first, sizes = leaves.get(1), leaves.get(0x8000_0008)
        assert first is not None
        assert sizes is not None
        assert first[EBX] & 0xFF00 == 0x0800  # the line that CLFLUSH writes back
        assert sizes[EAX] == before[0x8000_0008, 0][3]
        assert sizes[EBX] == before[0x8000_0008, 0][4]


def test_sizes_and_types_of_caches_stay() -> None:
    leaves = intel_host()
    before = {index: list(row) for index, row in leaves.subleaves(4).items()}
    describe_processors(leaves, 4)
    for index, row in leaves.subleaves(4).items():
        assert row[EBX:] == before[index][EBX:]
        assert row[EAX] & 0x3FFF == before[index][EAX] & 0x3FFF


def test_an_old_processor_gets_no_leaves_above_its_highest() -> None:
    leaves = intel_host()
    first = leaves.get(0)
    assert first is not None
    first[EAX] = 4
    (cpu, *_) = processors(leaves, 3)
    assert by_extended_topology(cpu) is None
    assert cpu(0xB, 0) == (0, 0, 0, 0)


def test_describing_twice_is_describing_once() -> None:
    for host in HOSTS.values():
        once, twice = host(), host()
        describe_processors(once, 3)
        describe_processors(twice, 8)
        describe_processors(twice, 3)
        assert sorted(once) == sorted(twice)


u32 = st.integers(0, (1 << 32) - 1)
leaf_numbers = st.sampled_from(
    [0, 1, 4, 7, 0xB, 0xD, 0x15, 0x1F, 0x4000_0000, 0x8000_0000, 0x8000_0001, 0x8000_0008, 0x8000_001D, 0x8000_001E]
)
any_rows = st.lists(st.tuples(leaf_numbers, st.integers(0, 4), st.sampled_from([0, 1]), u32, u32, u32, u32))


@given(any_rows, st.integers(1, 1024), st.integers(0, 1023), st.sampled_from([INTEL, AMD]), u32)
def test_any_host_gives_registers_of_32_bits_and_the_right_core(
    rows: list[Row], count: int, apic_id: int, vendor: tuple[int, int, int], highest: int
) -> None:
    ebx, ecx, edx = vendor
    leaves = CpuidLeaves([(0, 0, 0, highest, ebx, ecx, edx), *rows])
    set_local_apic(leaves, True, True)
    describe_processors(leaves, count)
    describe_clocks(leaves, 4_294_967, 1_000_000)
    hide_hypercall_features(leaves)
    apic_id %= count
    stamp_apic_id(leaves, apic_id)
    CpuidLeaves.unpack(leaves.pack())  # struct refuses what has more bits
    if highest >= 0xB:
        assert by_extended_topology(asked(leaves)) == Place(0, apic_id, 0)


# The platform


def test_frequencies_are_told_where_they_are_known() -> None:
    for host in HOSTS.values():
        leaves = host()
        describe_clocks(leaves, 2_500_123, 1_000_000)
        cpu = asked(leaves)
        assert cpu(0x4000_0000, 0) == (0x4000_0010, *KVM)
        assert cpu(0x4000_0010, 0) == (2_500_123, 1_000_000, 0, 0)


def test_intels_ratio_of_clocks_gives_both_frequencies() -> None:
    leaves = intel_host()
    describe_clocks(leaves, 2_500_123, 1_000_000)
    denominator, numerator, crystal, _ = asked(leaves)(0x15, 0)
    assert crystal * numerator // denominator == 2_500_123_000
    assert crystal == 1_000_000_000
    assert asked(leaves)(0x16, 0) == (2500, 2500, 100, 0)
    amd = amd_host()
    describe_clocks(amd, 2_500_123, 1_000_000)
    assert asked(amd)(0x15, 0) == (0, 0, 0, 0)


@pytest.mark.parametrize(("leaf", "register", "bit"), [(0x8000_0007, EDX, 8), (1, ECX, 31)])
def test_no_frequency_is_told_of_a_tsc_that_changes_or_by_a_hypervisor_that_hides(
    leaf: int, register: int, bit: int
) -> None:
    leaves = amd_host()
    row = leaves.get(leaf)
    assert row is not None
    row[register] &= ~(1 << bit)
    describe_clocks(leaves, 2_500_123, 1_000_000)
    assert leaves.get(0x4000_0010) is None
    assert leaves.highest(0x4000_0000) == 0x4000_0001


def test_without_a_local_apic_nothing_of_it_is_announced() -> None:
    leaves = intel_host()
    first, features = leaves.get(1), leaves.get(0x4000_0001)
    assert first is not None
    assert features is not None
    first[ECX] |= 1 << 21 | 1 << 24 | 1 << 27
    first[EDX] |= 1 << 9
    set_local_apic(leaves, False, True)
    assert first[ECX] & (1 << 21 | 1 << 24 | 1 << 27) == 0
    assert first[EDX] & 1 << 9 == 0
    assert features[EAX] & (1 << 6 | 1 << 7 | 1 << 11 | 1 << 14) == 0
    assert features[EAX] & 1
    set_local_apic(leaves, True, True)
    assert first[ECX] & 1 << 24


def test_hypercall_features_are_those_of_the_documentation() -> None:
    # Documentation/virt/kvm/x86/cpuid.rst: PV_UNHALT 7, PV_SEND_IPI 11, PV_SCHED_YIELD 13.
    leaves = intel_host()
    assert has_hypercall_features(leaves)
    hide_hypercall_features(leaves)
    assert not has_hypercall_features(leaves)
    row = leaves.get(0x4000_0001)
    assert row is not None
    assert row[EAX] == 0x0100_7EFB & ~(1 << 7 | 1 << 11 | 1 << 13)
    assert not has_hypercall_features(CpuidLeaves())


# Plain numbers


@given(any_rows)
def test_packing_keeps_every_answer_that_is_not_zero(rows: list[Row]) -> None:
    leaves = CpuidLeaves(rows)
    assert list(CpuidLeaves.unpack(leaves.pack(zeros=True))) == list(leaves)
    kept = [row for row in leaves if any(row[3:]) or row[0] in (0x7, 0xD)]
    assert list(CpuidLeaves.unpack(leaves.pack())) == kept


def test_the_first_of_two_answers_counts() -> None:
    leaves = CpuidLeaves([(2, 0, 0, 1, 0, 0, 0), (2, 0, 2, 9, 0, 0, 0)])
    assert leaves.get(2) == [1, 0, 0, 0, 0]
    leaves.drop(2, 3)
    assert leaves.get(2) is None
