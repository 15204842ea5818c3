"""CPUID answers as a value: what a processor says, or what a vCPU shall say (KVM API, KVM_SET_CPUID2 and its kin)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator

from kvmpy._value import frozen, replace
from kvmpy.errors import RegisterValueError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.x86.cpuid_features import Feature, FeatureName

__all__ = ["SIGNIFICANT_INDEX", "CpuidEntry", "CpuidTable"]

SIGNIFICANT_INDEX = 1
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the entry answers only its own subleaf."""

_INDEXED_LEAVES = frozenset(
    {0x4, 0x7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1D, 0x1E, 0x1F, 0x24, 0x8000_001D}
)
"""Leaves whose answer depends on ECX, as KVM marks them."""


_FIELDS = ("function", "index", "eax", "ebx", "ecx", "edx", "flags")


@frozen
class CpuidEntry:
    """The answer to a leaf (`function`, EAX on input) and subleaf (`index`, ECX on input): struct kvm_cpuid_entry2.

    All are 32 bits, unsigned; RegisterValueError for others. `flags` is SIGNIFICANT_INDEX or 0.
    """

    function: int
    index: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0
    flags: int = 0

    def __post_init__(self) -> None:
        for name, value in zip(_FIELDS, self._values(), strict=True):
            if not 0 <= value < 1 << 32:
                raise RegisterValueError(f"cpuid {name}", value, 32)

    def _values(self) -> tuple[int, ...]:
        return (self.function, self.index, self.eax, self.ebx, self.ecx, self.edx, self.flags)

    def __lt__(self, other: CpuidEntry) -> bool:
        return self._values() < other._values()

    def answers(self, function: int, index: int) -> bool:
        """Whether this is the entry for a leaf and subleaf."""
        return self.function == function and (self.index == index or not self.flags & SIGNIFICANT_INDEX)

    def __str__(self) -> str:
        subleaf = f".{self.index:x}" if self.flags & SIGNIFICANT_INDEX else ""
        registers = " ".join(f"{name}={getattr(self, name):08x}" for name in ("eax", "ebx", "ecx", "edx"))
        return f"{self.function:08x}{subleaf:<3} {registers}"


