"""What an operating system makes of CPUID: topology and caches, by the algorithms of the manuals.

Written from SDM vol. 3, "Detecting Hardware Multi-Threading Support and Topology", and APM vol. 3, appendix E, for the
tests only; nothing of kvmpy's own code is used. `Cpuid` asks one processor: (leaf, subleaf) -> EAX, EBX, ECX, EDX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

Cpuid = Callable[[int, int], tuple[int, int, int, int]]


class Place(NamedTuple):
    """Where a processor is."""

    package: int
    core: int
    thread: int


class Cache(NamedTuple):
    """A cache of a processor; processors with equal ones share it."""

    level: int
    kind: int
    shared_by: int


def _bits(field: int, high: int, low: int) -> int:
    return field >> low & (1 << high - low + 1) - 1


def _width(count: int) -> int:
    """Bits that tell `count` ids apart."""
    return (count - 1).bit_length()


def by_extended_topology(cpuid: Cpuid, leaf: int = 0xB) -> Place | None:
    """Leaf 0xB or 0x1F; None without."""
    if cpuid(0, 0)[0] < leaf or not cpuid(leaf, 0)[1]:
        return None
    thread_width = package_shift = 0
    for subleaf in range(8):
        eax, ebx, ecx, _ = cpuid(leaf, subleaf)
        kind = _bits(ecx, 15, 8)
        if not kind or not _bits(ebx, 15, 0):
            break
        assert _bits(ecx, 7, 0) == subleaf
        package_shift = _bits(eax, 4, 0)
        if kind == 1:
            thread_width = package_shift
    apic_id = cpuid(leaf, 0)[3]
    within = apic_id & (1 << package_shift) - 1
    return Place(apic_id >> package_shift, within >> thread_width, within & (1 << thread_width) - 1)


def initial_apic_id(cpuid: Cpuid) -> int:
    """Leaf 1, EBX[31:24]."""
    return _bits(cpuid(1, 0)[1], 31, 24)


def by_leaf_4(cpuid: Cpuid) -> Place:
    """Leaves 1 and 4, of Intel's processors without leaf 0xB."""
    _, ebx, _, edx = cpuid(1, 0)
    ids = _bits(ebx, 23, 16) if edx >> 28 & 1 else 1
    cores = _bits(cpuid(4, 0)[0], 31, 26) + 1 if cpuid(0, 0)[0] >= 4 else 1
    package_shift, core_width = _width(ids), _width(cores)
    thread_width = package_shift - core_width
    assert thread_width >= 0
    within = initial_apic_id(cpuid) & (1 << package_shift) - 1
    return Place(initial_apic_id(cpuid) >> package_shift, within >> thread_width, within & (1 << thread_width) - 1)


def by_amd_leaves(cpuid: Cpuid) -> Place:
    """Leaves 1, 0x80000008 and, with topology extensions, 0x8000001E, of AMD's processors."""
    apic_id = initial_apic_id(cpuid)
    _, _, ecx, _ = cpuid(0x8000_0008, 0)
    size = _bits(ecx, 15, 12) or _width(_bits(ecx, 7, 0) + 1)
    threads = 1
    if cpuid(0x8000_0001, 0)[2] >> 22 & 1:
        eax, ebx, _, _ = cpuid(0x8000_001E, 0)
        assert eax & 0xFF == apic_id
        threads = _bits(ebx, 15, 8) + 1
    within = apic_id & (1 << size) - 1
    return Place(apic_id >> size, within // threads, within % threads)


def processors_of_package(cpuid: Cpuid) -> int:
    """What leaf 1 says; a power of two on Intel's processors."""
    _, ebx, _, edx = cpuid(1, 0)
    return _bits(ebx, 23, 16) if edx >> 28 & 1 else 1


def caches(cpuid: Cpuid, leaf: int, apic_id: int) -> Iterator[Cache]:
    """Leaf 4 or 0x8000001D: level and kind of each cache, and the number of the group that shares it."""
    for subleaf in range(8):
        eax = cpuid(leaf, subleaf)[0]
        if not _bits(eax, 4, 0):
            return
        yield Cache(_bits(eax, 7, 5), _bits(eax, 4, 0), apic_id >> _width(_bits(eax, 25, 14) + 1))
