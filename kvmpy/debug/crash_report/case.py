"""The captured state with what follows from it: what the findings are judged on.

Everything is worked out when it is first asked for, and once.
"""

from __future__ import annotations

from functools import cached_property

from kvmpy.debug.crash_report.control_flow import Located, find_loop
from kvmpy.debug.crash_report.evidence import Evidence
from kvmpy.debug.crash_report.explanation import Explanation, best_explanation, explanations
from kvmpy.debug.crash_report.first_event import Candidate, Cause, Execution
from kvmpy.exits import FailEntry, InternalError, Shutdown
from kvmpy.x86.page_walk import Walk, walk
from kvmpy.x86.registers import Registers, SystemRegisters

__all__ = ["Case"]

_EMULATION = 1  # KVM_INTERNAL_ERROR_EMULATION
_DELIVERY = 3  # KVM_INTERNAL_ERROR_DELIVERY_EV


class Case:
    """One end of a guest under judgement."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.memory = evidence.memory
        self.state = evidence.state

    @property
    def regs(self) -> Registers:
        return self.state.regs

    @property
    def sregs(self) -> SystemRegisters:
        return self.state.sregs

    @cached_property
    def execution(self) -> Execution:
        """The instruction at RIP about to execute."""
        return Execution(self.memory.fork(), self.state)

    # How it ended

    @property
    def shutdown(self) -> bool:
        """A triple fault."""
        return self.evidence.end == "triple fault" or isinstance(self.evidence.exit, Shutdown)

    @property
    def timed_out(self) -> bool:
        """The guest was still at it."""
        return self.evidence.end in ("timeout", "stopped", "breakpoint", "still running")

    @property
    def halted(self) -> bool:
        """The guest stands in HLT, for ever or for now."""
        return self.evidence.end == "halted" or self.evidence.halted

    @property
    def emulation_failed(self) -> bool:
        """KVM's emulator gave up on an instruction, or on fetching one."""
        event = self.evidence.exit
        return isinstance(event, InternalError) and event.suberror == _EMULATION

    @property
    def fetch_failed(self) -> bool:
        """KVM could not even read the instruction."""
        event = self.evidence.exit
        return isinstance(event, InternalError) and event.suberror == _EMULATION and not event.instruction

    @property
    def delivery_failed(self) -> bool:
        """KVM was delivering an event when the processor left the guest for something else."""
        event = self.evidence.exit
        return isinstance(event, InternalError) and event.suberror == _DELIVERY

    @property
    def entry_failed(self) -> FailEntry | None:
        event = self.evidence.exit
        return event if isinstance(event, FailEntry) else None

    # The first event

    @cached_property
    def explanations(self) -> tuple[Explanation, ...]:
        """What may have begun it; empty when the end was no fault."""
        if not (self.shutdown or self.emulation_failed or self.delivery_failed):
            return ()
        return explanations(self.evidence, self.execution)

    @cached_property
    def first(self) -> Explanation | None:
        """The one that fits best."""
        return best_explanation(self.explanations, shutdown=self.shutdown)

    def blamed(self, *causes: Cause) -> Candidate | None:
        """The first event, when it is of one of these causes."""
        first = self.first
        return first.candidate if first is not None and first.candidate.cause in causes else None

    @property
    def blamed_instruction(self) -> int:
        """The linear address of the instruction that began it: RIP, or the one before."""
        return self.first.candidate.values.get("instruction", self.rip) if self.first is not None else self.rip

    # Addresses

    def walk(self, address: int) -> Walk:
        """The page walk of a linear address."""
        mask = 0xFFFF_FFFF_FFFF_FFFF if self.execution.long_mode else 0xFFFF_FFFF
        return walk(self.memory, self.sregs, address & mask)

    def physical(self, address: int) -> int | None:
        """Where a linear address leads; rights do not count."""
        return self.walk(address).physical

    @property
    def rip(self) -> int:
        """The linear address of the instruction."""
        return self.execution.rip

    @cached_property
    def stack(self) -> int:
        """The linear address of the top of the stack."""
        return self.execution.linear("ss", self.execution.stack_offset(0))

    def in_memory(self, address: int) -> bool:
        """Whether there is guest memory at a linear address."""
        physical = self.physical(address)
        return physical is not None and self.memory.contains(physical)

    def describe(self, address: int) -> str:
        """An address with its symbol, where there is one."""
        symbols = self.evidence.symbols
        return symbols.describe(address) if symbols is not None else f"{address:#x}"

    def loaded_range(self, address: int) -> str:
        """What was loaded at a physical address: the name of the part, or nothing."""
        for start, size, name in self.evidence.ranges:
            if start <= address < start + size:
                return name
        return ""

    # What it does

    @cached_property
    def loop(self) -> tuple[Located, ...]:
        """The instructions that the guest goes round, from RIP on."""
        return find_loop(self.execution, self.regs.rip)
