"""Running a machine: in the calling thread, in threads of its own, or for asyncio; stopping, pausing, how it ended."""

import threading
from contextlib import contextmanager, suppress

from kvmpy.errors import GuestFailed, UsageError
from kvmpy.machine.ctrl_c import CtrlC
from kvmpy.machine.inspection import Inspection
from kvmpy.machine.outcome import CRASHES, End, Outcome
from kvmpy.machine.run_control import Run
from kvmpy.machine.vcpu_runner import VcpuRunner
from kvmpy.machine.vcpu_threads import run_in_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

__all__ = ["Running", "join"]


class Running(Inspection):
    """The methods of `Machine` that run it."""

    _threads: list[threading.Thread]

    def run(self, timeout: float | None = None, *, check: bool = False) -> Outcome:
        """Run the guest in this thread (further processors in their own) until it ends, and say how.

        After `timeout` seconds the outcome is End.TIMEOUT; the next `run` goes on where the guest was. `check` raises
        GuestFailed unless the outcome is ok. What a device handler raises comes out here, the access not handled: the
        next run presents it again (all of it, when it was split between devices; of a string, what is left). Ctrl-C
        raises KeyboardInterrupt between two exits, so that the next run goes on.
        """
        return self._run_here(self._runners, timeout, check)

    def _run_here(self, runners: list[VcpuRunner], timeout: float | None, check: bool) -> Outcome:
        """Run some of the processors, the first of them in this thread."""
        with CtrlC(self._control.leave_all) as ctrl_c:
            run = self._begin(runners, timeout, first_here=True)
            try:
                if not ctrl_c.seen:  # perhaps just before `begin`
                    self._start_threads(runners[1:])
                    runners[0].run()
            finally:
                ctrl_c.deferred = True
                self._control.leave_all(run)
                ctrl_c.deferred = False  # a handler of another processor may never return
                try:
                    join(self._threads)
                finally:
                    ctrl_c.deferred = True
                    self._control.end()
        if ctrl_c.seen and run.error is None:
            raise KeyboardInterrupt
        return self._result(run, check)

    def start(self, timeout: float | None = None) -> None:
        """Run the guest in threads of its own; `wait` for its end, or `stop` it. `timeout` as in `run`."""
        run = self._begin(self._runners, timeout, first_here=False)
        try:
            self._start_threads(self._runners)
        except BaseException:
            self._end(run)
            raise

    def wait(self, timeout: float | None = None, *, check: bool = False) -> Outcome:
        """Wait for the end of what `start` began. Raises TimeoutError after `timeout` seconds; the guest runs on.

        Raises UsageError where it would wait for itself: in a handler, and without `timeout` while this thread has the
        machine paused.
        """
        if self._control.called_from_the_run():
            raise UsageError("a device handler cannot wait for the end of the run that waits for its answer")
        threads = self._threads
        run = self._control.wait(timeout)
        if run is None:
            raise TimeoutError(f"the guest still runs after {timeout:g} seconds")
        join(threads)
        return self._result(run, check)

    def stop(self) -> Outcome:
        """End the run from another thread, or from a device handler; the next run goes on where the guest was.

        Returns when all processors have left the guest; called from a handler, it returns at once.
        """
        threads = self._threads
        outcome = self._control.finish(Outcome(End.STOPPED))
        if not self._control.called_from_the_run():
            self._control.wait()
            join(threads)
        return outcome

    async def run_async(self, timeout: float | None = None, *, check: bool = False) -> Outcome:
        """`run` for asyncio: the guest runs in its own threads; cancelling stops it."""
        import asyncio

        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            self._control.wait()
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(ended.set)

        run = self._begin(self._runners, timeout, first_here=False)
        try:
            self._start_threads(self._runners)
            # A thread of its own: the loop's executor has few, which other machines may occupy for ever.
            threading.Thread(target=tell, name="kvmpy end of the run", daemon=True).start()
            await ended.wait()
        except BaseException:
            self._end(run)
            raise
        return self._result(run, check)

    @contextmanager
    def paused(self) -> "Iterator[Self]":
        """Within this context all processors stand between two exits, their state complete and open to this thread.

        Handlers that are at work are waited for, so the caller must hold nothing that they need. Deadlines go on. After
        a handler raised, its access waits to be presented again, and the instruction is not complete.
        """
        self._control.pause()
        try:
            yield self
        finally:
            self._control.resume()

    @property
    def running(self) -> bool:
        """Whether a processor is in the guest or handling an exit."""
        return self._control.running

    def _begin(self, runners: list[VcpuRunner], timeout: float | None, *, first_here: bool) -> Run:
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout == timeout):  # NaN is not
            raise UsageError(f"a timeout is a number of seconds, or None, not {timeout!r}")
        return self._control.begin(tuple(runner.vcpu for runner in runners), timeout, first_here=first_here)

    def _start_threads(self, runners: list[VcpuRunner]) -> None:
        self._threads = []
        for runner in runners:
            self._threads.append(run_in_thread(runner, self._control))

    def _end(self, run: Run) -> None:
        """Have all processors leave a run that this thread began, those that could not even be started included."""
        threads = self._threads
        if self._control.leave_all(run):
            join(threads)
            self._control.end()

    def _result(self, run: Run, check: bool) -> Outcome:
        if run.error is not None:
            raise run.error
        outcome = run.outcome or Outcome(End.STOPPED)
        if any(runner.completion is not None for runner in self._runners):
            outcome.completed = self.statistics().completed
        if self.crash_reports and outcome.end in CRASHES and outcome.report is None:
            outcome.report = self.crash_report(outcome)
        if check and not outcome.ok:
            raise GuestFailed(outcome)
        return outcome


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join()
