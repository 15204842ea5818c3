"""The pytest plugin where no guest runs: what loading it costs, markers and options, and what a missing thing means."""

import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy import End, Outcome, pytest_plugin
from kvmpy.devices import ConsoleOutput
from kvmpy.pytest_plugin import requirement
from kvmpy.pytest_plugin.deadline import Deadline
from kvmpy.pytest_plugin.guests import Guests

pytest_plugins = ("pytester",)

LEAN = ("-p", "no:hypothesispytest", "-p", "no:xdist", "-p", "no:cacheprovider")
"""Plugins that the sessions in here do without: they cost half a second each."""

NO_DEVICE = """
import functools
from kvmpy.pytest_plugin import requirement

requirement.kvm_problem = functools.partial(requirement.kvm_problem, "/dev/no-such-device")
"""
"""A conftest that stands for a computer without KVM."""


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A place for sessions that do not inherit what ours requires."""
    for name in ("KVMPY_REQUIRE_KVM", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    return pytester


def run(session: pytest.Pytester, *options: str) -> pytest.RunResult:
    return session.runpytest_subprocess(*LEAN, *options, timeout=50)


def test_loading_it_loads_nothing_else() -> None:
    program = (
        "import sys, pytest; before = set(sys.modules); import kvmpy.pytest_plugin; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert set(done.stdout.split()) == {"kvmpy", "kvmpy.pytest_plugin"}


def test_a_session_without_guests_loads_nothing_of_kvmpy(session: pytest.Pytester) -> None:
    session.makeconftest(
        """
        import sys
        def pytest_unconfigure():
            print("loaded:", *sorted(name for name in sys.modules if name.split(".")[0] in ("kvmpy", "elftools")))
        """
    )
    session.makepyfile("def test_passes(tmp_path): pass\ndef test_fails(): assert 0")
    result = run(session)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["plugins: *kvmpy-*", "loaded: kvmpy kvmpy.pytest_plugin"])


def test_every_public_name_is_the_type_of_a_fixture_or_of_what_it_gives() -> None:
    for name in pytest_plugin.__all__:
        assert getattr(pytest_plugin, name).__name__ == name
    name = "KvmNothing"
    with pytest.raises(AttributeError, match="no attribute 'KvmNothing'"):
        getattr(pytest_plugin, name)


def test_fixtures_marker_and_options_explain_themselves(session: pytest.Pytester) -> None:
    fixtures = session.runpytest_inprocess(*LEAN, "--fixtures").stdout.str()
    for name in ("kvm_machine", "kvm_boot", "kvm_vcpu", "kvm_guest_asm", "kvm_guest_c", "kvm_tap"):
        assert f"{name} -- " in fixtures
    assert "no docstring" not in fixtures.partition("kvm_machine")[2].partition("\n\n\n")[0]
    session.runpytest_inprocess(*LEAN, "--markers").stdout.fnmatch_lines(["@pytest.mark.kvm(deadline=None): *skipped*"])
    session.runpytest_inprocess(*LEAN, "--help").stdout.fnmatch_lines(["*--require-kvm *", "*kvm_deadline (string):*"])


NEEDS_KVM = """
    import pytest

    @pytest.mark.kvm
    def test_marked(): pass

    def test_boots(kvm_boot): pass
    def test_makes_machines(kvm_machine): pass
    def test_has_a_vcpu(kvm_vcpu): pass

    def test_asks_late(request):
        request.getfixturevalue("kvm_boot")

    @pytest.mark.kvm
    class TestClass:
        def test_in_a_class(self): pass

    def test_needs_none(kvm_tap): pass
