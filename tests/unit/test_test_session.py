"""What tests/conftest.py promises, tried on a session of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy.pytest_plugin import requirement

ROOT = Path(__file__).parents[2]

UNIT = """
import gc, os, signal, threading, time, warnings
import pytest
from hypothesis import given, settings, strategies

@pytest.mark.deadline(0.2)
def test_sleeps():
    time.sleep(30)

@pytest.mark.deadline(0.2)
def test_catches_every_exception():
    while True:
        try:
            time.sleep(30)
        except Exception:
            pass

class Swallows:
    def __del__(self):
        time.sleep(30)

@pytest.mark.deadline(0.2)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_loses_the_first_alarm_in_a_finalizer():
    Swallows()
    time.sleep(30)

@pytest.mark.deadline(0.2)
@given(strategies.integers())
def test_has_slow_examples(number):
    time.sleep(30)

@pytest.fixture
def hanging_fixture():
    yield
    time.sleep(30)

@pytest.mark.deadline(0.2)
def test_hangs_in_tear_down(hanging_fixture):
    pass

@pytest.mark.slow
def test_slow():
    pass

def test_leaks_a_file():
    open(os.devnull)
    gc.collect()

def test_loses_an_exception_of_a_thread():
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()

def test_warns():
    warnings.warn("mind the gap")

def test_passes_after_all_that():
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
    assert settings().max_examples == 50
"""

FUZZ = """
from hypothesis import given, strategies

tried = 0

@given(strategies.integers())
def test_fuzz(number):
    global tried
    tried += 1

def test_fuzz_tried_its_number():
    assert tried == 77
"""

GUEST = """
def test_guest():
    pass
"""

STUCK = """
import signal, time, pytest

@pytest.mark.deadline(0.3)
def test_stuck():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(30)
"""


LEAVES_A_THREAD = """
import threading, time

def test_leaves_a_thread():
    threading.Thread(target=time.sleep, args=(30,), daemon=False).start()
