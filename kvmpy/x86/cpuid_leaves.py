"""CPUID answers as plain numbers, to change many of them at once.

`kvmpy.x86.cpuid.CpuidTable` is the same for people: values that compare and print. A hundred of those take a
millisecond to make, which a machine that lives for a few does not have.
"""

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["EAX", "EBX", "ECX", "EDX", "ENTRY_SIZE", "CpuidLeaves"]

EAX, EBX, ECX, EDX = range(4)
_FLAGS = 4

_ENTRY = struct.Struct("<7I12x")
ENTRY_SIZE = _ENTRY.size
"""Bytes of struct kvm_cpuid_entry2."""

_SIGNIFICANT_INDEX = 1
_KEPT = (0x7, 0xD)
_AMD = ("AuthenticAMD", "HygonGenuine")


class CpuidLeaves:
    """Answers by leaf and subleaf: each a list of EAX, EBX, ECX and EDX, to read and to write.

    Made from tuples (function, index, flags, eax, ebx, ecx, edx), the order of struct kvm_cpuid_entry2; iterating gives
    such tuples. The first of several answers to the same leaf and subleaf counts, as for KVM.
    """

    __slots__ = ("_rows",)

    def __init__(self, answers: "Iterable[tuple[int, int, int, int, int, int, int]]" = ()) -> None:
        self._rows: dict[tuple[int, int], list[int]] = {}
        for function, index, flags, *registers in answers:
            key = function, index if flags & _SIGNIFICANT_INDEX else 0
            if key not in self._rows:
                self._rows[key] = [*registers, flags]

    @classmethod
    def unpack(cls, entries: bytes) -> "CpuidLeaves":
        """From the kernel's array of struct kvm_cpuid_entry2."""
        return cls(_ENTRY.iter_unpack(entries))

    def pack(self, *, zeros: bool = False) -> bytes:
        """As the kernel's array. Answers that are all zero are left out: so reads a leaf that is missing, in a range.

        `zeros` keeps them: above the highest leaf, some processors repeat another one instead. Those of leaves 7 and
        0xD stay in any case, as for some KVMs it makes a difference (`kvmpy.x86.cpu_templates.dependencies`).
        """
        return b"".join(
            [
                _ENTRY.pack(function, index, row[_FLAGS], row[EAX], row[EBX], row[ECX], row[EDX])
                for (function, index), row in self._rows.items()
                if row[EAX] or row[EBX] or row[ECX] or row[EDX] or zeros or function in _KEPT
            ]
        )

    def __iter__(self) -> "Iterator[tuple[int, int, int, int, int, int, int]]":
        for (function, index), (eax, ebx, ecx, edx, flags) in self._rows.items():
            yield function, index, flags, eax, ebx, ecx, edx

    def get(self, function: int, index: int = 0) -> list[int] | None:
        """The registers of a leaf and subleaf, which may be changed in place, or None."""
        return self._rows.get((function, index))

    def put(self, function: int, index: int | None, eax: int, ebx: int, ecx: int, edx: int) -> None:
        """Add or replace an answer; `index` None: of a leaf without subleaves."""
        flags = 0 if index is None else _SIGNIFICANT_INDEX
        self._rows[function, index or 0] = [eax, ebx, ecx, edx, flags]

    def drop(self, *functions: int) -> None:
        """Drop leaves with all their subleaves."""
        for key in [key for key in self._rows if key[0] in functions]:
            del self._rows[key]

    def subleaves(self, function: int) -> "dict[int, list[int]]":
        """The answers of a leaf by subleaf."""
        return {index: row for (leaf, index), row in self._rows.items() if leaf == function}

    def highest(self, range_: int) -> int:
        """The highest leaf of a range of leaves, which begins at 0, 0x40000000 or 0x80000000; 0: there is none."""
        first = self._rows.get((range_, 0))
        return first[EAX] if first is not None else 0

    @property
    def vendor(self) -> str:
        """The twelve letters of leaf 0."""
        first = self._rows.get((0, 0), [0] * 4)
        return struct.pack("<3I", first[EBX], first[EDX], first[ECX]).decode("latin-1")

    @property
    def of_amd(self) -> bool:
        """Whether leaves mean what AMD's manual says (APM vol. 3, appendix E): also for Hygon's processors."""
        return self.vendor in _AMD
