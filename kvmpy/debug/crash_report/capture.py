"""Taking from a machine all that a report needs, at once. What cannot be had is noted, never raised."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from kvmpy.debug.crash_report.evidence import (
    Console,
    Evidence,
    InterruptControllers,
    LocalApic,
    OtherProcessor,
    Pic,
    RecordedException,
)
from kvmpy.debug.crash_report.memory_overlay import CopyOnWriteMemory
from kvmpy.errors import ClosedError
from kvmpy.exits import Exit, Hlt, Interrupted, Shutdown
from kvmpy.x86.register_text import mode_text
from kvmpy.x86.registers import CpuState

if TYPE_CHECKING:
    from kvmpy.boot.image import Image
    from kvmpy.debug.symbols import LineTable, SymbolTable
    from kvmpy.kvm import Vcpu, Vm
    from kvmpy.machine import Machine, Outcome
    from kvmpy.machine.recent_exits import DeviceAccess
    from kvmpy.memory import GuestMemory

T = TypeVar("T")

__all__ = ["gather", "gather_vcpu", "is_after_reset"]

_HALTED = 3  # KVM_MP_STATE_HALTED
_TAIL = 2000
"""Characters of a console."""
_LARGEST_IMAGE = 8 << 20
"""Bytes: larger images are not loaded a second time to look for code that was overwritten."""
_SHUTDOWN = "triple fault"
_ENDS: dict[type[Exit], str] = {Shutdown: _SHUTDOWN, Hlt: "halted", Interrupted: "timeout"}
"""What the exits of a bare vCPU are as the end of a run."""


class _Notes:
    """Parts that could not be taken, and why."""

    def __init__(self) -> None:
        self.why: dict[str, str] = {}

    def take(self, part: str, get: Callable[[], T], otherwise: T) -> T:
        try:
            return get()
        except Exception as error:  # whatever it is, the rest of the report is worth having
            self.why[part] = f"{type(error).__name__}: {error}"
            return otherwise


def gather(
    machine: Machine,
    outcome: Outcome | None = None,
    *,
    symbols: SymbolTable | None = None,
    lines: LineTable | None = None,
    exits: tuple[DeviceAccess | Exit, ...] | None = None,
) -> Evidence:
    """Read registers, controllers, devices and what else matters of a machine that stands.

    Raises ClosedError for a machine that is closed.
    """
    notes = _Notes()
    index = (outcome.vcpu if outcome is not None else None) or 0
    vcpu = next((vcpu for vcpu in machine.vcpus if vcpu.id == index and not vcpu.closed), None)
    if vcpu is None:
        raise ClosedError("the machine is closed: its processors have no state any more")
    end = str(outcome.end) if outcome is not None else "still running"
    entry = machine.entry
    entry_state = entry.state if entry is not None else None
    state = notes.take("registers", vcpu.cpu_state, entry_state.copy() if entry_state is not None else CpuState())
    lost = end == _SHUTDOWN and is_after_reset(state) and not (entry_state is not None and is_after_reset(entry_state))
    if lost and entry_state is not None:
        state = entry_state.copy()
    statistics = notes.take("statistics", machine.statistics, None)
    if symbols is None:
        symbols = notes.take("symbols", lambda: _symbols_of(machine), None)
    if lines is None and _is_elf(machine.image):
        lines = notes.take("source lines", lambda: machine.lines, None)
    if exits is None:
        nothing: tuple[DeviceAccess | Exit, ...] = ()
        exits = notes.take("recent exits", lambda: machine.recent_exits(machine.vcpus.index(vcpu)), nothing)
    return Evidence(
        state=state,
        memory=notes.take("breakpoints", lambda: _without_breakpoints(machine), CopyOnWriteMemory(machine.memory)),
        end=end,
        message=outcome.message if outcome is not None else "",
        exit=outcome.exit if outcome is not None else None,
        vcpu=index,
        registers_lost=lost,
        entry_state=entry_state.copy() if entry_state is not None else None,
        ranges=tuple((part.address, part.size, part.name) for part in entry.ranges) if entry is not None else (),
        loaded=notes.take("the loaded image", lambda: _loaded_memory(machine), None),
        recorded=notes.take("the recorded exception", lambda: _recorded(vcpu), None),
        controllers=notes.take("interrupt controllers", lambda: _controllers(machine.vm, vcpu), None),
        irqchip=machine.vm.irqchip,
        halted=notes.take("the activity state", lambda: vcpu.get_mp_state() == _HALTED, False),
        exits=exits,
        unclaimed=statistics.unclaimed if statistics is not None else (),
        statistics=str(statistics) if statistics is not None else "",
        devices=tuple(
            (region.name, region.kind, region.start, region.length)
            for bus in (machine.ports, machine.mmio)
            for region in bus.regions
        ),
        device_counters={device.name: dict(device.counters) for device in machine.devices if device.counters},
        consoles=notes.take("consoles", lambda: _consoles(machine), ()),
        others=tuple(_other(notes, other) for other in machine.vcpus if other is not vcpu),
        memory_map=_memory_map(machine.memory),
        symbols=symbols,
        lines=lines,
        unavailable=notes.why,
    )


def gather_vcpu(vcpu: Vcpu, event: Exit | None, symbols: SymbolTable | None) -> Evidence:
    """What there is to read of a vCPU without a machine around it, which stands."""
    notes = _Notes()
    state = vcpu.cpu_state()
    end = _ENDS.get(type(event), "failed") if event is not None else "still running"
    return Evidence(
        state=state,
        memory=CopyOnWriteMemory(vcpu.vm.memory),
        end=end,
        exit=event,
        vcpu=vcpu.id,
        registers_lost=end == _SHUTDOWN and is_after_reset(state),
        recorded=notes.take("the recorded exception", lambda: _recorded(vcpu), None),
        controllers=notes.take("interrupt controllers", lambda: _controllers(vcpu.vm, vcpu), None),
        irqchip=vcpu.vm.irqchip,
        halted=notes.take("the activity state", lambda: vcpu.get_mp_state() == _HALTED, False),
        memory_map=_memory_map(vcpu.vm.memory),
        symbols=symbols,
        unavailable=notes.why,
    )


def is_after_reset(state: CpuState) -> bool:
    """Whether these are the registers after power-on (SDM vol. 3, 9.1.4): nothing was executed since."""
    sregs = state.sregs
    return state.regs.rip == 0xFFF0 and sregs.cs.base == 0xFFFF_0000 and not sregs.cr0 & 1 and not sregs.efer


def _memory_map(memory: GuestMemory) -> tuple[tuple[int, int, str], ...]:
    return tuple(
        (region.address, region.size, f"{region.name}{', read-only' if region.read_only else ''}")
        for region in memory.regions
    )


def _without_breakpoints(machine: Machine) -> CopyOnWriteMemory:
    """Guest memory with the bytes that a debugger has replaced put back."""
    memory = CopyOnWriteMemory(machine.memory)
    debugger = machine._debugger
    for point in debugger.points if debugger is not None else ():
        if debugger is not None and isinstance(physical := getattr(point, "physical", None), int):
            memory.write(physical, debugger.read_memory(machine.vcpus[0], point.address, 1))
    return memory


def _recorded(vcpu: Vcpu) -> RecordedException | None:
    exception = vcpu.get_events().exception
    if not (exception.nr or exception.has_error_code or exception.pending or exception.injected):
        return None
    code = exception.error_code if exception.has_error_code else None
    return RecordedException(exception.nr & 0x1F, code, bool(exception.pending or exception.injected))


def _symbols_of(machine: Machine) -> SymbolTable | None:
    if machine._symbols is None and not _is_elf(machine.image):
        return None
    symbols = machine.symbols
    return symbols if len(symbols) else None


def _is_elf(image: Image | None) -> bool:
    """Whether there may be symbols and lines in it. The modules that read them are not loaded in vain."""
    if "kvmpy.boot.elf.image" not in sys.modules:  # who has made an ElfImage has loaded it
        return False
    from kvmpy.boot.elf.image import elf_of

    return elf_of(image) is not None


def _consoles(machine: Machine) -> tuple[Console, ...]:
    """The output of every device that has some."""
    found = []
    for device in machine.devices:
        text = getattr(device, "text", None)
        if isinstance(text, str) and text:
            found.append(Console(device.name, text[-_TAIL:]))
    return tuple(found)


def _other(notes: _Notes, vcpu: Vcpu) -> OtherProcessor:
    name = f"vCPU {vcpu.id}"

    def text() -> str:
        waits = {1: ", waits for INIT", 2: ", waits for SIPI", 3: ", halted"}.get(vcpu.get_mp_state(), "")
        state = vcpu.cpu_state()
        return f"rip {state.regs.rip:#x}, {mode_text(state.sregs)}{waits}"

    return OtherProcessor(vcpu.id, notes.take(name, text, "not available"))


# Interrupt controllers


def _controllers(vm: Vm, vcpu: Vcpu) -> InterruptControllers | None:
    if not vm.irqchip:
        return None
    apic = _local_apic(bytes(vcpu.get_lapic()))
    if vm.irqchip != "full":
        return InterruptControllers(apic=apic)
    pics = []
    for chip in (0, 1):
        pic = vm.get_irqchip(chip).chip.pic
        pics.append(Pic(pic.irq_base, pic.irr, pic.imr, pic.isr, bool(pic.irq_base or pic.init4)))
    entries = [entry.bits for entry in vm.get_irqchip(2).chip.ioapic.redirtbl]
    return InterruptControllers(
        pics=tuple(pics),
        ioapic=tuple((pin, bits & 0xFF) for pin, bits in enumerate(entries) if not bits >> 16 & 1),
        ioapic_waits_for_eoi=tuple(pin for pin, bits in enumerate(entries) if bits >> 14 & 1),
        apic=apic,
        pit_programmed=_pit_programmed(vm),
    )


def _pit_programmed(vm: Vm) -> bool:
    return bool(vm.get_pit().channels[0].mode != 0xFF)  # 0xFF: as KVM creates it


def _local_apic(page: bytes) -> LocalApic:
    """From the register page (SDM vol. 3, table 10-1)."""

    def register(offset: int) -> int:
        return int.from_bytes(page[offset : offset + 4], "little")

    def vectors(offset: int) -> tuple[int, ...]:
        words = [register(offset + 16 * index) for index in range(8)]
        return tuple(32 * index + bit for index, word in enumerate(words) for bit in range(32) if word >> bit & 1)

    timer = register(0x320)
    return LocalApic(
        id=register(0x20) >> 24,
        enabled=bool(register(0xF0) & 0x100),
        in_service=vectors(0x100),
        requested=vectors(0x200),
        timer_vector=timer & 0xFF,
        timer_masked=bool(timer >> 16 & 1),
        timer_count=register(0x380),
        task_priority=register(0x80) & 0xFF,
    )


# Memory as it was loaded


def _loaded_memory(machine: Machine) -> GuestMemory | None:
    """A second loading of the machine's image, into memory of our own: to see what has been overwritten since."""
    from kvmpy.memory import GuestMemory
    from kvmpy.memory.region import MemoryRegion

    image, entry = machine.image, machine.entry
    if image is None or entry is None or sum(part.size for part in entry.ranges) > _LARGEST_IMAGE:
        return None
    memory = GuestMemory()
    for region in machine.memory.regions:
        if not region.read_only:
            memory.add(MemoryRegion.anonymous(region.address, region.size, name=region.name))
    image.load(memory)
    return memory
