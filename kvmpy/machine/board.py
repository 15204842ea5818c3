"""What devices see of the machine they are plugged into."""

from kvmpy.devices.device import NULL_LINE, InterruptLine
from kvmpy.errors import UsageError
from kvmpy.kvm import Vm
from kvmpy.machine.bus import Bus
from kvmpy.machine.host_events import HostEvents
from kvmpy.machine.interrupts import InterruptPin, KvmInterruptLine
from kvmpy.machine.outcome import End, Outcome
from kvmpy.machine.run_control import RunControl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmpy.devices.host_input import HostInput
    from kvmpy.machine.guest_events import IoEvent, IrqEvent
    from kvmpy.machine.host_timer import HostTimer
    from kvmpy.machine.interrupts import LevelObserver
    from kvmpy.memory import GuestMemory

__all__ = ["MachineBoard"]

_CAP_IRQFD, _CAP_IOEVENTFD, _CAP_COALESCED_PIO = 32, 36, 162

_PAGE = 0x1000
_MMIO_WINDOW = 0xD000_0000
"""From here on devices get addresses that do not ask for one: above RAM and a PC's PCI window, below its APICs."""
_CARD_INTERRUPTS = (5, 10, 11, 6, 15, 14, 7)
"""ISA inputs that no device of a PC's board has, the freest first: not 9, which is ACPI's, nor 3, 12 and 13."""


class MachineBoard:
    """`kvmpy.devices.device.Board` over KVM. It does not know the machine, which refers to it: no circle, so that a
    machine's memory goes when the last reference to it does."""

    def __init__(self, vm: Vm, control: RunControl, host_events: HostEvents, mmio: Bus) -> None:
        self._vm = vm
        self._mmio = mmio
        self._control = control
        self._host_events = host_events
        self._pins: dict[int, InterruptPin] = {}
        self._level_observer: LevelObserver | None = None
        self._queued: set[int] = set()
        self._interrupts: set[int] = set()
        """Inputs that were given out otherwise than as lines."""
        self._shared = 0

    def interrupt_line(self, number: int) -> InterruptLine:
        """A new line to interrupt input `number`; see `Machine.interrupt_line`."""
        if not isinstance(number, int) or number < 0:
            raise UsageError(f"an interrupt input is a number from 0 on, not {number!r}")
        if not self._vm.irqchip:
            return NULL_LINE
        pin = self._pins.get(number)
        if pin is None:
            pin = self._pins[number] = InterruptPin(self._vm, number, self._level_observer)
            self._control.edges.append(pin.again)
        return KvmInterruptLine(pin)

    def observe_levels(self, observer: "LevelObserver | None") -> None:
        """Have `observer(gsi, level)` called whenever a device changes the level of an input; None: nobody."""
        self._level_observer = observer
        for pin in list(self._pins.values()):
            pin.observer = observer

    def reset(self, source: str) -> None:
        """End the run as a reset."""
        self._control.finish(Outcome(End.RESET, source))

    def shutdown(self, source: str) -> None:
        """End the run as a shutdown."""
        self._control.finish(Outcome(End.SHUTDOWN, source))

    def panic(self, source: str) -> None:
        """End the run as a panic."""
        self._control.finish(Outcome(End.PANIC, source))

    def exit(self, code: int, source: str) -> None:
        """End the run with an exit code."""
        self._control.finish(Outcome(End.EXITED, source, code=code))

    def queue_writes(self, port: int, queue: bool) -> None:
        """Have KVM queue writes to `port` (KVM_REGISTER_COALESCED_MMIO), or no longer."""
        if queue == (port in self._queued) or not self._vm.check_extension(_CAP_COALESCED_PIO):
            return
        if not queue:
            self._vm.stop_coalescing_writes(port, 1, port=True)
            self._queued.discard(port)
        elif self._control.queuing or not self._control.running:
            # A run that began without queued writes does not look for them: then not before the next run.
            self._control.queuing = True
            self._vm.coalesce_writes(port, 1, port=True)
            self._queued.add(port)

    def listen(self, source: "HostInput") -> None:
        """Have the host input thread call `source.ready()`."""
        self._host_events.add(source)

    def forget(self, source: "HostInput") -> None:
        """Have it do so no longer."""
        self._host_events.remove(source)

    @property
    def memory(self) -> "GuestMemory":
        """Guest-physical memory."""
        return self._vm.memory

    def write_event(
        self, kind: str, address: int, size: int, value: int, call: "Callable[[], object]"
    ) -> "IoEvent | None":
        """Have the host input thread call `call()` after such a write (ioeventfd), until the answer is closed."""
        if not self._vm.check_extension(_CAP_IOEVENTFD):
            return None
        from kvmpy.machine.guest_events import IoEvent

        return IoEvent(self._vm, self._host_events, kind, address, size, value, call)

    def interrupt_event(self, number: int) -> "IrqEvent | None":
        """Interrupt input `number`, raised by edges (irqfd). A tracer that observes levels sees a 1 and a 0."""
        if self._vm.irqchip != "full" or not self._vm.check_extension(_CAP_IRQFD):
            return None
        from kvmpy.machine.guest_events import IrqEvent

        self._interrupts.add(number)
        event = IrqEvent(self._vm, number, lambda: self._level_observer)
        self._control.edges.append(event.again)
        return event

    def allocate_mmio(self, size: int) -> int:
        """A free place for `size` bytes of registers, in pages of its own."""
        address, size = _MMIO_WINDOW, size + _PAGE - 1 & -_PAGE
        taken = [(region.start, region.start + region.length) for region in self._mmio.regions]
        taken += [(region.address, region.end) for region in self._vm.memory.regions]
        for start, end in sorted(taken):
            if start < address + size and address < end:
                address = end + _PAGE - 1 & -_PAGE
        return address

    def allocate_interrupt(self) -> int:
        """An interrupt input that no device has asked for yet, of those that a PC leaves to cards. When all are taken,
        the one that was given out first, and so on: devices can share one."""
        free = [number for number in _CARD_INTERRUPTS if number not in self._interrupts and number not in self._pins]
        number = free[0] if free else _CARD_INTERRUPTS[self._shared % len(_CARD_INTERRUPTS)]
        self._shared += not free
        self._interrupts.add(number)
        return number

    def timer(self, call: "Callable[[], object]") -> "HostTimer":
        """A timer that has the host input thread call `call()`; not set."""
        return self._host_events.timer(call)
