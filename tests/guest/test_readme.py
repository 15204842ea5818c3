"""The programs and commands in README and in the documentation run as they are written, and do what the page says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from code_blocks import Block, blocks

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md"))]
BLOCKS = [block for page in PAGES for block in blocks(page)]
PROGRAMS = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language == "sh"]
ANSWERED = [block for block in SHELL if block.output is not None]

TOOLS = {"apt-get", "echo", "gdb", "pip", "printf", "python", "sudo"}
"""Commands that a page may use and that are not ours."""
PACKAGES = {
    "acpica-tools", "bc", "binutils", "bison", "chromium", "cpio", "dmidecode", "dnsmasq-base", "e2fsprogs", "flex",
    "gcc", "gdb", "iproute2", "iputils-ping", "libelf-dev", "make", "passt", "qemu-system-x86", "qemu-utils", "seabios",
    "squashfs-tools", "tcpdump", "xz-utils",
}  # fmt: skip


def environment() -> dict[str, str]:
    """Ours, with the command `kvmpy` of the Python that runs the tests."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50,
        check=False,
    )  # fmt: skip


def test_the_first_program_of_the_readme_is_the_short_one() -> None:
    first = next(block for block in PROGRAMS if block.page == README)
    assert first.text.startswith("from kvmpy import Hlt, IoOut, Kvm\n")
    assert first.output == "4\n"


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_a_program_runs_and_prints_what_the_page_says(program: Block, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(program.text, "utf-8")
    done = run(sys.executable, "-X", "dev", str(script), cwd=tmp_path)
    assert (done.stderr, done.returncode) == ("", 0), f"{program}:\n{done.stdout}{done.stderr}"
    assert done.stdout == (program.output or "")


@pytest.mark.parametrize("block", ANSWERED, ids=str)
def test_commands_with_an_answer_give_it(block: Block, tmp_path: Path) -> None:
    done = run("sh", "-euc", block.text, cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == (block.output, "", 0)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_and_options_exist(block: Block, tmp_path: Path) -> None:
    for line in block.text.splitlines():
        words = shlex.split(line)
        if words[0] == "kvmpy":
            explained = run("kvmpy", words[1], "--help", cwd=tmp_path)
            assert explained.returncode == 0, explained.stderr
            options = [word for word in words[2:] if word.startswith("--")]
            assert [option for option in options if not re.search(rf"{option}\b", explained.stdout)] == []
        elif words[0].startswith("scripts/"):
            assert os.access(ROOT / words[0], os.X_OK), line
        else:
            assert words[0] in TOOLS, line
            if words[0] == "apt-get":
                assert set(words[2:]) <= PACKAGES


def test_the_commands_and_options_that_the_readme_mentions_in_passing_exist(tmp_path: Path) -> None:
    text = README.read_text("utf-8")
    commands = set(re.findall(r"`kvmpy (\w+)", text))
    assert commands >= {"doctor", "run", "bench"}
    for command in commands:
        assert run("kvmpy", command, "--help", cwd=tmp_path).returncode == 0, command
    for script in set(re.findall(r"`(scripts/[\w-]+)", text)):
        assert os.access(ROOT / script, os.X_OK), script
    assert "--slow" in (ROOT / "scripts" / "test").read_text("utf-8")


def test_the_demo_prints_what_the_readme_shows(tmp_path: Path) -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("scripts/demo sets up .venv, which is not what runs these tests")
    promised = next(block.text for block in BLOCKS if block.text.startswith("== kvmpy doctor\n"))
    done = run(str(ROOT / "scripts" / "demo"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = iter(done.stdout.splitlines())
    missing = [
        line
        for line in promised.splitlines()
        if line not in ("", "...") and not any(printed.startswith(line) for printed in lines)
    ]
    assert missing == [], done.stdout