"""


def run_session(folder: Path, files: dict[str, str], *options: str, **environment: str) -> tuple[int, str]:
    """Run pytest with this project's settings on `files`; give its exit status and all that it wrote."""
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("conftest.py", "fuzz_settings.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    for name, text in files.items():
        path = folder / "tests" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    unset = ("KVMPY_REQUIRE_KVM", "HYPOTHESIS_PROFILE", "KVMPY_FUZZ_EXAMPLES", "PYTEST_ADDOPTS")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        command, cwd=folder, env=inherited | {"COLUMNS": "200"} | environment, text=True, timeout=50,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The outcome of each test above, by name; errors of a set-up or tear-down win."""
    files = {"unit/test_unit.py": UNIT, "fuzz/test_fuzz.py": FUZZ, "guest/test_guest.py": GUEST}
    _, log = run_session(tmp_path_factory.mktemp("session"), files, "-rA", KVMPY_FUZZ_EXAMPLES="77")
    outcomes = {}
    for outcome, name, reason in re.findall(r"^(PASSED|FAILED|ERROR) \S+::(\w+)(.*)", log, re.MULTILINE):
        outcomes[name] = outcome + reason
    outcomes["log"] = log
    return outcomes


@pytest.mark.parametrize(
    "name",
    [
        "test_sleeps",
        "test_catches_every_exception",
        "test_loses_the_first_alarm_in_a_finalizer",
        "test_has_slow_examples",
    ],
)
def test_a_test_that_hangs_fails_at_its_deadline(session: dict[str, str], name: str) -> None:
    assert session[name].startswith("FAILED"), session["log"]
    assert re.search(rf"DeadlineExceeded: call of \S+::{name} took more than 0.2 seconds", session["log"])


def test_a_tear_down_that_hangs_is_an_error(session: dict[str, str]) -> None:
    assert session["test_hangs_in_tear_down"].startswith("ERROR"), session["log"]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("test_leaks_a_file", "ResourceWarning"),
        ("test_loses_an_exception_of_a_thread", "ZeroDivisionError"),
        ("test_warns", "mind the gap"),
    ],
)
def test_what_would_be_a_warning_elsewhere_fails(session: dict[str, str], name: str, cause: str) -> None:
    assert session[name].startswith("FAILED"), session["log"]
    assert cause in session["log"]


def test_the_session_goes_on_after_a_deadline(session: dict[str, str]) -> None:
    assert session["test_passes_after_all_that"].startswith("PASSED"), session["log"]


def test_the_fuzz_folder_has_its_own_number_of_examples(session: dict[str, str]) -> None:
    assert session["test_fuzz_tried_its_number"].startswith("PASSED"), session["log"]


def test_slow_tests_are_announced_and_come_last(session: dict[str, str]) -> None:
    progress = session["log"].split("collected")[1].split("===")[0]
    others, _, last = progress.partition("\nslow: tests/unit/test_unit.py::test_slow ")
    assert others.count("test_") == 3, "one line for each file"
    assert "test_" not in last
    assert session["test_slow"].startswith("PASSED")


@pytest.mark.parametrize(("profile", "seconds"), [("dev", 60), ("ci", 600)])
def test_a_test_that_tries_examples_has_longer_in_ci(tmp_path: Path, profile: str, seconds: int) -> None:
    source = """
import signal
from hypothesis import given, settings, strategies

@settings(max_examples=1)
@given(strategies.integers())
def test_tries(number):
    print("left", signal.getitimer(signal.ITIMER_REAL)[0])
"""
    status, log = run_session(tmp_path, {"unit/test_tries.py": source}, "-s", HYPOTHESIS_PROFILE=profile)
    assert status == 0, log
    (left,) = re.findall(r"left (\S+)", log)
    assert seconds / 2 < float(left) <= seconds


def test_code_that_never_returns_ends_the_process_with_its_stacks(tmp_path: Path) -> None:
    status, log = run_session(tmp_path, {"unit/test_stuck.py": STUCK})
    assert status == 1
    assert "Timeout (0:00:02.600000)!" in log
    assert "in test_stuck" in log


def test_a_thread_that_is_left_behind_does_not_keep_the_session(tmp_path: Path) -> None:
    conftest = (ROOT / "tests" / "conftest.py").read_text().replace("FAST_DEADLINE = 60.0", "FAST_DEADLINE = 2.5")
    status, log = run_session(tmp_path, {"unit/test_leaves.py": LEAVES_A_THREAD, "conftest.py": conftest})
    assert status == 1
    assert "1 passed" in log
    assert "Timeout (0:00:02.500000)!" in log


def test_workers_keep_deadlines_and_announce_slow_tests_too(tmp_path: Path) -> None:
    """A test that never returns costs its worker, and the next one goes on with the rest."""
    slow = "import pytest\n@pytest.mark.slow\ndef test_slow():\n    pass\n"
    hangs = "import pytest, time\n@pytest.mark.deadline(0.2)\ndef test_hangs():\n    time.sleep(30)\n"
    files = {"unit/test_a_stuck.py": STUCK, "unit/test_hangs.py": hangs, "unit/test_slow.py": slow}
    status, log = run_session(tmp_path, files, "-n", "1", "--dist", "worksteal")
    assert status == 1
    assert "2 failed, 1 passed" in log, log
    assert "Timeout (0:00:02.600000)!" in log
    assert "in test_stuck" in log
    assert "DeadlineExceeded: call of tests/unit/test_hangs.py::test_hangs took more than 0.2 seconds" in log
    assert "\nslow: tests/unit/test_slow.py::test_slow " in log


def test_a_guest_test_without_kvm_skips_with_the_reason_or_fails_where_kvm_is_required(tmp_path: Path) -> None:
    # The conftest of the folder stands for a computer without the device.
    no_device = """
from kvmpy.pytest_plugin import requirement
requirement.kvm_problem = lambda: "/dev/kvm cannot be opened: No such device"
"""
    files = {"guest/test_guest.py": GUEST, "guest/conftest.py": no_device}
    for folder, required, status, outcome in (("a", "", 0, "SKIPPED [1]"), ("b", "1", 1, "ERROR tests/guest")):
        (tmp_path / folder).mkdir()
        result, log = run_session(tmp_path / folder, files, "-rA", KVMPY_REQUIRE_KVM=required)
        assert result == status, log
        assert re.search(rf"^{re.escape(outcome)}.*/dev/kvm cannot be opened: No such device", log, re.MULTILINE), log


def test_a_missing_package_skips_with_the_reason_or_fails_where_kvm_is_required(tmp_path: Path) -> None:
    source = """
import pytest

def test_skips():
    pytest.skip("needs `frobnicate` (Debian package frob)")

@pytest.mark.skipif(True, reason="needs `frobnicate` (Debian package frob)")
def test_is_marked():
    pass

def test_skips_for_the_host():
    pytest.skip("this host cannot")
"""
    for folder, required, status, counts in (("a", "", 0, "3 skipped"), ("b", "1", 1, "2 failed|1 failed.*1 error")):
        (tmp_path / folder).mkdir()
        result, log = run_session(tmp_path / folder, {"unit/test_tool.py": source}, "-rA", KVMPY_REQUIRE_KVM=required)
        assert result == status, log
        assert re.search(counts, log), log
        assert "Debian package frob" in log


def test_the_marker_selects_guest_tests(tmp_path: Path) -> None:
    files = {"guest/test_guest.py": GUEST, "unit/test_other.py": "def test_other():\n    pass\n"}
    _, log = run_session(tmp_path, files, "-m", "not kvm", "--collect-only", "-q")
    assert "test_other" in log
    assert "test_guest" not in log


def test_a_missing_device_is_named() -> None:
    problem = requirement.kvm_problem("/dev/no-such-device")
    assert problem is not None
    assert problem.startswith("/dev/no-such-device cannot be opened: No such file or directory: ")
    assert "docker run --device /dev/no-such-device" in problem


def test_another_device_in_its_place_is_recognized() -> None:
    assert requirement.kvm_problem("/dev/null") == (
        "/dev/null is no KVM device: KVM_GET_API_VERSION says Inappropriate ioctl for device"
    )


@pytest.mark.kvm
def test_looking_for_kvm_leaves_no_descriptor_open() -> None:
    before = os.listdir("/proc/self/fd")
    assert requirement.kvm_problem.__wrapped__() is None
    assert os.listdir("/proc/self/fd") == before