"""


def test_without_kvm_a_test_is_skipped_with_the_reason_and_the_advice(session: pytest.Pytester) -> None:
    session.makeconftest(NO_DEVICE)
    session.makepyfile(NEEDS_KVM)
    result = run(session, "-rs")
    result.assert_outcomes(skipped=6, passed=1)
    reason = (
        "/dev/no-such-device cannot be opened: No such file or directory: *docker run --device /dev/no-such-device*"
    )
    result.stdout.fnmatch_lines([f"SKIPPED * {reason}"])


def test_where_kvm_is_required_the_skip_is_a_failure(session: pytest.Pytester) -> None:
    session.makeconftest(NO_DEVICE)
    session.makepyfile(NEEDS_KVM)
    result = run(session, "--require-kvm")
    result.assert_outcomes(errors=5, failed=1, passed=1)
    result.stdout.fnmatch_lines(
        ["KVM and tools are required here*: /dev/no-such-device cannot be opened: No such file*"]
    )


@pytest.mark.parametrize(("value", "required"), [("1", True), ("yes", True), ("0", False), ("", False), (None, False)])
def test_the_environment_may_require_kvm_too(
    monkeypatch: pytest.MonkeyPatch, value: str | None, required: bool
) -> None:
    monkeypatch.delenv("KVMPY_REQUIRE_KVM", raising=False)
    if value is not None:
        monkeypatch.setenv("KVMPY_REQUIRE_KVM", value)
    assert requirement.is_required() is required
    with pytest.raises(pytest.fail.Exception if required else pytest.skip.Exception, match="no luck"):
        requirement.skip_or_fail("no luck")


def test_the_marker_selects_tests_with_fixtures_that_run_guests(session: pytest.Pytester) -> None:
    session.makepyfile(NEEDS_KVM)
    names = run(session, "-m", "kvm", "--collect-only", "-q").stdout.str()
    assert names.count("::") == 6  # class and function
    assert "test_asks_late" not in names
    assert "test_needs_none" not in names


TOOLS = """
    def test_assembles(kvm_guest_asm):
        assert kvm_guest_asm("hlt").image == bytes([0xf4])

    def test_compiles(kvm_guest_c):
        assert kvm_guest_c("void _start(void) {}").entry == 0x100000
"""


def test_without_the_tools_a_test_is_skipped_or_fails_naming_the_package(
    session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.makepyfile(TOOLS)
    monkeypatch.setenv("PATH", str(session.path))
    skipped = run(session, "-rs")
    skipped.assert_outcomes(skipped=2)
    skipped.stdout.fnmatch_lines_random(["*needs `as`*Debian package binutils*", "*needs `gcc`*Debian package gcc*"])
    failed = run(session, "--require-kvm")
    failed.assert_outcomes(failed=2)
    failed.stdout.fnmatch_lines_random(["*needs `as`*Debian package binutils*", "*needs `gcc`*Debian package gcc*"])


def test_sources_are_found_beside_the_test_and_mistakes_in_them_fail_it(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        from pathlib import Path
        import pytest
        from kvmpy.pytest_plugin.guest_programs import GuestSourceWarning

        def test_files(kvm_guest_c, kvm_guest_asm):
            program = kvm_guest_c("part/start.c", Path("part/other.c"), flags=("-Ipart/include",), bits=32)
            assert program.bits == 32 and "other" in program.symbols
            assert kvm_guest_asm(Path("part/boot.s"), address=0x7c00).symbols["here"] == 0x7c01

        def test_a_warning(kvm_guest_c):
            with pytest.warns(GuestSourceWarning, match="unused variable") as caught:
                kvm_guest_c("void _start(void) { int unused; }")
            assert caught[0].filename == __file__

        def test_a_mistake_in_c(kvm_guest_c):
            kvm_guest_c("void _start(void) { nonsense }")

        def test_a_mistake_in_assembly(kvm_guest_asm):
            kvm_guest_asm("nop; frobnicate ax")
        """
    )
    part = session.mkdir("part")
    (part / "include").mkdir()
    (part / "include" / "other.h").write_text("extern int other;\n")
    (part / "start.c").write_text('#include "other.h"\nvoid _start(void) { other++; }\n')
    (part / "other.c").write_text("int other;\n")
    (part / "boot.s").write_text("nop\nhere: hlt\n")
    session.chdir()
    result = run(session, "--import-mode=importlib")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines([
        "*kvm_guest_c(\"void _start(void) { nonsense }\")", "E *error: *nonsense*",
        "*kvm_guest_asm(\"nop; frobnicate ax\")", "E *no such instruction*",
    ])  # fmt: skip
    assert "guest_programs.py" not in result.stdout.str(), "the plugin's own lines are no news"


