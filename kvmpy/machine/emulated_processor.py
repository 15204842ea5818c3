"""Finishing instructions that KVM's own emulator gives up on (KVM_EXIT_INTERNAL_ERROR, suberror 1).

The vCPU stands at the instruction, everything before it is done. `InstructionCompletion` performs it in software on the
vCPU's state and lets the guest go on; see `kvmpy.x86.emulator`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kvmpy.errors import KvmError
from kvmpy.exits import InternalError
from kvmpy.machine.xsave_area import XsaveArea
from kvmpy.machine.xsave_layout import xsave_layout
from kvmpy.x86.emulator import (
    GuestException,
    SoftwareInterrupt,
    TruncatedInstruction,
    UnknownInstruction,
    perform,
    table,
)
from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.emulator.linear_memory import LinearMemory
from kvmpy.x86.event_delivery.event import DOUBLE_FAULT, PAGE_FAULT, Event, EventKind
from kvmpy.x86.flags import Cr0
from kvmpy.x86.page_walk import Access

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu
    from kvmpy.kvm.live_registers import LiveSystemRegisters
    from kvmpy.machine.bus import Bus
    from kvmpy.machine.guest_debug import GuestDebug
    from kvmpy.machine.run_control import RunControl

__all__ = ["EmulatedProcessor", "InstructionCompletion"]

_LONGEST = 15
"""Bytes of an instruction (SDM vol. 2, 2.3.11)."""
_PAGE = 0x1000
_TABLES_END = 0x500
"""Of real mode's interrupt vectors and the BIOS's data."""
_RIP, _RFLAGS = 16, 17
_TF = 0x100
_INT3 = 0xCC
_AT_ONCE = 64
"""Instructions done in one go: as many microseconds as KVM's emulator lets an interrupt wait."""


@lru_cache(maxsize=4096)
def _is_known(code: bytes, bits: int, rows: int) -> bool | None:
    """Whether the table has the instruction at the start of `code`. None: the bytes are too few to say.

    `rows` is how large the table is: it grows when an instruction comes that is not in it.
    """
    try:
        table.decode(code, bits)
    except UnknownInstruction:
        return False
    except TruncatedInstruction:
        return None
    return True


class _ReadOnce:
    """A vCPU's system registers while it stands: each is read from it once, which takes a microsecond or two."""

    def __init__(self, live: LiveSystemRegisters) -> None:
        own = self.__dict__
        own["_live"] = live
        own["cr0"], own["cr2"], own["cr3"], own["cr4"], own["cr8"], own["efer"], own["apic_base"] = (
            live.control_registers()
        )

    def __getattr__(self, name: str) -> object:  # asked only for what is not there yet
        value = self.__dict__[name] = getattr(self._live, name)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._live, name, value)
        # KVM keeps an interrupt that is on its way. What it leaves in the area that KVM_RUN syncs may be of one that
        # was delivered long ago, and must not come again.
        self._live.interrupt = None
        self.__dict__[name] = value

    _live: LiveSystemRegisters


class EmulatedProcessor:
    """A vCPU that stands, as `kvmpy.x86.emulator.processor.Processor`."""

    def __init__(self, vcpu: Vcpu, control: RunControl, devices: Bus, xsave: XsaveArea | None = None) -> None:
        self._vcpu = vcpu
        self._control = control
        self._xsave = xsave
        self._devices = devices
        self.general = vcpu.regs.values()
        sregs: Any = _ReadOnce(vcpu.sregs)  # with the attributes of SystemRegisters
        self.sregs = sregs
        self._memory: LinearMemory | None = None
        self._extended: ExtendedState | None = None
        self._xcr0: int | None = None  # no instruction of the table changes it

    @property
    def memory(self) -> LinearMemory:
        """Memory by linear address; RAM and devices."""
        if self._memory is None:
            self._memory = LinearMemory(self._vcpu.vm.memory, self.sregs, self.general, self._devices)
        return self._memory

    @property
    def has_extended_state(self) -> bool:
        """Whether it has been got from KVM."""
        return self._extended is not None

    def extended_state(self, replaced: int = 0) -> ExtendedState:
        """x87, SSE, AVX ... state; changes are written back by `write_back`."""
        if self._extended is None:
            area = self._xsave_area()
            if replaced & area.components != area.components or not area.clear():
                area.load()
            self._extended = ExtendedState(area.data, xsave_layout())
        return self._extended

    def _xsave_area(self) -> XsaveArea:
        if self._xsave is None:
            self._xsave = XsaveArea(self._vcpu)
        return self._xsave

    def read_msr(self, index: int) -> int | None:
        """An MSR, or None when KVM has none."""
        try:
            return self._vcpu.get_msr(index)
        except KvmError:
            return None

    def write_msr(self, index: int, value: int) -> bool:
        """Write an MSR. False: KVM refuses."""
        return self._vcpu.set_msrs_until_refused([(index, value)]) == 1

    def xcr0(self) -> int:
        """XCR0."""
        if self._xcr0 is None:
            self._xcr0 = self._xsave_area().xcr0()
        return self._xcr0

    def timestamp(self) -> int:
        """The TSC, MSR 0x10."""
        return self._vcpu.get_msr(0x10)

    def flush_translations(self) -> None:
        """INVPCID: writing CR3 again makes KVM forget its translations."""
        self.sregs.cr3 = self.sregs.cr3
        self._memory = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """LOCK: the other processors of the guest stand meanwhile."""
        alone = self._control.begin_alone(self._vcpu)
        try:
            yield
        finally:
            if alone:
                self._control.end_alone(self._vcpu)

    def write_back(self) -> None:
        """Give the vCPU what the instruction changed."""
        self._vcpu.regs.assign_values(self.general)
        if self._xsave is not None and self._extended is not None and self._extended.changed:
            self._xsave.store()


