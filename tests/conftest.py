"""What holds for every test: what needs KVM, how long it may take, how many examples it tries.

* Tests under tests/guest/ carry the marker `kvm`, those under tests/linux/ also `linux` and `slow`. What `kvm` means is
  kvmpy's own pytest plugin: the test runs only where a VM can really be created; elsewhere it is skipped with the
  reason, or fails under KVMPY_REQUIRE_KVM=1 or --require-kvm.
* Slow tests come last, each announced by name.
* No phase of a test (set-up, call, tear-down) outlives its deadline, nor the end of the session FAST_DEADLINE. See
  `_Deadline`.
* All this holds in the workers of pytest-xdist, too: what they write to the terminal goes to the session's standard
  error, and a worker that ends for want of an answer fails its test, and is replaced.
* Hypothesis profiles: see fuzz_settings.py.
* Leaks count: `filterwarnings = error` makes pytest fail a test for a ResourceWarning, for an exception that a thread
  did not catch, and for one raised in a finalizer.
"""

import faulthandler
import os
import signal
from collections.abc import Generator
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, settings

from fuzz_settings import FUZZ_EXAMPLES, PROFILE, PROPERTY_EXAMPLES
from kvmpy.pytest_plugin.requirement import is_required, kvm_problem

TESTS = Path(__file__).parent

FAST_DEADLINE = 60.0
"""Seconds that a phase of a test may take, unless `@pytest.mark.deadline(seconds)` says otherwise."""

SLOW_DEADLINE = 600.0
"""The same for tests marked `slow`, and for those of Hypothesis with the examples of the profile `ci`."""

GRACE = 2.0
"""Seconds that a test may take in addition to twice its deadline before the process is ended."""

_standard_error = pytest.StashKey[int]()


class DeadlineExceeded(BaseException):
    """A test took too long.

    Like KeyboardInterrupt no Exception, so that neither `except Exception` nor Hypothesis (which would look for a
    smaller example that takes too long as well) holds it up.
    """


class _Deadline:
    """A limit on one phase of a test, in seconds, that works without any plugin.

    SIGALRM at the deadline raises DeadlineExceeded in the main thread, so the test fails and the session goes on; again
    after half as long, in case the first was swallowed (Python drops what is raised in a finalizer). Tests and library
    leave SIGALRM alone. Against C code or a kernel call that never returns there is `_last_resort`,
    at twice the deadline.
    """

    def __init__(self, seconds: float, name: str) -> None:
        self._seconds = seconds
        self._name = name
        self._armed = False

    def __enter__(self) -> None:
        self._armed = True
        self._previous = signal.signal(signal.SIGALRM, self._expired)
        signal.setitimer(signal.ITIMER_REAL, self._seconds, self._seconds / 2)

    def __exit__(self, *_: object) -> None:
        # A signal that came before the timer stopped may still be on its way to the Python handler.
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._previous)

    def _expired(self, _signal: int, _frame: FrameType | None) -> None:
        if self._armed:
            raise DeadlineExceeded(f"{self._name} took more than {self._seconds:g} seconds")


def _last_resort(seconds: float, config: pytest.Config) -> None:
    """In so many seconds write the stacks of all threads and end the process, unless called again or cancelled before.

    By faulthandler's own thread, which needs no GIL.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=config.stash[_standard_error])


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts background jobs with SIGINT ignored, and so do some CI systems; children would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Capturing is suspended here: this descriptor stays the terminal's (or the log's) while tests have another one.
    config.stash[_standard_error] = os.dup(2)
    not_timed = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    for name, examples in (("property", PROPERTY_EXAMPLES[PROFILE]), ("fuzz", FUZZ_EXAMPLES)):
        settings.register_profile(name, max_examples=examples, print_blob=PROFILE == "ci", **not_timed)  # type: ignore[arg-type]
    settings.load_profile("property")


def pytest_sessionfinish(session: pytest.Session) -> None:
    # A thread that somebody left behind would keep the process for ever. Workers are ended by their session's process.
    if not session.config.getoption("usepdb") and not hasattr(session.config, "workerinput"):
        _last_resort(FAST_DEADLINE, session.config)


def pytest_report_header() -> list[str]:
    return [
        f"kvm: {kvm_problem() or 'a VM can be created'}",
        f"hypothesis: profile {PROFILE}, {PROPERTY_EXAMPLES[PROFILE]} examples a test, {FUZZ_EXAMPLES} in tests/fuzz",
    ]


def _folder(path: Path) -> str:
    """The folder directly below tests/ that holds `path`, or nothing."""
    return path.relative_to(TESTS).parts[0] if path.is_relative_to(TESTS) else ""


def pytest_collectstart(collector: pytest.Collector) -> None:
    # A test takes the profile that is loaded while its module is imported, which comes next.
    if isinstance(collector, pytest.Module):
        settings.load_profile("fuzz" if _folder(collector.path) == "fuzz" else "property")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        match _folder(item.path):
            case "guest":
                item.add_marker(pytest.mark.kvm)
            case "linux":
                item.add_marker(pytest.mark.kvm)
                item.add_marker(pytest.mark.linux)
                item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def _seconds_allowed(item: pytest.Item) -> float:
    marker = item.get_closest_marker("deadline")
    if marker is not None:
        (seconds,) = marker.args
        return float(seconds)
    tries_examples = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    if item.get_closest_marker("slow") or (PROFILE == "ci" and tries_examples):
        return SLOW_DEADLINE
    return FAST_DEADLINE


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    # For all phases together: starting and joining that thread costs more than most tests do.
    if item.config.getoption("usepdb"):
        return (yield)
    _last_resort(2 * _seconds_allowed(item) + GRACE, item.config)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _run_phase(item: pytest.Item, phase: str) -> Generator[None, object, object]:
    if item.config.getoption("usepdb"):
        return (yield)
    with _Deadline(_seconds_allowed(item), f"{phase} of {item.nodeid}"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    if item.get_closest_marker("slow"):
        _announce(item)
    return (yield from _run_phase(item, "set-up"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _run_phase(item, "call"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _run_phase(item, "tear-down"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where everything must run, a tool that is not installed is a failure too, and not a skip that nobody reads."""
    report = yield
    if report.skipped and is_required(item.config) and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if "Debian package" in reason:
            report.outcome = "failed"
            report.longrepr = f"KVM and tools are required here, but this test was to be skipped: {reason}"
    return report


def _announce(item: pytest.Item) -> None:
    """Say which slow test begins, so that a log shows what takes its time."""
    if hasattr(item.config, "workerinput"):
        os.write(item.config.stash[_standard_error], f"\nslow: {item.nodeid} ".encode())
        return
    reporter = item.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.verbosity == 0:
        reporter.ensure_newline()
        reporter.write(f"slow: {item.nodeid} ", flush=True)
