"""examples/kernel_tests, run as its reader runs it: green, and red with what went wrong inside the guest."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gnu_toolchain import compile_c

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "examples" / "kernel_tests"


def run(folder: Path, base: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    compile_c("void _start(void) {}")  # skips, or fails, where there is no compiler
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    options = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", f"--basetemp={base / 'made'}")
    before = files()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments], cwd=folder, text=True, timeout=50, check=False,
        env={**environment, "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert files() == before, "a run leaves nothing behind in the project"
    return done


def files() -> list[Path]:
    return sorted(path for path in PROJECT.rglob("*") if "__pycache__" not in path.parts)


@pytest.mark.parametrize(
    ("folder", "arguments"),
    [
        pytest.param(PROJECT, (), id="in its folder"),
        pytest.param(
            ROOT, ("-n", "2", "examples/kernel_tests"), id="from this project, by two workers", marks=pytest.mark.slow
        ),
    ],
)
def test_the_sample_project_is_green(folder: Path, arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(folder, tmp_path, "-v", "-W", "error", *arguments)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^=+ 6 passed, 1 skipped, 15 subtests passed in ", done.stdout, re.MULTILINE), done.stdout
    assert "SUBPASSED[exceptions > a_page_fault_says_where]" in done.stdout


def test_a_broken_kernel_is_red_and_the_report_says_why(tmp_path: Path) -> None:
    done = run(PROJECT, tmp_path, "broken_kernel.py")
    assert done.returncode == 1
    said = done.stdout
    # What failed inside the guest, by itself:
    assert "not ok: mistakes > two_and_two_are_five\n  guest_tests/broken_interrupts.c:9: expected 2 + 2 == 5\n" in said
    # What never came, and why:
    assert "mistakes: the plan was 1..2, but 1 came" in said
    assert "the guest ended: triple fault" in said
    # The console up to there, and the crash:
    console, _, crash = said.partition("kvm outcome")
    assert console.rstrip(" -").endswith("    not ok 1 two_and_two_are_five\n")
    assert "[idt-limit-too-small]" in crash
    assert re.search(r"^=> +0x\w+  0f 0b ", crash, re.MULTILINE), "the instruction that faulted"
    assert "guest_tests/broken_interrupts.c:23" in crash
    assert re.search(r"^=+ 2 failed in ", said, re.MULTILINE)