class InstructionCompletion:
    """Completes instructions of one vCPU. `counts` says how often each was, by name."""

    def __init__(self, vcpu: Vcpu, control: RunControl, devices: Bus) -> None:
        self._vcpu = vcpu
        self._control = control
        self._devices = devices
        self._xsave = XsaveArea(vcpu)
        self.counts: Counter[str] = Counter()

    def complete(self, failure: InternalError, debug: GuestDebug | None = None) -> bool:
        """Perform the instruction that KVM failed at. False: the table does not know it, and nothing has changed.

        One that works on vector or x87 registers seldom comes alone, and having KVM's copy of them costs as much as an
        exit: those behind it that the table knows are done with it, unless `debug` may have to stop at them.
        """
        if failure.suberror != 1 or not failure.instruction:
            return False
        cpu = EmulatedProcessor(self._vcpu, self._control, self._devices, self._xsave)
        cs = cpu.sregs.cs
        bits = 64 if cs.l else 32 if cs.db else 16
        base = 0 if cs.l else cs.base
        rip = cpu.general[_RIP]
        if rip + base < _TABLES_END and not cpu.sregs.cr0 & Cr0.PE:
            return False  # a vector was 0, and this is no program: the run ends before all traces are gone
        try:
            code = self._code(cpu, failure.instruction, rip + base)
            row = perform(cpu, code, bits)
            self.counts[row.name] += 1
            if cpu.has_extended_state and not row.leaves:
                self._go_on(cpu, bits, base, rip, code, debug)
        except (UnknownInstruction, TruncatedInstruction):
            return False
        except (GuestException, SoftwareInterrupt) as raised:
            kind = str(raised.event)
            self.counts[kind.partition(" ")[0] if isinstance(raised, GuestException) else kind] += 1
            cpu.write_back()
            self._inject(raised.event)
            return True
        cpu.write_back()
        return True

    def _go_on(
        self, cpu: EmulatedProcessor, bits: int, base: int, done: int, code: bytes, debug: GuestDebug | None
    ) -> None:
        """Do the instructions that follow the one at `done`, as long as they are known and in the same page of code.

        `code` is what is there from the first one on, as far as it is at hand.
        """
        general = cpu.general
        page = (done + base) // _PAGE
        code = code[general[_RIP] - done :]
        for _ in range(_AT_ONCE):
            rip = general[_RIP]
            linear = rip + base
            if linear // _PAGE != page or _PAGE - linear % _PAGE < _LONGEST or general[_RFLAGS] & _TF:
                return
            if debug is not None and debug.stops_at(rip):
                return
            known = _is_known(code, bits, len(table.ROWS))
            if known is None:
                code = cpu.memory.read(linear, _LONGEST)
                known = _is_known(code, bits, len(table.ROWS))
            if not known or code[0] == _INT3:  # perhaps a breakpoint: KVM's exit brings it to who put it there
                return
            row = perform(cpu, code, bits)
            self.counts[row.name] += 1
            if row.leaves:
                return
            code = code[general[_RIP] - rip :]

    def _code(self, cpu: EmulatedProcessor, reported: bytes, linear: int) -> bytes:
        """The bytes at RIP. What KVM reports ends with the page; the rest of the 15 bytes are no part of it."""
        room = _PAGE - linear % _PAGE
        if room >= _LONGEST:
            return reported
        code = reported[:room]
        try:
            following = cpu.memory.translate(linear + room, Access.FETCH)
            return code + self._vcpu.vm.memory.read(following, _LONGEST - room)
        except (GuestException, ValueError):  # nothing is there: enough for an instruction that ends in its page
            return code

    def _inject(self, event: Event) -> None:
        """Have KVM deliver it when the guest runs on (KVM_SET_VCPU_EVENTS, KVM API section 4.32)."""
        vcpu = self._vcpu
        if event.vector == PAGE_FAULT and event.address is not None:
            vcpu.sregs.cr2 = event.address
            vcpu.sregs.interrupt = None  # see _ReadOnce
        events = vcpu.get_events()
        if event.kind is EventKind.SOFTWARE_INTERRUPT:
            events.interrupt.injected = 1
            events.interrupt.nr = event.vector
            events.interrupt.soft = 1
        else:
            assert event.vector != DOUBLE_FAULT  # no instruction raises it
            events.exception.injected = 1
            events.exception.nr = event.vector
            events.exception.has_error_code = event.pushed_error_code is not None
            events.exception.error_code = event.pushed_error_code or 0
        vcpu.set_events(events)
