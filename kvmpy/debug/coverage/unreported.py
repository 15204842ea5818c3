"""Instructions that no step tells of, found out from the two steps around them.

A step is told after an instruction, by where the next one is. So the first instruction of a handler is not seen when
the processor goes there by itself, for an interrupt or a fault: the step before it told of the instruction that was to
come, and the next one tells of the second in the handler. And after an instruction that loads SS no step is reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmpy.debug.coverage.control_flow import LONGEST, Flow, flow_at
from kvmpy.debug.disassembly import Disassembler
from kvmpy.errors import GuestMemoryError
from kvmpy.x86.flags import Cr0, Efer
from kvmpy.x86.gates import Gate
from kvmpy.x86.page_walk import translate
from kvmpy.x86.register_text import code_bits

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu

__all__ = ["Passage", "Unreported"]

HLT = b"\xf4"
_EXCEPTIONS = 32
"""Vectors below are exceptions, outside of real mode (SDM vol. 3, 6.3)."""
_PAGE = 0x1000


class Passage(NamedTuple):
    """What happened between two steps: which instructions were executed besides, and whether the first one was."""

    unreported: tuple[int, ...] = ()
    executed: bool = True


class Unreported:
    """Looks at steps of one vCPU that are told for the first time. `sizes` are those of the instructions it met."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._disassembler = Disassembler()
        self._bits = 0
        self._known: set[int] = set()
        self._flows: dict[int, tuple[bytes, int, Flow | None]] = {}
        self._idt = b""
        self._gates: list[tuple[int, int, int]] = []
        self.sizes: dict[int, int] = {}

    def passage(self, at: int, there: int) -> Passage:
        """The instruction at linear address `at` was to come, and the next step told of the one `there`.

        The vCPU stands at `there`. With capstone; without, nothing is found but HLT.
        """
        self._known.add(at)
        before = self._bits
        self._bits = code_bits(self._vcpu.sregs)
        flow = self._flow(at, before or self._bits)
        if flow is None:
            if 0 < there - at <= LONGEST:
                self.sizes.setdefault(at, there - at)
            return Passage()
        self.sizes[at] = flow.size
        found = None
        if not flow.leads(at, there):
            found = self._behind_shadow(at, flow, there) or self._delivered(there)
        elif flow.anywhere:
            found = self._delivered(there)
            # A return leads into the midst of a handler when that was interrupted, which it had begun before.
            if found is not None and found.unreported[0] in self._known:
                found = None
        if found is None:
            return Passage()
        self._known.update(found.unreported)
        return found

    def note_size(self, address: int) -> None:
        """Note the size of an instruction that has been executed without a step behind it."""
        if address not in self.sizes:
            flow = self._flow(address, self._bits or code_bits(self._vcpu.sregs))
            if flow is not None:
                self.sizes[address] = flow.size

    def halts(self, at: int, there: int) -> bool:
        """Whether the instruction at `at`, behind which the vCPU stands, is HLT."""
        return there == at + 1 and self._read(at, 1) == HLT

    def _flow(self, address: int, bits: int) -> Flow | None:
        """What the instruction at a linear address leads to, decoded once as long as its bytes stay the same."""
        code = self._read(address, LONGEST)
        known = self._flows.get(address)
        if known is not None and known[0] == code and known[1] == bits:
            return known[2]
        flow = flow_at(self._disassembler, code, address, bits) if self._disassembler.available else None
        self._flows[address] = code, bits, flow
        return flow

    def _read(self, address: int, length: int) -> bytes:
        data = b""
        while length:
            part = min(length, _PAGE - address % _PAGE)
            physical = translate(self._vcpu.vm.memory, self._vcpu.sregs, address)
            try:
                data += self._vcpu.vm.memory.read(physical, part) if physical is not None else b""
            except GuestMemoryError:
                physical = None
            if physical is None:
                break
            address, length = address + part, length - part
        return data

    def _behind_shadow(self, at: int, flow: Flow, there: int) -> Passage | None:
        if not flow.shadow:
            return None
        second = at + flow.size
        following = self._flow(second, self._bits)
        if following is None or not following.leads(second, there):
            return None
        self.sizes[second] = following.size
        return Passage((second,))

    def _delivered(self, there: int) -> Passage | None:
        """The event whose handler's second instruction is `there`, if exactly one handler can be meant."""
        found: dict[int, int] = {}
        for vector, selector, offset in self._read_gates():
            cs = self._vcpu.sregs.cs
            if selector & ~3 != cs.selector & ~3:
                continue
            first = offset if cs.l else cs.base + offset & 0xFFFF_FFFF
            flow = self._flow(first, self._bits)
            if flow is not None and not flow.anywhere and first != there and flow.leads(first, there):
                found[first] = vector
                self.sizes[first] = flow.size
        if len(found) != 1:
            return None
        ((first, vector),) = found.items()
        real_mode = not self._vcpu.sregs.cr0 & Cr0.PE
        return Passage((first,), executed=real_mode or vector < _EXCEPTIONS)

    def _read_gates(self) -> list[tuple[int, int, int]]:
        """(vector, selector, offset) of all handlers, each once."""
        sregs = self._vcpu.sregs
        real_mode, long_mode = not sregs.cr0 & Cr0.PE, bool(sregs.efer & Efer.LMA)
        size = 4 if real_mode else 16 if long_mode else 8
        table = self._read(sregs.idt.base, min(sregs.idt.limit + 1, 256 * size))
        if table == self._idt:
            return self._gates
        self._idt = table
        places: dict[tuple[int, int], int] = {}
        for at in range(0, len(table) - size + 1, size):
            if real_mode:
                offset, selector = (int.from_bytes(table[at + part : at + part + 2], "little") for part in (0, 2))
            else:
                gate = Gate.decode(table[at : at + size], long_mode=long_mode)
                if gate is None or not gate.present or gate.kind == "task":
                    continue
                offset, selector = gate.offset, gate.selector
            places.setdefault((selector, offset), at // size)
        self._gates = [(vector, selector, offset) for (selector, offset), vector in places.items()]
        return self._gates
