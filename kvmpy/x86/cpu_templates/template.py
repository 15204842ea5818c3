"""The value: how a guest's CPUID is made from what a host supports."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmpy.errors import UsageError
from kvmpy.x86.cpu_templates.dependencies import dependents, needs, settle_extended_state, settle_leaves
from kvmpy.x86.cpuid import SIGNIFICANT_INDEX, CpuidEntry, CpuidTable
from kvmpy.x86.cpuid_features import FEATURES, Feature, feature
from kvmpy.x86.cpuid_leaves import EAX, EBX, ECX, EDX, CpuidLeaves
from kvmpy.x86.cpuid_topology import describe_processors, stamp_apic_id
from kvmpy.x86.msrs import msr_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["CpuTemplate"]

_REGISTERS = {"eax": EAX, "ebx": EBX, "ecx": ECX, "edx": EDX}
_HYPERVISOR_FEATURES = 0x4000_0001
_AMD_COPIES = 0x0183_F3FF
"""Bits of leaf 1, EDX, that AMD's processors repeat in 0x80000001, EDX (APM vol. 3, appendix E)."""
_MODEL_SPECIFIC = (0xA, 0x23, 0x8000_001B, 0x8000_001F, 0x8000_0022)
"""Performance monitoring, sampling and memory encryption: what a template that lists features leaves out."""


def _word(place: Feature) -> tuple[int, int, int]:
    return place.function, place.index, _REGISTERS[place.register]


_WORDS = frozenset(_word(place) for place in FEATURES.values()) | {(0x7, 1, EBX), (0x7, 1, ECX), (0x7, 2, EDX)}
"""Registers that consist of feature bits: leaf, subleaf, register."""


@dataclass(frozen=True, slots=True)
class CpuTemplate:
    """A processor for guests.

    * `base`: "host" begins with all that the host supports, "nothing" with no leaf at all.
    * `only`: the features that may stay (names of `kvmpy.x86.cpuid_features.FEATURES`); None: all of them.
    * `leaves`: answers that replace those of the base.
    * `on`, `off`: features that are set and cleared after that. What needs a cleared feature goes with it (`avx2`
      without `avx`). One that is on is announced whether the host has it or not.
    * `vendor` (12 characters) and `brand` (up to 47); empty: as in the base.
    * `msrs`: (number, value) of registers that are set before the guest starts.

    Raises UsageError for what is no template: unknown features, a feature that is both on and off, or on without what
    it needs, two answers to one leaf.
    """

    name: str
    base: str = "host"
    only: frozenset[str] | None = None
    leaves: tuple[CpuidEntry, ...] = ()
    on: frozenset[str] = frozenset()
    off: frozenset[str] = frozenset()
    vendor: str = ""
    brand: str = ""
    msrs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.base not in ("host", "nothing"):
            raise UsageError(f'the base of a CPU template is "host" or "nothing", not {self.base!r}')
        for name in (*(self.only or ()), *self.on, *self.off):
            feature(name)
        for name in sorted(self.on):
            lacking = self.off & {name, *needs(name)}
            if self.only is not None:
                lacking |= needs(name) - self.only - self.on
            if lacking:
                raise UsageError(f"a CPU template cannot have {name} on and {min(lacking)} off")
        _check_unique("leaf and subleaf", [(entry.function, entry.index) for entry in self.leaves])
        _check_unique("MSR", [number for number, _ in self.msrs])
        if self.vendor and (len(self.vendor) != 12 or not self.vendor.isascii()):
            raise UsageError(f"a CPUID vendor is 12 ASCII characters, not {self.vendor!r}")
        if len(self.brand) > 47 or not self.brand.isascii() or "\0" in self.brand:
            raise UsageError(f"a CPUID brand string is at most 47 ASCII characters, not {self.brand!r}")
        for number, value in self.msrs:
            if not 0 <= number < 1 << 32 or not 0 <= value < 1 << 64:
                raise UsageError(f"an MSR has a number of 32 and a value of 64 bits, not {number:#x} and {value:#x}")

    @classmethod
    def of_table(cls, name: str, table: CpuidTable, msrs: Mapping[int, int] | None = None) -> CpuTemplate:
        """A template that has all answers of `table`, whatever the host supports that it is used on."""
        return cls(name, "nothing", leaves=tuple(sorted(table)), msrs=tuple(sorted((msrs or {}).items())))

    def table(self, supported: CpuidTable) -> CpuidTable:
        """The guest's CPUID where the host supports `supported`, on a machine of one processor.

        A machine adds its own part: more processors, clocks, local APIC. Leaves that are all zero are left out.
        """
        leaves = self.apply(CpuidLeaves(_rows(supported)))
        describe_processors(leaves, 1)
        stamp_apic_id(leaves, 0)
        return CpuidTable(_entries(CpuidLeaves.unpack(leaves.pack())))

    def apply(self, leaves: CpuidLeaves) -> CpuidLeaves:
        """The same for plain numbers. `leaves` may be changed by it."""
        if self.base == "nothing":
            leaves = CpuidLeaves()
        if self.only is not None:
            _keep_only(leaves, self.only)
        for entry in self.leaves:
            index = entry.index if entry.flags & SIGNIFICANT_INDEX else None
            leaves.put(entry.function, index, entry.eax, entry.ebx, entry.ecx, entry.edx)
        for name in self.off:
            for each in (name, *dependents(name)):
                _clear(leaves, FEATURES[each])
        if self.on:
            leaves = _with_features(leaves, self.on)
        if self.vendor:
            _name_vendor(leaves, self.vendor)
        if self.brand:
            _name_brand(leaves, self.brand)
        if self.only is not None or self.off:
            settle_extended_state(leaves)
            settle_leaves(leaves)
        first, extended = leaves.get(1), leaves.get(0x8000_0001)
        if leaves.of_amd and first is not None and extended is not None:
            extended[EDX] = extended[EDX] & ~_AMD_COPIES | first[EDX] & _AMD_COPIES
        return leaves

    def __str__(self) -> str:
        """One line a part."""
        start = "all that the host supports" if self.base == "host" else "nothing"
        lines = [f"CPU template {self.name}", f"  from   {start}"]
        for title, names in (("only", self.only), ("on", self.on), ("off", self.off)):
            if names:
                lines.append(f"  {title:<6} {' '.join(sorted(names))}")
        lines += [f"  {title:<6} {text}" for title, text in (("vendor", self.vendor), ("brand", self.brand)) if text]
        lines += [f"  leaf   {entry}" for entry in self.leaves]
        lines += [f"  MSR    {msr_name(number)} = {value:#x}" for number, value in self.msrs]
        return "\n".join(lines)


