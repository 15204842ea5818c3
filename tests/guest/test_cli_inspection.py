"""`kvmpy run` with its options to look into the guest: gdb, coverage, crash reports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gdb_remote import run_gdb
from gnu_toolchain import assemble, compile_c
from kvmpy.cli.inspection_options import gdb_address

pytestmark = pytest.mark.kvm

KERNEL = """
static volatile int total;

static __attribute__((noinline)) void add(int number)
{
    total += number;
}

void _start(void)
{
    for (int i = 1; i <= 3; i++)
        add(i);
    if (total == 7)
        total = 0;
    asm volatile("outb %0, $0xf4" :: "a"((char)0));
    for (;;)
        ;
}
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kvmpy", "run", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_real_gdb_debugs_a_kernel_in_c() -> None:
    program = compile_c(KERNEL, flags=("-g",))
    arguments = command(program.elf, "--gdb", ":0", "--timeout", "30")
    with subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            match = re.search(r"target remote ([\d.]+):(\d+)", said)
            assert match is not None, said
            shown = run_gdb(
                (match[1], int(match[2])), "break add", "continue", "print number", "finish", "print total", "delete",
                "continue", program=program.elf,
            )  # fmt: skip
            assert re.search(r"Breakpoint 1, .*add \(number=", shown), shown
            assert "$1 = 1" in shown
            assert "$2 = 1" in shown
            assert process.wait(30) == 1, shown  # value 0 at the debug-exit port
        finally:
            process.kill()


@pytest.mark.parametrize("by", ["steps", "breakpoints"])
def test_coverage_names_the_lines_that_ran(tmp_path: Path, by: str) -> None:
    program = compile_c(KERNEL, flags=("-g",))
    info = tmp_path / "kernel.info"
    done = run(program.elf, "--coverage", info, "--coverage-by", by, "--timeout", "30")
    assert done.returncode == 1, done.stderr
    lines = dict(re.findall(r"^DA:(\d+),(\d+)", info.read_text("ascii"), re.MULTILINE))
    assert int(lines["6"]) > 0  # total += number
    assert lines["14"] == "0"  # total = 0


def test_coverage_for_an_unknown_tool_is_refused_before_the_run(tmp_path: Path) -> None:
    image = tmp_path / "hello.bin"
    image.write_bytes(assemble("mov al, '!'; out 0xe9, al; cli; hlt"))
    done = run(image, "--coverage", tmp_path / "what.xyz")
    assert (done.returncode, done.stdout) == (2, "")
    assert ".xyz" in done.stderr


@pytest.mark.parametrize("suffix", [".txt", ".html", ".json"])
def test_a_crash_report_goes_to_a_file(tmp_path: Path, suffix: str) -> None:
    image, report = tmp_path / "crash.bin", tmp_path / f"report{suffix}"
    image.write_bytes(assemble("lidt [0x8000]; ud2", bits=64))
    done = run(image, "--mode", "long", "--crash-report", report)
    assert done.returncode == 126
    text = report.read_text("utf-8")
    assert "Triple fault" in text
    if suffix == ".json":
        assert json.loads(text)["end"] == "triple fault"
    assert ("<!DOCTYPE html>" in text) == (suffix == ".html")


def test_symbols_of_a_system_map_or_an_elf_file_name_the_addresses_of_a_flat_image(tmp_path: Path) -> None:
    image = tmp_path / "guest.bin"
    image.write_bytes(assemble("jmp spin; nop; nop; spin: jmp spin", bits=64))
    (tmp_path / "System.map").write_text("0000000000001000 T _start\n0000000000001004 T spin_for_ever\n")
    run_it = (image, "--mode", "long", "--timeout", "0.2", "-v")
    assert "spin_for_ever" not in run(*run_it).stderr
    done = run(*run_it, "--symbols", tmp_path / "System.map")
    assert done.returncode == 124
    assert "spin_for_ever" in done.stderr
    program = compile_c("void _start(void) { for (;;) ; }", address=0x1000)
    assert "_start" in run(*run_it, "--symbols", program.elf).stderr
    for name, says in (("nowhere", "nowhere: No such file"), ("guest.bin", "guest.bin")):
        done = run(*run_it, "--symbols", tmp_path / name)
        assert done.returncode in (118, 122)
        assert says in done.stderr


@pytest.mark.parametrize(
    ("suffix", "line"), [(".txt", r"^ *[\d.]+% +(\d+)  spin$"), (".folded", r"^vCPU 0;spin (\d+)$")]
)
def test_a_profile_says_by_the_suffix_where_the_guest_was(tmp_path: Path, suffix: str, line: str) -> None:
    image, profile, symbols = tmp_path / "guest.bin", tmp_path / f"profile{suffix}", tmp_path / "System.map"
    image.write_bytes(assemble("jmp spin; nop; nop; spin: jmp spin", bits=64))
    symbols.write_text("0000000000001000 T _start\n0000000000001004 T spin\n")
    done = run(image, "--mode", "long", "--timeout", "0.5", "--profile", profile, "--symbols", symbols)
    assert done.returncode == 124
    text = profile.read_text("utf-8")
    match = re.search(line, text, re.MULTILINE)
    assert match is not None, text
    assert int(match[1]) > 5
    assert text.startswith("vCPU 0")


def test_a_profile_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    image = tmp_path / "hello.bin"
    image.write_bytes(assemble("mov al, '!'; out 0xe9, al; cli; hlt"))
    done = run(image, "--profile", tmp_path / "nowhere" / "profile.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "profile.txt: No such file" in done.stderr


def test_a_guest_that_ends_well_leaves_no_report(tmp_path: Path) -> None:
    image, report = tmp_path / "good.bin", tmp_path / "report.txt"
    image.write_bytes(assemble("cli; hlt"))
    assert run(image, "--crash-report", report).returncode == 0
    assert not report.exists()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":1234", ("127.0.0.1", 1234)),
        ("1234", ("127.0.0.1", 1234)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:99", ("::1", 99)),
        ("/tmp/gdb", "/tmp/gdb"),
    ],
)
def test_where_gdb_attaches(text: str, address: object) -> None:
    assert gdb_address(text) == address


@pytest.mark.parametrize("text", ["", ":", "gdb", ":70000", ":-1"])
def test_what_is_no_place_for_gdb(tmp_path: Path, text: str) -> None:
    image = tmp_path / "good.bin"
    image.write_bytes(assemble("cli; hlt"))
    done = run(image, f"--gdb={text}")
    assert done.returncode == 2
    assert "--gdb" in done.stderr
