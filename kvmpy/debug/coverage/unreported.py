"""Instructions that no step tells of, found out from the two steps around them.

A step is told after an instruction, by where the next one is. That leaves out:

* the first instruction of a handler to which the processor goes by itself, for an interrupt or a fault: the step before
  told of the instruction that was to come, and the next one tells of the second in the handler; likewise where a
  processor starts that another one starts by SIPI;
* the instruction behind one after which no step comes. On every processor these are those that load SS (SDM vol. 3,
  6.8.3); a KVM that runs ring 0 in its emulator does some others past it, such as LFENCE, SWAPGS and IRETQ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmpy.debug.coverage.control_flow import LONGEST, Flow, flow_at
from kvmpy.debug.coverage.translation import physical_address
from kvmpy.debug.disassembly import Disassembler
from kvmpy.errors import GuestMemoryError
from kvmpy.x86.flags import Cr0, Efer
from kvmpy.x86.gates import Gate

if TYPE_CHECKING:
    from kvmpy.debug.software_breakpoints import SoftwareBreakpoints
    from kvmpy.kvm import Vcpu

__all__ = ["Departure", "Passage", "Unreported"]

_HLT, _IRETQ = b"\xf4", b"\x48\xcf"
_DEPARTURES = (_IRETQ, b"\x0f\x07", b"\x48\x0f\x07", b"\x0f\x35", b"\x48\x0f\x35")  # IRETQ, SYSRET, SYSEXIT
_LMA = int(Efer.LMA)
_EXCEPTIONS, _REAL_MODE_EXCEPTIONS = 32, 8
"""Vectors below are exceptions (SDM vol. 3, 6.3); in real mode a PC has its IRQs from 8 on."""
_RESET_VECTOR = 0xFFFF_FFF0
_PAGE = 0x1000
_MOST = 8
"""Instructions behind each other without a step."""


class Passage(NamedTuple):
    """What was executed between two steps: the instruction that was to come, unless `skipped`, and `between` others."""

    between: tuple[int, ...] = ()
    skipped: bool = False

    def last(self, at: int) -> int:
        """The one executed last, where `at` was the one to come."""
        return self.between[-1] if self.between else at


class Departure(NamedTuple):
    """An IRETQ to `target`, or SYSRET or SYSEXIT; `to_ring3` or not."""

    target: int | None
    to_ring3: bool


class Unreported:
    """Looks at steps of one vCPU. `sizes` are those of the instructions that it met, by address.

    `breakpoints` are those in guest memory, which are looked through. Without capstone it finds out about HLT only.
    """

    def __init__(self, vcpu: Vcpu, breakpoints: SoftwareBreakpoints) -> None:
        self._vcpu = vcpu
        self._breakpoints = breakpoints
        self._disassembler = Disassembler()
        flow_at(self._disassembler, b"\x90", 0, 64)  # capstone is loaded now, not when the guest runs
        self._bits = self._bits_before = 0
        self._code: tuple[int, bytes] = (0, b"")
        """Address and bytes of the instruction that is to come."""
        self._page: tuple[tuple[int, int], int, int] | None = None
        """CR0 and CR3, and the linear and physical address, over 4096, of the page read last."""
        self._known: set[int] = set()
        self._flows: dict[int, tuple[bytes, int, Flow | None]] = {}
        self._idt = b""
        self._gates: list[tuple[int, int, int]] = []
        self.sizes: dict[int, int] = {}
        self.in_ring3 = False
        """Whether the vCPU was in ring 3 of long mode at `arrive`."""

    def arrive(self) -> None:
        """The vCPU stands somewhere anew. Comes before the other methods."""
        sregs = self._vcpu.sregs
        cs = sregs.cs
        long_mode = int(sregs.efer) & _LMA
        self._bits_before = self._bits
        self._bits = 64 if cs.l and long_mode else 32 if cs.db else 16  # as kvmpy.x86.register_text.code_bits
        self.in_ring3 = bool(long_mode) and cs.selector & 3 == 3

    def passage(self, at: int, there: int) -> Passage:
        """The instruction at linear address `at` was to come, and the vCPU now stands at `there`."""
        self._known.add(at)
        if at == _RESET_VECTOR and (way := self._way(self._vcpu.sregs.cs.base, there)) is not None:
            return way._replace(skipped=True)  # a SIPI: the processor waited there, and began at offset 0 of its page
        flow = self._flow(at, self._bits_before or self._bits)
        if flow is None:
            if 0 < there - at <= LONGEST:
                self.sizes.setdefault(at, there - at)
            return Passage()
        found = None
        if not flow.leads(at, there):
            if flow.falls and not flow.ends:
                found = self._way(at + flow.size, there)
            found = found or self._delivered(there)
        elif flow.anywhere:
            found = self._delivered(there)
            # A return leads into the midst of a handler when that was interrupted, which it had begun before.
            if found is not None and found.between[0] in self._known:
                found = None
        self._known.update(found.between if found else ())
        return found or Passage()

    def after_return(self, target: int, there: int) -> Passage:
        """An IRETQ to `target` was executed, and the vCPU now stands at `there`."""
        found = None if there == target else self._way(target, there) or self._delivered(there)
        return found._replace(skipped=False) if found else Passage()

    def departure(self, address: int) -> Departure | None:
        """Where the instruction goes at which the vCPU stands, `address`, if perhaps no step is told behind it."""
        self._code = address, self._read(address, LONGEST)
        code = self._code[1]
        if self._bits != 64 or not code.startswith(_DEPARTURES):
            return None
        if not code.startswith(_IRETQ):
            return Departure(None, True)
        frame = self._read(self._vcpu.regs.rsp, 16)
        target, selector = int.from_bytes(frame[:8], "little"), int.from_bytes(frame[8:10], "little")
        return Departure(target, selector & 3 == 3) if len(frame) == 16 else None

    def is_return(self, address: int) -> bool:
        """Whether the instruction at `address` is an IRETQ."""
        known = self._flows.get(address)
        return (known[0] if known else self._read(address, 2)).startswith(_IRETQ)

    def halts(self, last: int, there: int) -> bool:
        """Whether the instruction at `last`, behind which the vCPU stands, is HLT."""
        if there != last + 1:
            return False
        self._page = None  # to be sure: a processor that is told to halt, and should not, never goes on
        return self._read(last, 1) == _HLT

    def _flow(self, address: int, bits: int) -> Flow | None:
        """What the instruction at a linear address leads to, decoded once as long as its bytes stay the same."""
        code = self._code[1] if self._code[0] == address else self._read(address, LONGEST)
        known = self._flows.get(address)
        if known is not None and known[:2] == (code, bits):
            return known[2]
        flow = flow_at(self._disassembler, code, address, bits) if self._disassembler.available else None
        self._flows[address] = code, bits, flow
        if flow is not None:
            self.sizes[address] = flow.size
        return flow

    def _read(self, address: int, length: int) -> bytes:
        """Up to `length` bytes at a linear address: those that are mapped, and in memory, without any breakpoints."""
        data = bytearray()
        while length:
            part = min(length, _PAGE - address % _PAGE)
            physical = self._physical(address)
            if physical is None:
                break
            try:
                piece = bytearray(self._vcpu.vm.memory.read(physical, part))
            except GuestMemoryError:
                break
            if self._breakpoints:
                self._breakpoints.hide(physical, piece)
            data += piece
            address, length = address + part, length - part
        return bytes(data)

    def _physical(self, address: int) -> int | None:
        sregs = self._vcpu.sregs
        tables = sregs.cr0, sregs.cr3
        if self._page is None or self._page[:2] != (tables, address // _PAGE):
            physical = physical_address(self._vcpu, address)
            if physical is None:
                return None
            self._page = tables, address // _PAGE, physical // _PAGE
        return self._page[2] * _PAGE + address % _PAGE

    # What came between

    def _way(self, first: int, there: int, *, anywhere: bool = True) -> Passage | None:
        """The instructions from `first` on to `there`, all but the last of which go on to the next one."""
        way: list[int] = []
        at = first
        while len(way) < _MOST:
            flow = self._flow(at, self._bits)
            if flow is None or (flow.anywhere and not anywhere):
                return None
            way.append(at)
            if flow.leads(at, there):
                return Passage(tuple(way))
            if flow.ends:
                return None
            at += flow.size
        return None

    def _delivered(self, there: int) -> Passage | None:
        """The beginning of the handler that was called, if exactly one can be meant: the vCPU is at `there` in it."""
        found: dict[int, tuple[int, Passage]] = {}
        cs = self._vcpu.sregs.cs
        for vector, selector, offset in self._read_gates():
            if selector & ~3 == cs.selector & ~3:
                first = offset if cs.l else cs.base + offset & 0xFFFF_FFFF
                way = self._way(first, there, anywhere=False) if first != there else None
                if way is not None:
                    found[first] = vector, way
        # The nearest one: the handler before it may lead there as well, past its end.
        shortest = min((len(way.between) for _, way in found.values()), default=0)
        nearest = [(vector, way) for vector, way in found.values() if len(way.between) == shortest]
        if len(nearest) != 1:
            return None
        ((vector, way),) = nearest
        # After an interrupt, the instruction that was to come comes later; one that faults has been begun.
        exceptions = _EXCEPTIONS if self._vcpu.sregs.cr0 & Cr0.PE else _REAL_MODE_EXCEPTIONS
        return way._replace(skipped=vector >= exceptions)

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