@pytest.mark.parametrize("value", ["soon", "0", "-3", "nan", ""])
def test_a_deadline_that_is_none_is_refused_at_the_start(session: pytest.Pytester, value: str) -> None:
    result = session.runpytest_inprocess(*LEAN, "-o", f"kvm_deadline={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *kvm_deadline: a positive number of seconds is needed, not '{value}'"])


def test_a_deadline_shortens_what_is_longer() -> None:
    deadline = Deadline(1000)
    assert deadline.shorten(3.0) == (3.0, False)
    for timeout in (None, 5000.0, float("inf")):
        seconds, cut = deadline.shorten(timeout)
        assert cut
        assert seconds is not None
        assert 0 < seconds <= 1000


def test_without_a_deadline_a_run_keeps_its_own_timeout() -> None:
    deadline = Deadline(float("inf"))
    assert deadline.shorten(None) == (None, False)
    assert deadline.shorten(3.0) == (3.0, False)


def test_no_run_begins_when_the_time_is_over() -> None:
    deadline = Deadline(1e-9)
    deadline.shorten(None)
    with pytest.raises(pytest.fail.Exception, match=r"the 1e-09 s were over"):
        deadline.shorten(None)


def explained(end: End, report: object) -> Outcome:
    """An outcome with a crash report, or what stands for one."""
    outcome = Outcome(end)
    outcome.report = report  # type: ignore[assignment]
    return outcome


class Unreadable:
    def __str__(self) -> str:
        raise ZeroDivisionError("by the report")


class StoppedMachine:
    """As much of a machine as a report looks at."""

    running = False

    def __init__(self, outcome: Outcome | None) -> None:
        self.last_outcome = outcome
        self.vcpus = ("neither a vCPU nor its registers",)
        self.console = ConsoleOutput()
        self.debug_console = ConsoleOutput()


def sections_of(*outcomes: Outcome | None, failed: bool = True) -> list[tuple[str, str]]:
    """What a report says of a test whose machines ended so."""
    guests = Guests(Deadline(1))
    for outcome in outcomes:
        guests.add_machine(StoppedMachine(outcome))  # type: ignore[arg-type]
    report = pytest.TestReport("test", ("test.py", 1, "test"), {}, "failed" if failed else "passed", None, "call")
    guests.describe(report)
    return report.sections


def test_after_a_crash_the_report_of_the_outcome_is_shown() -> None:
    crash = explained(End.TRIPLE_FAULT, "the IDT has no gate 6")
    assert sections_of(crash) == [("kvm outcome", "the IDT has no gate 6")]
    assert sections_of(crash, failed=False) == []


def test_a_guest_that_ended_by_itself_needs_no_crash_report() -> None:
    (section,) = sections_of(explained(End.HALTED, "nothing to see"))
    assert section == ("kvm outcome", "halted")


def test_a_crash_report_that_fails_is_no_further_failure() -> None:
    (section,) = sections_of(explained(End.PANIC, Unreadable()))
    assert section[1].startswith("panic\nno crash report: ZeroDivisionError('by the report')\nno registers: ")


def test_machines_are_told_apart_also_when_one_never_ran() -> None:
    assert sections_of(Outcome(End.STOPPED), None) == [
        ("kvm outcome of machine 1", "stopped"),
        ("kvm outcome of machine 2", "the machine did not run to an end"),
    ]


def test_each_file_of_the_plugin_is_imported_by_a_name_that_is_no_test() -> None:
    # pytest collects test_*.py wherever it is pointed at.
    assert not list(Path(pytest_plugin.__file__).parent.glob("test_*.py"))
