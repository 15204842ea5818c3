"""States of processors about to crash, built by hand: for mistakes that need no KVM, or that this host's KVM lets pass.

`Scene` is a processor in a prepared mode with its memory: change what you like, then ask for the case or the report.
Code stands at `CODE`, the prepared tables at `TABLES`, the stack ends at `STACK`.
"""

from __future__ import annotations

import struct
from typing import Any

from entry_rule_breaks import Bytes
from kvmpy.debug.crash_report import CrashReport
from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.evidence import Evidence
from kvmpy.debug.crash_report.memory_overlay import CopyOnWriteMemory
from kvmpy.exits import Shutdown
from kvmpy.x86 import long_mode, modes, protected_mode
from kvmpy.x86.descriptor_tables import GDT, IDT, TSS
from kvmpy.x86.gates import Gate, Idt
from kvmpy.x86.paging import PageFlag

__all__ = ["CODE", "HANDLER", "STACK", "TABLES", "Scene"]

CODE, STACK, HANDLER = 0x1000, 0x8000, 0x9000
TABLES = 0x1_0000
MEMORY = 0x4_0000
PML4, PDPT, PD = TABLES + 0x4000, TABLES + 0x5000, TABLES + 0x6000


class Scene:
    """A processor in `mode` ("real", "protected", "long") and `ring` before the instruction `code`, in hex.

    With `idt`, every vector has an interrupt gate to `HANDLER`.
    """

    def __init__(self, mode: str, code: str = "90", *, ring: int = 0, idt: bool = False, memory: int = MEMORY) -> None:
        self.memory = Bytes(memory)
        self.memory.write(CODE, bytes.fromhex(code))
        self.memory.write(HANDLER, b"\xf4")
        self.mode = mode
        if mode == "real":
            self.state = modes.real_mode(CODE, stack=STACK)
        else:
            table = Idt(bits=64 if mode == "long" else 32) if idt else None
            if table is not None:
                table.set_all(Gate("interrupt", HANDLER, bits=64 if mode == "long" else 32))
            prepare = long_mode.prepare if mode == "long" else protected_mode.prepare
            self.state = prepare(self.memory, entry=CODE, tables=TABLES, stack=STACK, ring=ring, idt=table)
        self.regs, self.sregs = self.state.regs, self.state.sregs

    # Tables

    def descriptor(self, selector: int, value: int) -> None:
        """Put a descriptor into the GDT."""
        self.memory.write(TABLES + GDT + (selector & 0xFFF8), struct.pack("<Q", value))

    def gate(self, vector: int, data: bytes) -> None:
        """Put a gate into the IDT."""
        self.memory.write(TABLES + IDT + vector * (16 if self.mode == "long" else 8), data)

    def tss(self, offset: int, value: int, size: int = 8) -> None:
        """Write to the TSS."""
        self.memory.write(TABLES + TSS + offset, value.to_bytes(size, "little"))

    def page(self, virtual: int, flags: int, *, physical: int | None = None) -> None:
        """Map the 2 MiB page of `virtual`, below 1 GiB, with these flags; the upper levels allow everything."""
        every = int(PageFlag.P | PageFlag.RW | PageFlag.US)
        self._write(PML4, PDPT | every)
        self._write(PDPT, PD | every)
        frame = virtual & -0x20_0000 if physical is None else physical
        self._write(PD + 8 * (virtual >> 21), frame | flags | (int(PageFlag.PS) if flags & 1 else 0))

    def _write(self, place: int, value: int) -> None:
        self.memory.write(place, value.to_bytes(8, "little"))

    def push(self, *values: int, size: int = 8) -> None:
        """Push numbers; the last one comes to the top of the stack."""
        for value in values:
            self.regs.rsp -= size
            base = 0 if self.mode == "long" else self.sregs.ss.base
            self.memory.write(base + self.regs.rsp, value.to_bytes(size, "little"))

    # What comes of it

    def evidence(self, **other: Any) -> Evidence:
        given = {"exit": Shutdown()} | other
        return Evidence(self.state, CopyOnWriteMemory(self.memory), **given)

    def case(self, **other: Any) -> Case:
        return Case(self.evidence(**other))

    def report(self, **other: Any) -> CrashReport:
        return CrashReport.of(self.evidence(**other))

    def found(self, **other: Any) -> list[str]:
        """The ids of the findings, weightiest first."""
        return [finding.id for finding in self.report(**other).findings]