class CpuidTable:
    """A list of CPUID entries that can be asked and changed by feature name.

    A feature is a name of `kvmpy.x86.cpuid_features.FEATURES` ("x2apic") or a tuple (function, index, register, bit).
    Tables are equal when their entries are, in any order. A change replaces an entry; entries themselves never change.
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Iterable[CpuidEntry] = ()) -> None:
        self._entries = list(entries)

    # --- a list of entries ---

    def __iter__(self) -> Iterator[CpuidEntry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, place: int) -> CpuidEntry:
        return self._entries[place]

    def __eq__(self, other: object) -> bool:
        return sorted(self) == sorted(other) if isinstance(other, CpuidTable) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def copy(self) -> CpuidTable:
        """A table of its own with the same entries."""
        return CpuidTable(self._entries)

    def find(self, function: int, index: int = 0) -> CpuidEntry | None:
        """The entry that answers a leaf and subleaf, or None."""
        return next((entry for entry in self._entries if entry.answers(function, index)), None)

    def put(self, entry: CpuidEntry) -> None:
        """Add an entry, or replace the one that answers the same leaf and subleaf."""
        for place, old in enumerate(self._entries):
            if old.answers(entry.function, entry.index):
                self._entries[place] = entry
                return
        self._entries.append(entry)

    def remove(self, function: int, index: int | None = None) -> None:
        """Drop a leaf, or one subleaf of it. What is not there is no error."""
        self._entries = [
            entry
            for entry in self._entries
            if not (entry.function == function if index is None else entry.answers(function, index))
        ]

    def filter(self, keep: Callable[[CpuidEntry], bool]) -> CpuidTable:
        """A new table of the entries that `keep` accepts."""
        return CpuidTable(entry for entry in self._entries if keep(entry))

    # --- features ---

    def has(self, name: FeatureName) -> bool:
        """Whether a feature bit is set. Raises UsageError for an unknown name."""
        place = _named(name)
        entry = self.find(place.function, place.index)
        return entry is not None and bool(getattr(entry, place.register) >> place.bit & 1)

    def set(self, name: FeatureName) -> None:
        """Set a feature bit. A missing leaf is made, and the highest leaf of its range raised so that it can be seen.

        Says nothing about whether the host can do it. Raises UsageError for an unknown name.
        """
        place = _named(name)
        if self.find(place.function, place.index) is None:
            indexed = place.function in _INDEXED_LEAVES
            self._entries.append(
                CpuidEntry(place.function, place.index, flags=SIGNIFICANT_INDEX if indexed else 0)
            )  # fmt: skip
            self._raise_highest(place)
        self._change(place, 1)

    def clear(self, *names: FeatureName) -> None:
        """Clear feature bits; a leaf that is missing stays so. For an unknown name raises UsageError, clearing none."""
        for place in [_named(name) for name in names]:
            if self.find(place.function, place.index) is not None:
                self._change(place, 0)

    def features(self) -> frozenset[str]:
        """The names of all feature bits that are set."""
        from kvmpy.x86.cpuid_features import FEATURES

        return frozenset(name for name in FEATURES if self.has(name))

    def _change(self, place: Feature, bit: int) -> None:
        entry = self.find(place.function, place.index)
        if entry is not None:
            value = getattr(entry, place.register) & ~(1 << place.bit) | bit << place.bit
            self.put(replace(entry, **{place.register: value}))

    def _raise_highest(self, place: Feature) -> None:
        """EAX of leaves 0, 0x40000000 and 0x80000000 is the highest leaf; EAX of 7.0 the highest subleaf of 7."""
        first = self.find(place.function & 0xF000_0000)
        if first is not None and first.eax < place.function:
            self.put(replace(first, eax=place.function))
        main = self.find(0x7, 0)
        if place.function == 0x7 and main is not None and main.eax < place.index:
            self.put(replace(main, eax=place.index))

    # --- names ---

    @property
    def vendor(self) -> str:
        """The twelve letters of leaf 0 ("GenuineIntel", "AuthenticAMD"); empty without that leaf.

        Setting it changes leaf 0, and AMD's copy in leaf 0x80000000 where there is one. Raises UsageError for a name
        that is not 12 ASCII characters.
        """
        entry = self.find(0)
        if entry is None:
            return ""
        return struct.pack("<3I", entry.ebx, entry.edx, entry.ecx).decode("latin-1").rstrip("\0")

    @vendor.setter
    def vendor(self, name: str) -> None:
        if len(name) != 12 or not name.isascii():
            raise UsageError(f"a CPUID vendor is 12 ASCII characters, not {name!r}")
        ebx, edx, ecx = struct.unpack("<3I", name.encode("ascii"))
        self.put(replace(self.find(0) or CpuidEntry(0), ebx=ebx, ecx=ecx, edx=edx))
        copy = self.find(0x8000_0000)
        if copy is not None and copy.ebx:
            self.put(replace(copy, ebx=ebx, ecx=ecx, edx=edx))

    @property
    def brand(self) -> str:
        """The brand string of leaves 0x80000002 to 4, without padding; empty without those leaves.

        Setting it makes the leaves. Raises UsageError for more than 47 ASCII characters.
        """
        entries = [self.find(0x8000_0002 + number) for number in range(3)]
        data = b"".join(struct.pack("<4I", e.eax, e.ebx, e.ecx, e.edx) for e in entries if e is not None)
        return data.partition(b"\0")[0].decode("latin-1").strip()

    @brand.setter
    def brand(self, name: str) -> None:
        if len(name) > 47 or not name.isascii() or "\0" in name:
            raise UsageError(f"a CPUID brand string is at most 47 ASCII characters, not {name!r}")
        words = struct.unpack("<12I", name.encode("ascii").ljust(48, b"\0"))
        for number in range(3):
            eax, ebx, ecx, edx = words[4 * number : 4 * number + 4]
            self.put(CpuidEntry(0x8000_0002 + number, 0, eax, ebx, ecx, edx))
        highest = self.find(0x8000_0000) or CpuidEntry(0x8000_0000)
        if highest.eax < 0x8000_0004:
            self.put(replace(highest, eax=0x8000_0004))

    # --- text ---

    def differences(self, other: CpuidTable) -> list[tuple[CpuidEntry | None, CpuidEntry | None]]:
        """Pairs (here, there) of entries that differ; None where one table has no answer."""
        keys = sorted({(entry.function, entry.index) for table in (self, other) for entry in table})
        pairs = ((self.find(*key), other.find(*key)) for key in keys)
        return [(here, there) for here, there in pairs if here != there]

    def __str__(self) -> str:
        """One line an entry, in order, with the names of the feature bits that are set."""
        from kvmpy.x86.cpuid_features import FEATURES

        lines = []
        for entry in sorted(self):
            lines.append(str(entry))
            names = [
                name
                for name, place in FEATURES.items()
                if entry.answers(place.function, place.index) and getattr(entry, place.register) >> place.bit & 1
            ]
            if names:
                lines.append("  " + " ".join(names))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<CpuidTable {len(self)} entries {self.vendor!r}>"


def _named(name: FeatureName) -> Feature:
    """A feature by its name. The list of names takes two milliseconds to make: only who asks for one waits for it."""
    from kvmpy.x86.cpuid_features import feature

    return feature(name)
