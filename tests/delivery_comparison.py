"""The same event delivered twice: by `kvmpy.x86.event_delivery` in a copy of memory, and by the processor.

Every handler is one HLT at an address of its own, so what a run ends with shows the processor right after delivery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import event_delivery_tables as tables
from entry_rule_breaks import Bytes
from event_delivery_tables import words
from kvmpy import Hlt, InternalError, Kvm, Shutdown, Vcpu
from kvmpy.abi.structs import kvm_vcpu_events
from kvmpy.exits import Exit
from kvmpy.x86.event_delivery import Delivered, Event, EventKind, OutcomeKind, deliver_with_escalation
from kvmpy.x86.event_delivery.event import DOUBLE_FAULT
from kvmpy.x86.flags import Rflags
from kvmpy.x86.registers import CpuState

SIZE = 0x2_0000
"""Bytes of guest memory, from 0 on."""
CODE = 0x6000
HANDLERS = 0x1_0000
PAGE_TABLES = 0x1_2000
HLT = b"\xf4"

VALID_EVENTS = 0x5  # KVM_VCPUEVENT_VALID_NMI_PENDING and _SHADOW; exceptions and interrupts are taken over always
COMPARED_FIELDS = ("selector", "base", "limit", "type", "present", "dpl", "db", "s", "l")

Injection = Callable[[Vcpu], None]


def handler(vector: int) -> int:
    """Where the handler of a vector is."""
    return HANDLERS + 16 * vector


def memory_with_handlers(size: int = SIZE) -> Bytes:
    memory = Bytes(size)
    for vector in range(256):
        memory.write(handler(vector), HLT)
    return memory


@dataclass(frozen=True)
class Seen:
    """What the processor did."""

    exit: Exit
    state: CpuState
    memory: bytes


class Processor:
    """A vCPU for many cases; after a shutdown the next case gets a new one."""

    def __init__(self) -> None:
        self._owned = ExitStack()
        self._vcpu: Vcpu | None = None

    def close(self) -> None:
        self._owned.close()
        self._vcpu = None

    def _fresh(self) -> Vcpu:
        if self._vcpu is None:
            vm = self._owned.enter_context(self._owned.enter_context(Kvm()).create_vm())
            vm.add_ram(0, size=SIZE)
            self._vcpu = vm.create_vcpu()
            self._vcpu.set_cpuid(vm.kvm.supported_cpuid())
        return self._vcpu

    def run(self, memory: Bytes, state: CpuState, inject: Injection | None = None, *, timeout: float = 5) -> Seen:
        vcpu = self._fresh()
        vcpu.vm.memory.write(0, memory.data)
        vcpu.set_cpu_state(state)
        vcpu.set_events(kvm_vcpu_events(flags=VALID_EVENTS))  # nothing of the case before
        if inject is not None:
            inject(vcpu)
        event = vcpu.run(timeout=timeout)
        seen = Seen(event, vcpu.cpu_state(), vcpu.vm.memory.read(0, SIZE))
        if event != Hlt():
            self.close()
        return seen


@contextmanager
def processor() -> Iterator[Processor]:
    machine = Processor()
    try:
        yield machine
    finally:
        machine.close()


def injection(event: Event) -> Injection | None:
    """How to have a vCPU take an external interrupt or an NMI; None for what instructions cause."""
    if event.kind is EventKind.EXTERNAL_INTERRUPT:
        return lambda vcpu: vcpu.interrupt(event.vector)
    if event.kind is EventKind.NMI:
        return lambda vcpu: vcpu.nmi()
    return None


def _protected_mode_ud2() -> tuple[Bytes, CpuState]:
    """32-bit protected mode about to execute UD2, with gates for it and for #NP."""
    memory = memory_with_handlers()
    memory.data[0x1000:0x5000] = tables.tables().data[0x1000:0x5000]
    for vector in (6, 11):
        tables.gate32(memory, vector, offset=handler(vector))
    memory.write(CODE, b"\x0f\x0b")
    state = tables.protected()
    state.regs.rip = CODE
    return memory, state


@cache
def checks_descriptors() -> bool:
    """Whether events are delivered by a processor that looks at every bit of a gate and of a descriptor.

    kvm_pvm (KVM without VT-x or AMD-V below it) delivers in software: through a code segment that is not present, for
    instance. It does not look at gate types (16-bit gates push 32 bits), rights, limits of segments and of the TSS, it
    takes the RPL of CS from the gate, and it makes #DF of whatever goes wrong, even where the second exception should
    be delivered instead.
    """
    memory, state = _protected_mode_ud2()
    tables.gate32(memory, 6, tables.ABSENT_CODE, handler(6))
    with processor() as machine:
        return machine.run(memory, state).state.regs.rip == handler(11) + 1


