"""What the threads of a machine agree on: whether to go on, to pause, or to leave, and how the run ended."""

import time
from threading import Condition, Lock, get_ident

from kvmpy.errors import ClosedError, UsageError
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine.outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Run", "RunControl"]


class Run:
    """One run, from `RunControl.begin` until all vCPUs have left it, and how it ended."""

    __slots__ = ("error", "outcome", "threads")

    def __init__(self) -> None:
        self.threads: dict[Vcpu, int] = {}
        """vCPU -> the thread that runs it; 0 as long as its thread has not come that far."""
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None


class RunControl:
    """Requests are recorded here first and then every vCPU is kicked; each looks here between two exits.

    `leaving`, `pausing` and `counting` are plain attributes that vCPU threads read without the lock: after a kick they
    are seen.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self.leaving = False
        self.pausing: tuple[object, ...] = ()
        """Who has the machine paused: threads by their ident, a debugger, and vCPUs, which do not pause themselves."""
        self._one_alone = Lock()
        """Held by the vCPU that made all others stand."""
        self._alone: tuple[Vcpu, object] | None = None
        """The one vCPU that runs on, and in whose pause: a debugger steps it while the others stand."""
        self.counting = False
        """Whether the vCPUs are made to stand so that all can be seen idle at the same time."""
        self.queuing = False
        """Whether KVM may queue writes instead of exiting: every loop has to look for them."""
        self.deadline: float | None = None
        self.timeout = 0.0
        self.closed = False
        self.vcpus: tuple[Vcpu, ...] = ()
        self._run = Run()
        """The present run, or the last one."""
        self.edges: list[Callable[[], object]] = []
        """Raise again, each by an edge, the interrupt inputs that are raised: for who has written a local APIC, which
        undoes what was raised at that moment."""
        self._kept: Vcpu | None = None
        """The vCPU that runs where `Machine.run` was called, which says itself when the run is over."""
        self._standing: set[Vcpu] = set()
        """Those that touch neither their vCPU nor a device, and will not while there is a pause."""
        self.verdict: Callable[[Outcome], Outcome] | None = None
        """Has the last word on how a run ends, if anybody knows better than what ended it."""
        self.end_listeners: list[Callable[[Outcome], None]] = []
        """Called with how a run ends, by whichever thread ends it, in the midst of it: they must be quick."""
        self._idle: set[Vcpu] = set()
        self._counted: set[Vcpu] = set()

    def begin(self, vcpus: tuple[Vcpu, ...], timeout: float | None, *, first_here: bool) -> Run:
        """A new run of these vCPUs, each of which has to `enter` and `leave`.

        `first_here`: the first one runs in this thread, and the run is not over before this thread calls `end`.
        Raises UsageError while a run is under way, or when this thread would wait for the end of its own pause.
        """
        with self._changed:
            if self.closed:
                raise ClosedError("the machine is closed")
            if self.running:
                raise UsageError("the machine is running already; stop() it, or wait() for it to end")
            if first_here:
                self._check_not_paused_here("run")
            self.vcpus = vcpus
            self.deadline = None if timeout is None else time.monotonic() + timeout
            self.timeout = timeout or 0.0
            self.leaving = False
            self._idle = set()
            self._standing = set(vcpus)
            self._kept = vcpus[0] if first_here else None
            self._run = run = Run()
            run.threads = dict.fromkeys(vcpus, 0)
            if first_here:
                run.threads[vcpus[0]] = get_ident()
            return run

    def end(self) -> None:
        """The thread that began the run is out of it, and vCPUs that were never started will not enter."""
        with self._changed:
            threads = self._run.threads
            for vcpu in [vcpu for vcpu, thread in threads.items() if not thread or vcpu is self._kept]:
                del threads[vcpu]
            self._changed.notify_all()

    # From anywhere

    def finish(self, outcome: Outcome) -> Outcome:
        """End the run. The first outcome counts: it is the answer."""
        with self._changed:
            if self._run.outcome is None:
                self._run.outcome = outcome = outcome if self.verdict is None else self.verdict(outcome)
                for listener in self.end_listeners:
                    listener(outcome)
            self.leave_all()
            return self._run.outcome

    def fail(self, error: BaseException) -> None:
        """End the run with an exception, to be raised by who waits for it."""
        with self._changed:
            if self._run.error is None:
                self._run.error = error
            self.leave_all()

    def leave_all(self, run: Run | None = None) -> bool:
        """Have every vCPU leave its loop after the exit that it is handling. False: `run` is over already."""
        with self._changed:
            if run is not None and not (run is self._run and run.threads):
                return False
            self.leaving = True
            self._changed.notify_all()
            self._kick(self._run.threads)
            return True

    def close(self) -> None:
        """End the run, wait until it has ended, and let no other begin."""
        with self._changed:
            self.closed = True
            self.leave_all()
        self.wait()

    def changing(self) -> Condition:
        """A context in which no pause, run or end begins in another thread."""
        return self._changed

    def thread_of(self, vcpu: Vcpu) -> int:
        """The thread that runs a vCPU now, 0 for none."""
        return self._run.threads.get(vcpu, 0)

    @property
    def running(self) -> bool:
        """Whether a run has begun that not all vCPUs have left."""
        return bool(self._run.threads)

    def called_from_the_run(self) -> bool:
        """Whether the calling thread runs a vCPU: it is in a handler, for which the run itself waits."""
        return get_ident() in self._run.threads.values()

    def wait(self, timeout: float | None = None) -> Run | None:
        """Wait until all vCPUs have left the present run. None: they have not, after `timeout` seconds."""
        with self._changed:
            run = self._run  # it may have ended, and the next one begun, before this thread wakes
            if run.threads and not self.leaving and timeout is None:
                self._check_not_paused_here("wait")
            return run if self._changed.wait_for(lambda: not run.threads, timeout) else None

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
            self._run.threads[vcpu] = get_ident()
            self._stand(vcpu)
            return not self.leaving

    def leave(self, vcpu: Vcpu) -> None:
        """A vCPU has left its loop."""
        with self._changed:
            if vcpu is self._kept:
                self._standing.add(vcpu)
            else:
                self._run.threads.pop(vcpu, None)
            self._changed.notify_all()

    def park(self, vcpu: Vcpu) -> None:
        """Wait, settled and released, until the pause is over; claimed again then, unless the run is left."""
        with self._changed:
            vcpu.release()
            self._stand(vcpu)
            if not self.leaving:
                vcpu.claim()

    def _stand(self, vcpu: Vcpu) -> None:
        while True:
            # Each time: `let_one_run` counts it as running before it wakes, and may be called off before, too.
            self._standing.add(vcpu)
            self._changed.notify_all()
            if self.leaving or not self.must_stand(vcpu):
                break
            self._changed.wait()
        self._standing.discard(vcpu)

    def must_stand(self, vcpu: Vcpu) -> bool:
        """Whether a pause holds this vCPU."""
        if not self.pausing:
            return False
        alone, owner_of_step = self._alone or (None, None)
        if alone is not vcpu:
            return any(owner is not vcpu for owner in self.pausing)
        return any(owner is not owner_of_step and not isinstance(owner, Vcpu) for owner in self.pausing)

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
            self.ask_to_stand(get_ident())
        try:
            self.wait_until_all_stand()
        except BaseException:
            self.resume()
            raise

    def ask_to_stand(self, owner: object) -> None:
        """Begin a pause without waiting for it, which a vCPU's own thread may do: it stands after the present exit."""
        with self._changed:
            self.pausing = (*self.pausing, owner)
            self._end_count()
            self._kick(self._run.threads)

    def wait_until_all_stand(self, timeout: float | None = None) -> bool:
        """Wait for the vCPUs that were asked to. False: some do not, after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(self._all_stand, timeout)

    def wait_until_others_stand(self, vcpu: Vcpu) -> bool:
        """The same for a vCPU's own thread, which waits for all the others. False: the run is to be left."""
        with self._changed:
            self._changed.wait_for(lambda: self.leaving or self._run.threads.keys() - {vcpu} <= self._standing)
            return not self.leaving

    def _all_stand(self) -> bool:
        return self._run.threads.keys() <= self._standing

    def resume(self, owner: object = None, *, forgive: float = 0.0) -> None:
        """End a pause of `owner`, by default this thread. The deadline comes `forgive` seconds later for it."""
        with self._changed:
            left = list(self.pausing)
            left.remove(get_ident() if owner is None else owner)
            self.pausing = tuple(left)
            if self._alone is not None and self._alone[1] not in left:
                self._alone = None
            if self.deadline is not None:
                self.deadline += forgive
            self._changed.notify_all()

    def begin_alone(self, vcpu: Vcpu) -> bool:
        """From a vCPU's own thread: have all other vCPUs stand until `end_alone`. False: the run is to be left.

        Of several that want to be alone one goes first, and the others stand meanwhile.
        """
        if len(self._run.threads) < 2:
            return True
        while not self._one_alone.acquire(blocking=False):
            self.park(vcpu)
            if self.leaving:
                return False
        self.ask_to_stand(vcpu)
        if self.wait_until_others_stand(vcpu):
            return True
        self.end_alone(vcpu)
        return False

    def end_alone(self, vcpu: Vcpu) -> None:
        """Let the others go on."""
        if vcpu in self.pausing:
            self.resume(vcpu)
            self._one_alone.release()

    def let_one_run(self, vcpu: Vcpu, owner: object) -> None:
        """Have one vCPU go on in the pause of `owner` while all others stand, until `let_none_run`."""
        with self._changed:
            self._alone = (vcpu, owner)
            self._standing.discard(vcpu)
            self._changed.notify_all()

    def let_none_run(self) -> None:
        """Have the vCPU of `let_one_run` stand again after its present exit."""
        with self._changed:
            if self._alone is not None:
                vcpu, self._alone = self._alone[0], None
                self._kick([vcpu])
