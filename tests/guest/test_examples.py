"""Every example runs as a user runs it, and prints what its docstring promises."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from gnu_toolchain import compile_c
from kvmpy.pytest_plugin.requirement import skip_or_fail
from linux_session import busybox, small_kernel

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))


def promised_output(example: Path) -> str:
    """What stands behind `Output::` in the docstring."""
    docstring = ast.get_docstring(ast.parse(example.read_text("utf-8"))) or ""
    _, heading, output = docstring.partition("\nOutput::\n\n")
    assert heading, f"{example.name} does not say what it prints"
    return textwrap.dedent(output).strip("\n") + "\n"


def run(example: Path, cwd: Path, seconds: float = 40, **environment: str) -> subprocess.CompletedProcess[str]:
    # -X dev: descriptors that an example leaves open are reported on standard error.
    command = [sys.executable, "-X", "dev", str(example)]
    return subprocess.run(
        command, cwd=cwd, env=environment or None, capture_output=True, text=True, timeout=seconds, check=False
    )


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 10


def parameters() -> list[ParameterSet]:
    """The examples; the one that boots Linux takes its time where KVM runs guests in software."""
    slow = (pytest.mark.slow, pytest.mark.linux)
    return [pytest.param(path, marks=slow if path.stem == "boot_linux" else (), id=path.stem) for path in EXAMPLES]


@pytest.mark.parametrize("example", parameters())
def test_an_example_prints_what_it_promises(example: Path, tmp_path: Path) -> None:
    if example.stem in ("c_guest", "hypercalls", "virtio_device", "three_ways"):
        compile_c("void _start(void) {}")  # skips, or fails, where there is no compiler
    if example.stem == "floppy_boot" and not Path("/usr/share/seabios/bios.bin").exists():
        skip_or_fail("needs SeaBIOS (Debian package seabios)")
    if example.stem == "boot_linux":
        for needed in (small_kernel, busybox):
            needed()  # skips where it is missing
    done = run(example, tmp_path, 500 if example.stem == "boot_linux" else 40)
    assert (done.stdout, done.stderr, done.returncode) == (promised_output(example), "", 0)
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


def test_the_example_in_c_says_what_it_needs_where_there_is_no_compiler(tmp_path: Path) -> None:
    done = run(ROOT / "examples" / "c_guest.py", tmp_path, PATH=str(tmp_path))
    assert done.returncode == 1
    assert "apt-get install gcc" in done.stderr
    assert "Traceback" not in done.stderr