@cache
def keeps_alignment_check() -> bool:
    """Whether RFLAGS.AC survives delivery, as it should outside real mode. kvm_pvm clears it."""
    memory, state = _protected_mode_ud2()
    state.regs.rflags |= Rflags.AC
    with processor() as machine:
        return bool(machine.run(memory, state).state.regs.rflags & Rflags.AC)


@cache
def sets_ext_for_nested_exceptions() -> bool:
    """Whether EXT is set in the error code of an exception that another event caused, as Intel's manual says.

    AMD's says that EXT stands for sources outside the processor (APM vol. 2, 8.4.1); kvm_pvm never sets it.
    """
    return checks_descriptors() and "GenuineIntel" in Path("/proc/cpuinfo").read_text()


def assert_agrees(memory: Bytes, state: CpuState, event: Event, seen: Seen, *, flags_differ: int = 0) -> None:
    """Fail with the whole story unless `seen` is what `deliver_with_escalation` says.

    `flags_differ` are bits of RFLAGS that this host gets wrong. All memory below the page tables is compared when the
    first attempt succeeds; a processor may leave parts of the frame of a failed one.
    """
    expected_memory = _memory(memory.data)
    outcome = deliver_with_escalation(expected_memory, state, event)
    last = outcome.steps[-1]
    if outcome.kind is OutcomeKind.SHUTDOWN:
        found = [] if seen.exit == Shutdown() else ["no shutdown"]
    elif seen.exit != Hlt():
        found = ["the handler's HLT was not reached"]
    else:
        assert isinstance(last, Delivered), f"not a case to compare: {outcome}"
        if last.event.vector == DOUBLE_FAULT and len(outcome.steps) > 1:
            flags_differ |= Rflags.RF  # SDM vol. 3, 17.3.1.1 leaves open what an abort saves
        found = _register_differences(last, seen.state, flags_differ)
        first = len(outcome.steps) == 1
        ext_differs = int(not first and not sets_ext_for_nested_exceptions())
        found += _memory_differences(last, expected_memory, seen, flags_differ, ext_differs, whole=first)
    if found:
        instruction = seen.exit.instruction.hex(" ") if isinstance(seen.exit, InternalError) else ""
        story = [*found, f"expected: {outcome}", f"seen: {seen.exit} {instruction}", str(state.regs), str(state.sregs)]
        raise AssertionError("\n".join(story))


def _register_differences(expected: Delivered, seen: CpuState, flags_differ: int) -> list[str]:
    found = []
    want = expected.state.copy()
    want.regs.rip += 1  # HLT
    if not keeps_alignment_check():
        flags_differ |= Rflags.AC
    want.regs.rflags = want.regs.rflags & ~flags_differ | seen.regs.rflags & flags_differ
    for name, (here, there) in want.regs.differences(seen.regs).items():
        found.append(f"{name} {there:#x}, expected {here:#x}")
    if want.sregs.cr2 != seen.sregs.cr2:
        found.append(f"cr2 {seen.sregs.cr2:#x}, expected {want.sregs.cr2:#x}")
    for name in ("cs", "ss"):
        here, there = getattr(want.sregs, name), getattr(seen.sregs, name)
        fields = ("selector",) if here.unusable else COMPARED_FIELDS
        found += [
            f"{name}.{field} {getattr(there, field):#x}, expected {getattr(here, field):#x}"
            for field in fields
            if getattr(here, field) != getattr(there, field)
        ]
    return found


def _memory_differences(
    expected: Delivered, memory: Bytes, seen: Seen, flags_differ: int, code_differs: int, *, whole: bool
) -> list[str]:
    names, values = zip(*expected.frame, strict=True)
    start = expected.frame_address
    # The size of an item is the one that gives the values back; none does when the frame wraps around its segment.
    sizes = (size for size in (2, 4, 8) if start + size * len(values) <= SIZE)
    size = next((size for size in sizes if tuple(words(memory, start, len(values), size)) == values), 0)
    found = []
    if size:
        there = words(_memory(seen.memory), start, len(values), size)
        for index, (name, here, value) in enumerate(zip(names, values, there, strict=True)):
            ignored = flags_differ if name.endswith("flags") else code_differs if name == "error code" else 0
            if (here ^ value) & ~ignored:
                found.append(f"{name} on the stack {value:#x}, expected {here:#x}")
            memory.write(start + index * size, value.to_bytes(size, "little"))
    if whole and not found and memory.data[:PAGE_TABLES] != seen.memory[:PAGE_TABLES]:
        at = next(at for at in range(PAGE_TABLES) if memory.data[at] != seen.memory[at])
        found.append(f"memory at {at:#x} is {seen.memory[at]:#x}, expected {memory.data[at]:#x}")
    return found


def _memory(data: bytes | bytearray) -> Bytes:
    memory = Bytes(len(data))
    memory.data[:] = data
    return memory
