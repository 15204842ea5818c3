"""`kvmpy cpu`, and --cpu of the commands that run guests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gnu_toolchain import assemble
from kvmpy import Kvm
from kvmpy.x86.cpu_templates import cpu_template, load


def kvmpy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmpy", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_a_template_is_shown_with_its_leaves() -> None:
    done = kvmpy("cpu", "plain")
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first == "CPU template plain"
    assert any(line.startswith("80000001    eax=") for line in lines)
    assert any("syscall nx lm" in line for line in lines)


def test_what_is_saved_is_a_template_with_every_answer(tmp_path: Path) -> None:
    done = kvmpy("cpu", "portable", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "here.json").write_text(done.stdout)
    with Kvm() as kvm:
        supported = kvm.supported_cpuid()
    kept = load(tmp_path / "here.json")
    assert kept.base == "nothing"
    assert kept.table(supported) == cpu_template("portable").table(supported)
    again = kvmpy("cpu", str(tmp_path / "here.json"), "--json")
    assert json.loads(again.stdout) == json.loads(done.stdout)


def test_a_guest_runs_on_the_processor_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text('{"base": "plain", "brand": "AB"}')
    code = "mov eax, 0x80000002; cpuid; out 0xe9, al; mov al, ah; out 0xe9, al; hlt"
    (tmp_path / "guest.bin").write_bytes(assemble(code, bits=16, address=0x1000))
    done = kvmpy("run", str(tmp_path / "guest.bin"), "--cpu", str(tmp_path / "cpu.json"), "--timeout", "10")
    assert (done.returncode, done.stdout, done.stderr) == (0, "AB", "")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is neither a CPU template (host, portable, plain) nor a file"),
        ("{", "is not JSON"),
        ('{"features": {"avx9": true}}', "no CPUID feature is named 'avx9'"),
    ],
)
def test_what_is_no_template_is_a_wrong_command_line(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "cpu.json"
    if content is not None:
        path.write_text(content)
    done = kvmpy("run", "guest.bin", "--cpu", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_a_folder_is_no_template(tmp_path: Path) -> None:
    done = kvmpy("cpu", str(tmp_path))
    assert done.returncode == 2
    assert "Is a directory" in done.stderr
