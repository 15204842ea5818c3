"""What devices see of the machine they are plugged into."""

from kvmpy.devices.device import NULL_LINE, InterruptLine
from kvmpy.errors import UsageError
from kvmpy.kvm import Vm
from kvmpy.machine.host_events import HostEvents
from kvmpy.machine.interrupts import InterruptPin, KvmInterruptLine
from kvmpy.machine.outcome import End, Outcome
from kvmpy.machine.run_control import RunControl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmpy.devices.host_input import HostInput
    from kvmpy.machine.host_timer import HostTimer
    from kvmpy.machine.interrupts import LevelObserver

__all__ = ["MachineBoard"]

_CAP_COALESCED_PIO = 162


class MachineBoard:
    """`kvmpy.devices.device.Board` over KVM. It does not know the machine, which refers to it: no circle, so that a
    machine's memory goes when the last reference to it does."""

    def __init__(self, vm: Vm, control: RunControl, host_events: HostEvents) -> None:
        self._vm = vm
        self._control = control
        self._host_events = host_events
        self._pins: dict[int, InterruptPin] = {}
        self._level_observer: LevelObserver | None = None
        self._queued: set[int] = set()

    def interrupt_line(self, number: int) -> InterruptLine:
        """A new line to interrupt input `number`; see `Machine.interrupt_line`."""
        if not isinstance(number, int) or number < 0:
            raise UsageError(f"an interrupt input is a number from 0 on, not {number!r}")
        if not self._vm.irqchip:
            return NULL_LINE
        pin = self._pins.setdefault(number, InterruptPin(self._vm, number, self._level_observer))
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

    def timer(self, call: "Callable[[], object]") -> "HostTimer":
        """A timer that has the host input thread call `call()`; not set."""
        return self._host_events.timer(call)
