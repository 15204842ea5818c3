"""Gates and the interrupt descriptor table (SDM vol. 3, 5.8.3, 6.11 and 6.14.1; APM vol. 2, 4.7.4 and 4.8.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from kvmpy._value import frozen, replace
from kvmpy.errors import RegisterValueError, UsageError
from kvmpy.x86.registers import DescriptorTable

__all__ = ["Gate", "GateKind", "Idt"]

GateKind = Literal["interrupt", "trap", "task", "call"]

_TYPES: dict[GateKind, tuple[int, int]] = {"call": (4, 12), "task": (5, 5), "interrupt": (6, 14), "trap": (7, 15)}
"""Kind -> descriptor type of the 16-bit form and of the 32- and 64-bit form."""
_KINDS: dict[int, tuple[GateKind, int]] = {
    4: ("call", 16),
    5: ("task", 32),
    6: ("interrupt", 16),
    7: ("trap", 16),
    12: ("call", 32),
    14: ("interrupt", 32),
    15: ("trap", 32),
}


@frozen
class Gate:
    """One gate: where an interrupt, exception or far call goes.

    `bits` is its form: 16 and 32 are 8 bytes, 64 (long mode) is 16 bytes and may name an interrupt stack `ist`, 1 to 7.
    An interrupt gate clears RFLAGS.IF, a trap gate does not. `dpl` is the least privilege from which INT n may use it.
    `offset` is meaningless in a task gate, whose `selector` picks a TSS; `parameters` counts the words or doublewords
    that a 16- or 32-bit call gate copies. Raises RegisterValueError for a field that does not fit its form, UsageError
    for a form that does not exist.
    """

    kind: GateKind
    offset: int = 0
    selector: int = 0x08
    dpl: int = 0
    bits: int = 64
    ist: int = 0
    present: int = 1
    parameters: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _TYPES:
            raise UsageError(f"a gate is one of {', '.join(_TYPES)}, not {self.kind!r}")
        if self.bits not in (16, 32, 64):
            raise UsageError(f"a gate is 16, 32 or 64 bits wide, not {self.bits}")
        if self.kind == "task" and self.bits == 64:
            raise UsageError("long mode has no task gates")
        if self.ist and (self.bits != 64 or self.kind == "call"):
            raise UsageError("only 64-bit interrupt and trap gates name an interrupt stack")
        if self.parameters and (self.bits == 64 or self.kind != "call"):
            raise UsageError("only 16- and 32-bit call gates copy parameters")
        for name, bits in (
            ("offset", self.bits),
            ("selector", 16),
            ("dpl", 2),
            ("ist", 3),
            ("present", 1),
            ("parameters", 5),
        ):
            if not 0 <= getattr(self, name) < 1 << bits:
                raise RegisterValueError(f"gate {name}", getattr(self, name), bits)

    def to_bytes(self) -> bytes:
        """The gate as it stands in memory: 8 bytes, 16 for a 64-bit gate."""
        offset = self.offset if self.kind != "task" else 0
        kind = _TYPES[self.kind][0 if self.bits == 16 else 1]
        value = (
            offset & 0xFFFF
            | self.selector << 16
            | (self.ist or self.parameters) << 32
            | (kind | self.dpl << 5 | self.present << 7) << 40
            | (offset >> 16) << 48
        )
        return value.to_bytes(16 if self.bits == 64 else 8, "little")

    @classmethod
    def decode(cls, data: bytes, *, long_mode: bool = False) -> Gate | None:
        """The gate in the first 8 (long mode: 16) bytes, or None when the type is not that of a gate of this mode.

        Present or not is not judged. Raises UsageError when `data` is too short.
        """
        size = 16 if long_mode else 8
        if len(data) < size:
            raise UsageError(f"a gate has {size} bytes here, not {len(data)}")
        value = int.from_bytes(data[:size], "little")
        access = value >> 40 & 0xFF
        if access & 0x10 or access & 0xF not in _KINDS:
            return None
        kind, bits = _KINDS[access & 0xF]
        if long_mode:
            if bits == 16 or kind == "task":  # types that long mode reserves (SDM vol. 3, table 3-2)
                return None
            bits = 64
        offset = value & 0xFFFF
        if bits != 16:
            offset |= value >> 48 << 16 & 0xFFFF_FFFF_FFFF_0000
        low = value >> 32 & 0x1F
        return cls(
            kind,
            offset & ((1 << bits) - 1) if kind != "task" else 0,
            value >> 16 & 0xFFFF,
            dpl=access >> 5 & 3,
            bits=bits,
            ist=low & 7 if bits == 64 and kind != "call" else 0,
            present=access >> 7,
            parameters=low if bits != 64 and kind == "call" else 0,
        )


class Idt:
    """An interrupt descriptor table under construction: `idt[14] = Gate("interrupt", handler)`.

    `bits` is 64 for long mode (16-byte gates), 32 for protected mode, whose 8-byte gates may be 16 or 32 bits wide. A
    vector without a gate is not present, so using it is a #GP (then a double fault, if 8 is missing, too).
    """

    def __init__(self, *, bits: int = 64) -> None:
        if bits not in (32, 64):
            raise UsageError(f"an IDT is for 32 or 64 bits, not {bits}")
        self.bits = bits
        self._gates: dict[int, Gate] = {}

    @property
    def gate_size(self) -> int:
        """Bytes of one gate."""
        return 16 if self.bits == 64 else 8

    def __setitem__(self, vector: int, gate: Gate) -> None:
        """Raises UsageError for a vector outside 0 to 255 or a gate of the wrong form."""
        if not 0 <= vector <= 0xFF:
            raise UsageError(f"an interrupt vector is 0 to 255, not {vector}")
        if gate.kind == "call":
            raise UsageError("a call gate belongs into a GDT or LDT, not into an IDT")
        if (gate.bits == 64) != (self.bits == 64):
            raise UsageError(f"a gate of {gate.bits} bits does not fit an IDT of {self.bits} bits")
        self._gates[vector] = gate

    def __getitem__(self, vector: int) -> Gate:
        """Raises KeyError for a vector without a gate."""
        return self._gates[vector]

    def __contains__(self, vector: object) -> bool:
        return vector in self._gates

    def __iter__(self) -> Iterator[int]:
        """The vectors that have a gate, in order."""
        return iter(sorted(self._gates))

    def __len__(self) -> int:
        """How many vectors have a gate."""
        return len(self._gates)

    def set_all(self, gate: Gate, *, stride: int = 0) -> None:
        """Give all 256 vectors the gate, each with an offset `stride` bytes further: one stub per vector."""
        for vector in range(0x100):
            self[vector] = replace(gate, offset=gate.offset + vector * stride)

    def to_bytes(self) -> bytes:
        """The table with all 256 vectors: 0x800 bytes, 0x1000 in long mode."""
        empty = bytes(self.gate_size)
        return b"".join(self._gates[vector].to_bytes() if vector in self._gates else empty for vector in range(0x100))

    @classmethod
    def decode(cls, data: bytes, *, bits: int = 64) -> Idt:
        """A table read from memory: up to 256 gates, a partial last one dropped. What is no gate is left out."""
        table = cls(bits=bits)
        size = table.gate_size
        for vector in range(min(len(data) // size, 0x100)):
            gate = Gate.decode(data[vector * size : (vector + 1) * size], long_mode=bits == 64)
            if gate is not None and gate.kind != "call":
                table._gates[vector] = gate
        return table

    def register(self, base: int) -> DescriptorTable:
        """What IDTR holds when the table stands at linear address `base`."""
        return DescriptorTable(base, 0x100 * self.gate_size - 1)

    def __repr__(self) -> str:
        return f"<Idt {self.bits} bits, {len(self._gates)} gates>"