def _check_unique(what: str, keys: list[object]) -> None:
    if len(set(keys)) < len(keys):
        raise UsageError(f"a CPU template has one value for each {what}, not more")


def _rows(table: Iterable[CpuidEntry]) -> Iterable[tuple[int, int, int, int, int, int, int]]:
    return ((each.function, each.index, each.flags, each.eax, each.ebx, each.ecx, each.edx) for each in table)


def _entries(leaves: CpuidLeaves) -> Iterable[CpuidEntry]:
    return (CpuidEntry(leaf, index, a, b, c, d, flags=flags) for leaf, index, flags, a, b, c, d in leaves)


def _keep_only(leaves: CpuidLeaves, names: frozenset[str]) -> None:
    masks = dict.fromkeys(_WORDS, 0)
    for name in names:
        masks[_word(FEATURES[name])] |= 1 << FEATURES[name].bit
    for (function, index, register), mask in masks.items():
        row = leaves.get(function, index)
        if row is not None and function != _HYPERVISOR_FEATURES:  # those are no features of a processor
            row[register] &= mask
    if leaves.of_amd:  # KVM before 6.16 offers this register of Intel's there too
        _clear(leaves, FEATURES["arch_capabilities"])
    leaves.drop(*_MODEL_SPECIFIC)


def _clear(leaves: CpuidLeaves, place: Feature) -> None:
    row = leaves.get(place.function, place.index)
    if row is not None:
        row[_REGISTERS[place.register]] &= ~(1 << place.bit)


def _with_features(leaves: CpuidLeaves, names: Iterable[str]) -> CpuidLeaves:
    table = CpuidTable(_entries(leaves))
    for name in sorted(names):
        table.set(name)  # makes leaves that are missing
    return CpuidLeaves(_rows(table))


def _name_vendor(leaves: CpuidLeaves, vendor: str) -> None:
    ebx, edx, ecx = struct.unpack("<3I", vendor.encode("ascii"))
    first, extended = leaves.get(0), leaves.get(0x8000_0000)
    leaves.put(0, None, first[EAX] if first is not None else 1, ebx, ecx, edx)
    if extended is not None:
        extended[EBX], extended[ECX], extended[EDX] = (ebx, ecx, edx) if leaves.of_amd else (0, 0, 0)


def _name_brand(leaves: CpuidLeaves, brand: str) -> None:
    words = struct.unpack("<12I", brand.encode("ascii").ljust(48, b"\0"))
    for number in range(3):
        leaves.put(0x8000_0002 + number, None, *words[4 * number : 4 * number + 4])
    extended = leaves.get(0x8000_0000)
    if extended is None:
        leaves.put(0x8000_0000, None, 0x8000_0004, 0, 0, 0)
    else:
        extended[EAX] = max(extended[EAX], 0x8000_0004)
