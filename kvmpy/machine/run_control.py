"""What the threads of a machine agree on: whether to go on, to pause, or to leave, and how the run ended."""

import threading

from kvmpy.errors import UsageError
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine.outcome import Outcome

__all__ = ["RunControl"]


class RunControl:
    """Requests are recorded here first and then every vCPU is kicked; each looks here between two exits.

    `leaving` and `pausing` are plain attributes that vCPU threads read without the lock: after a kick they are seen.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.leaving = False
        self.pausing = 0
        self.deadline: float | None = None
        self.timeout = 0.0
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self.interrupted = False
        """Ctrl-C came: the run is left and KeyboardInterrupt raised where it was started."""
        self._inside: dict[Vcpu, int] = {}
        self._parked: set[Vcpu] = set()
        self._idle: dict[Vcpu, int] = {}
        self.vcpus: tuple[Vcpu, ...] = ()

    def begin(self, vcpus: tuple[Vcpu, ...], deadline: float | None, timeout: float) -> None:
        """A new run of these vCPUs. Raises UsageError while one is under way."""
        with self._changed:
            if self._inside:
                raise UsageError("the machine is running already; stop() it, or wait() for it to end")
            self.vcpus = vcpus
            self.deadline, self.timeout = deadline, timeout
            self.outcome = self.error = None
            self.leaving = self.interrupted = False
            self._idle = dict.fromkeys(vcpus, 0)

    # From anywhere

    def finish(self, outcome: Outcome) -> None:
        """End the run. The first outcome counts."""
        with self._changed:
            if self.outcome is None:
                self.outcome = outcome
        self.leave_all()

    def fail(self, error: BaseException) -> None:
        """End the run with an exception, to be raised by who waits for it."""
        with self._changed:
            if self.error is None:
                self.error = error
        self.leave_all()

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.interrupted = True
        self.leave_all()

    def leave_all(self) -> None:
        """Have every vCPU leave its loop after the exit that it is handling."""
        self.leaving = True
        with self._changed:
            self._changed.notify_all()
        for vcpu in self.vcpus:
            if not vcpu.closed:
                vcpu.kick()

    @property
    def running(self) -> bool:
        """Whether any vCPU is in its loop."""
        return bool(self._inside)

    def wait_until_left(self) -> bool:
        """Return when no vCPU is in its loop. False, at once, when the calling thread is in one itself."""
        with self._changed:
            if threading.get_ident() in self._inside.values():
                return False
            while self._inside:
                self._changed.wait()
            return True

    # From vCPU threads

    def enter(self, vcpu: Vcpu) -> bool:
        """A vCPU is about to run. False: the run is over already."""
        with self._changed:
            while self.pausing and not self.leaving:
                self._changed.wait()
            if self.leaving:
                return False
            self._inside[vcpu] = threading.get_ident()
            return True

    def leave(self, vcpu: Vcpu) -> None:
        """A vCPU has left its loop."""
        with self._changed:
            self._inside.pop(vcpu, None)
            self._changed.notify_all()

    def park(self, vcpu: Vcpu) -> None:
        """Wait, settled and released, until the pause is over."""
        with self._changed:
            self._parked.add(vcpu)
            self._changed.notify_all()
            while self.pausing and not self.leaving:
                self._changed.wait()
            self._parked.discard(vcpu)

    def all_idle(self, vcpu: Vcpu, ticks: int) -> bool:
        """Note for how many ticks `vcpu` could not go on; whether none can."""
        with self._changed:
            self._idle[vcpu] = ticks
            enough = 1 if len(self.vcpus) == 1 else 2
            return all(self._idle.get(other, 0) >= enough for other in self.vcpus)

    # Pausing

    def pause(self) -> None:
        """Stop all vCPUs between two exits, every pending operation completed. Returns when they stand."""
        with self._changed:
            if threading.get_ident() in self._inside.values():
                raise UsageError(
                    "a device handler cannot pause the machine that waits for its answer; use another thread"
                )
            self.pausing += 1
        for vcpu in self.vcpus:
            if not vcpu.closed:
                vcpu.kick()
        with self._changed:
            while any(vcpu not in self._parked for vcpu in self._inside):
                self._changed.wait()

    def resume(self) -> None:
        """End a pause."""
        with self._changed:
            self.pausing -= 1
            self._changed.notify_all()
