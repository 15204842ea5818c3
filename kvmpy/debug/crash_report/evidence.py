"""What is taken from a machine for a report, as plain values: nothing here changes when the machine goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvmpy._value import field, frozen
from kvmpy.debug.crash_report.memory_overlay import CopyOnWriteMemory
from kvmpy.x86.paging import PhysicalMemory
from kvmpy.x86.registers import CpuState

if TYPE_CHECKING:
    from kvmpy._exit import Exit
    from kvmpy.debug.symbols import LineTable, SymbolTable
    from kvmpy.machine.recent_exits import DeviceAccess
    from kvmpy.machine.statistics import AccessCount

__all__ = [
    "Console",
    "Evidence",
    "InterruptControllers",
    "LocalApic",
    "OtherProcessor",
    "Pic",
    "RecordedException",
    "Step",
]


@frozen
class RecordedException:
    """What KVM_GET_VCPU_EVENTS still holds of the last exception that KVM raised; `pending`: it is on its way."""

    vector: int
    error_code: int | None
    pending: bool = False


@frozen
class Pic:
    """One 8259A: requests, mask and interrupts in service, a bit for each input; `base` is the vector of input 0."""

    base: int
    requested: int
    masked: int
    in_service: int
    initialized: bool


@frozen
class LocalApic:
    """The local APIC of the processor: vectors in service and requested, and where its timer goes."""

    id: int
    enabled: bool
    in_service: tuple[int, ...]
    requested: tuple[int, ...]
    timer_vector: int
    timer_masked: bool
    timer_count: int
    task_priority: int


@frozen
class InterruptControllers:
    """The controllers inside KVM. `pics` are master and slave, `ioapic` the unmasked pins as (pin, vector)."""

    pics: tuple[Pic, ...] = ()
    ioapic: tuple[tuple[int, int], ...] = ()
    ioapic_waits_for_eoi: tuple[int, ...] = ()
    """IOAPIC pins whose remote IRR is set: a level interrupt without its EOI."""
    apic: LocalApic | None = None
    pit_programmed: bool = False

    @property
    def pic_vectors_in_service(self) -> tuple[int, ...]:
        return tuple(pic.base + bit for pic in self.pics for bit in range(8) if pic.in_service >> bit & 1)

    @property
    def vectors(self) -> tuple[int, ...]:
        """Vectors in service, then those that wait, without doubles."""
        waiting = [
            pic.base + bit for pic in self.pics for bit in range(8) if pic.requested & ~pic.masked & 0xFF & 1 << bit
        ]
        apic = (*self.apic.in_service, *self.apic.requested) if self.apic is not None else ()
        return tuple(dict.fromkeys((*self.pic_vectors_in_service, *apic, *waiting)))


@frozen
class Console:
    """The end of what a device printed."""

    name: str
    tail: str


@frozen
class OtherProcessor:
    """Where another processor is, in one line."""

    id: int
    text: str


@frozen
class Step:
    """One instruction of a replay: the state before it."""

    state: CpuState


@frozen
class Evidence:
    """Everything known about the end of a guest.

    `end` is an `End` as text, `message` the outcome's sentence, `exit` the exit that ended it. `state` are the
    registers of processor `vcpu`; when `registers_lost`, KVM had reset it (AMD-V) and `state` is where it started.
    `entry_state` and `ranges` are those of the image, `loaded` memory as it was right after loading.
    `unavailable` says for parts that could not be had why.
    """

    state: CpuState
    memory: CopyOnWriteMemory
    end: str = "triple fault"
    message: str = ""
    exit: Exit | None = None
    vcpu: int = 0
    registers_lost: bool = False
    entry_state: CpuState | None = None
    ranges: tuple[tuple[int, int, str], ...] = ()
    """(address, size, name) of what was loaded."""
    loaded: PhysicalMemory | None = None
    recorded: RecordedException | None = None
    controllers: InterruptControllers | None = None
    irqchip: str = ""
    """"full", "split", or nothing: which interrupt controllers KVM has."""
    halted: bool = False
    """KVM_MP_STATE_HALTED: the processor sleeps in HLT."""
    exits: tuple[DeviceAccess | Exit, ...] = ()
    unclaimed: tuple[AccessCount, ...] = ()
    statistics: str = ""
    devices: tuple[tuple[str, str, int, int], ...] = ()
    """(name, "port" or "mmio", first, count) of what devices answer."""
    device_counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    consoles: tuple[Console, ...] = ()
    others: tuple[OtherProcessor, ...] = ()
    memory_map: tuple[tuple[int, int, str], ...] = ()
    """(address, size, name) of guest memory."""
    symbols: SymbolTable | None = None
    lines: LineTable | None = None
    steps: tuple[Step, ...] = ()
    """The last instructions of a replay, oldest first."""
    step_count: int = 0
    unavailable: Mapping[str, str] = field(default_factory=dict)
