"""What the threads of a machine agree on: whether to go on, to pause, or to leave, and how the run ended."""

import time
from threading import Condition, get_ident

from kvmpy.errors import ClosedError, UsageError
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine.outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["RunControl"]


class RunControl:
    """Requests are recorded here first and then every vCPU is kicked; each looks here between two exits.

    `leaving`, `pausing` and `counting` are plain attributes that vCPU threads read without the lock: after a kick they
    are seen.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self.leaving = False
        self.pausing: tuple[int, ...] = ()
        """The threads that have the machine paused."""
        self.counting = False
        """Whether the vCPUs are made to stand so that all can be seen idle at the same time."""
        self.deadline: float | None = None
        self.timeout = 0.0
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self.closed = False
        self.vcpus: tuple[Vcpu, ...] = ()
        self._threads: dict[Vcpu, int] = {}
        """vCPU -> the thread that runs it in this run; 0 as long as its thread has not come that far."""
        self._standing: set[Vcpu] = set()
        """Those that touch neither their vCPU nor a device, and will not while there is a pause."""
        self._idle: set[Vcpu] = set()
        self._counted: set[Vcpu] = set()

    def begin(self, vcpus: tuple[Vcpu, ...], timeout: float | None, *, first_here: bool) -> None:
        """A new run of these vCPUs, the first one perhaps in this thread; each has to `leave`.

        Raises UsageError while a run is under way, or when this thread would wait for the end of its own pause.
        """
        with self._changed:
            if self.closed:
                raise ClosedError("the machine is closed")
            if self._threads:
                raise UsageError("the machine is running already; stop() it, or wait() for it to end")
            if first_here:
                self._check_not_paused_here("run")
            self.vcpus = vcpus
            self.deadline = None if timeout is None else time.monotonic() + timeout
            self.timeout = timeout or 0.0
            self.outcome = self.error = None
            self.leaving = False
            self._idle = set()
            self._standing = set(vcpus)
            self._threads = dict.fromkeys(vcpus, 0)
            if first_here:
                self._threads[vcpus[0]] = get_ident()

    # From anywhere

    def finish(self, outcome: Outcome) -> Outcome:
        """End the run. The first outcome counts: it is the answer."""
        with self._changed:
            if self.outcome is None:
                self.outcome = outcome
            self.leave_all()
            return self.outcome

    def fail(self, error: BaseException) -> None:
        """End the run with an exception, to be raised by who waits for it."""
        with self._changed:
            if self.error is None:
                self.error = error
            self.leave_all()

    def leave_all(self) -> None:
        """Have every vCPU leave its loop after the exit that it is handling."""
        with self._changed:
            self.leaving = True
            self._changed.notify_all()
            self._kick(self._threads)

    def end(self) -> None:
        """No vCPU is in its loop, and none will enter it."""
        with self._changed:
            self._threads.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """End the run, wait until it has ended, and let no other begin."""
        with self._changed:
            self.closed = True
            self.leave_all()
        self.wait()

    @property
    def running(self) -> bool:
        """Whether a run has begun that not all vCPUs have left."""
        return bool(self._threads)

    def called_from_the_run(self) -> bool:
        """Whether the calling thread runs a vCPU: it is in a handler, for which the run itself waits."""
        return get_ident() in self._threads.values()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all vCPUs have left the present run. False: they have not, after `timeout` seconds."""
        with self._changed:
            run = self._threads
            if not self.leaving and timeout is None and run:
                self._check_not_paused_here("wait")
            # The run may have ended and the next one begun before this thread wakes.
            return self._changed.wait_for(lambda: not run or run is not self._threads, timeout)

    def _kick(self, vcpus: "Iterable[Vcpu]") -> None:
        for vcpu in vcpus:
            if not vcpu.closed:
                vcpu.kick()

    def _check_not_paused_here(self, what: str) -> None:
        if get_ident() in self.pausing:
            raise UsageError(f"{what}() would wait for ever: this thread has paused the machine")

    # From vCPU threads

    def enter(self, vcpu: Vcpu) -> bool:
        """A vCPU is about to run. False: the run is over already."""
        with self._changed:
            self._threads[vcpu] = get_ident()
            self._stand(vcpu)
            return not self.leaving

    def leave(self, vcpu: Vcpu) -> None:
        """A vCPU has left its loop."""
        with self._changed:
            self._threads.pop(vcpu, None)
            self._changed.notify_all()

    def park(self, vcpu: Vcpu) -> None:
        """Wait, settled and released, until the pause is over; claimed again then, unless the run is left."""
        with self._changed:
            vcpu.release()
            self._stand(vcpu)
            if not self.leaving:
                vcpu.claim()

    def _stand(self, vcpu: Vcpu) -> None:
        self._standing.add(vcpu)
        self._changed.notify_all()
        while self.pausing and not self.leaving:
            self._changed.wait()
        self._standing.discard(vcpu)

    def all_idle(self, vcpu: Vcpu, waits_for_ever: "Callable[[Vcpu], bool]") -> bool:
        """Whether no vCPU can go on; `vcpu`, which calls, is between two exits and may be made to wait for the others.

        One that was seen idle may have been woken since by one that is idle itself now. So when all have been seen
        idle, they come here, out of the guest, and the last one looks at them all.
        """
        idle = waits_for_ever(vcpu)
        with self._changed:
            if not idle:
                self._idle.discard(vcpu)
                self._end_count()
                return False
            self._idle.add(vcpu)
            if len(self._idle) < len(self.vcpus) or self.pausing or self.leaving:
                return False
            self._counted.add(vcpu)
            if len(self._counted) == len(self.vcpus):
                idle = all(waits_for_ever(other) for other in self.vcpus)
                self._idle.clear()
                self._end_count()
                return idle
            if not self.counting:
                self.counting = True
                self._kick(other for other in self.vcpus if other is not vcpu)
            vcpu.release()
            while vcpu in self._counted and not self.leaving:
                self._changed.wait()
            if not self.leaving:
                vcpu.claim()
            return False

    def _end_count(self) -> None:
        if self._counted:
            self.counting = False
            self._counted.clear()
            self._changed.notify_all()

    # Pausing

    def pause(self) -> None:
        """Stop all vCPUs between two exits, every pending operation completed. Returns when they stand."""
        with self._changed:
            if self.called_from_the_run():
                raise UsageError(
                    "a device handler cannot pause the machine that waits for its answer; use another thread"
                )
            self.pausing = (*self.pausing, get_ident())
        try:
            with self._changed:
                self._end_count()
                self._kick(self._threads)
                while not self._threads.keys() <= self._standing:
                    self._changed.wait()
        except BaseException:
            self.resume()
            raise

    def resume(self) -> None:
        """End a pause of this thread."""
        with self._changed:
            left = list(self.pausing)
            left.remove(get_ident())
            self.pausing = tuple(left)
            self._changed.notify_all()
