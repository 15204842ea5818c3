"""The command line without KVM: parsing, errors, the escape key, exit statuses."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy import __version__
from kvmpy.cli import COMMANDS, main
from kvmpy.cli.quantities import address, count, seconds, size
from kvmpy.cli.run_report import ENDED_BADLY, IMAGE_REFUSED, NO_KVM, OTHER_ERROR, TIMED_OUT, exit_status
from kvmpy.cli.terminal import EscapeKey
from kvmpy.machine import End, Outcome


def kvmpy(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmpy", *arguments], input=text, capture_output=True, text=True, timeout=30, check=False
    )


# Quantities


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16M", 16 << 20), ("512k", 512 << 10), ("2G", 2 << 30), ("1T", 1 << 40), ("4096", 4096), ("0x100000", 1 << 20),
        ("16MiB", 16 << 20), ("16mb", 16 << 20), ("0xB", 11),
    ],
)  # fmt: skip
def test_a_size_has_a_suffix_or_none(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (size, "0"), (size, "-1M"), (size, "16X"), (size, "M"), (size, ""), (size, "1.5G"),
        (address, "-1"), (address, "0x1_0000_0000_0000_0000"), (address, "there"),
        (count, "0"), (count, "two"), (count, "0x10"),
        (seconds, "0"), (seconds, "-1"), (seconds, "nan"), (seconds, "inf"), (seconds, "soon"),
    ],
)  # fmt: skip
def test_what_is_no_quantity_is_refused(kind: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no"):
        kind(text)


def test_addresses_counts_and_times_are_read() -> None:
    assert address("0x7c00") == 0x7C00
    assert address("4096") == 0x1000
    assert address("0xffffffffffffffff") == (1 << 64) - 1
    assert count("4") == 4
    assert seconds("0.5") == 0.5


# The command itself


def test_version_is_that_of_the_package() -> None:
    done = kvmpy("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kvmpy {__version__}\n", "")


def test_help_lists_every_command_and_loads_none() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kvmpy", "--help"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert all(f"    {name} " in done.stdout for name in COMMANDS)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "kvmpy.cli" in loaded
    assert not loaded & {f"kvmpy.cli.{name}" for name in COMMANDS}


def test_a_command_loads_no_other() -> None:
    program = "import sys; from kvmpy.cli import main; main(['run', '/nowhere/at/all']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    loaded = set(done.stdout.split())
    assert "kvmpy.cli.run" in loaded
    assert not loaded & {"kvmpy.cli.doctor", "kvmpy.cli.bench", "kvmpy.bench"}


@pytest.mark.parametrize("arguments", [(), ("fly",), ("run",), ("run", "--mode", "virtual", "x"), ("run", "-m", "x")])
def test_a_command_line_that_cannot_be_meant_so_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    done = kvmpy(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: kvmpy")
    assert not done.stdout


def test_an_unknown_command_is_told_which_there_are() -> None:
    said = kvmpy("fly").stderr
    assert "invalid choice: 'fly'" in said
    assert all(f"'{name}'" in said for name in COMMANDS)


@pytest.mark.parametrize("command", ["run", "boot", "doctor"])
def test_help_of_a_command_says_its_exit_status(command: str) -> None:
    done = kvmpy(command, "--help")
    assert done.returncode == 0
    assert "exit status:" in done.stdout
    assert "--debug" in done.stdout


def test_the_help_of_run_names_the_statuses_it_uses() -> None:
    text = kvmpy("run", "--help").stdout
    for status in (ENDED_BADLY, IMAGE_REFUSED, NO_KVM, OTHER_ERROR, TIMED_OUT):
        assert f"\n  {status}  " in text


def test_a_reader_that_goes_away_ends_the_command_without_a_word() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as nobody_reads:
        done = subprocess.run(
            [sys.executable, "-m", "kvmpy", "doctor", "--device", "/nowhere"],
            stdout=nobody_reads, stderr=subprocess.PIPE, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == -13  # SIGPIPE


# kvmpy run, as far as it comes without KVM


def refused(done: subprocess.CompletedProcess[str], status: int, says: str) -> None:
    """One clear line on standard error, nothing else."""
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert done.stderr.startswith("kvmpy: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_an_image_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    refused(kvmpy("run", str(tmp_path / "absent.bin")), IMAGE_REFUSED, "absent.bin: No such file or directory")


def test_an_image_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(kvmpy("run", str(tmp_path)), IMAGE_REFUSED, "not a regular file")
    refused(kvmpy("run", str(tmp_path / "pipe")), IMAGE_REFUSED, "not a regular file")


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        (b"", (), "is empty"),
        (b"\x7fELF\x02\x01\x01", (), ""),
        (b"\xf4" * 16, ("--entry", "0x2000"), "entry 0x2000 is not in the image"),
        (b"\xf4" * 16, ("--firmware",), "64 KiB"),
    ],
)
def test_an_image_that_is_not_sound_is_refused(
    tmp_path: Path, content: bytes, arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "guest.bin").write_bytes(content)
    refused(kvmpy("run", str(tmp_path / "guest.bin"), *arguments), IMAGE_REFUSED, says)


@pytest.mark.parametrize(
    "arguments", [("--firmware", "--mode", "long"), ("--ring", "3"), ("--cpus", "257"), ("--firmware", "--entry", "1")]
)
def test_options_that_exclude_each_other_are_a_usage_error(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "guest.bin").write_bytes(b"\xf4" * 0x10000)
    refused(kvmpy("run", str(tmp_path / "guest.bin"), *arguments), 2, "")


def test_a_missing_device_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "guest.bin").write_bytes(b"\xf4")
    done = kvmpy("run", str(tmp_path / "guest.bin"), "--device", str(tmp_path / "kvm"))
    refused(done, NO_KVM, "ENOENT")
    assert "docker run --device" in done.stderr


def test_json_reports_an_error_too(tmp_path: Path) -> None:
    import json

    done = kvmpy("run", str(tmp_path / "absent.bin"), "--json")
    assert done.returncode == IMAGE_REFUSED
    report = json.loads(done.stderr)
    assert report["status"] == IMAGE_REFUSED
    assert "absent.bin" in report["error"]


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    done = kvmpy("run", str(tmp_path / "absent.bin"), "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_report_that_cannot_be_written_is_noticed_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "guest.bin").write_bytes(b"\xf4")
    done = kvmpy("run", str(tmp_path / "guest.bin"), "--json", str(tmp_path / "no" / "report.json"))
    refused(done, OTHER_ERROR, "report.json: No such file")


def test_main_answers_a_status_and_does_not_exit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "/nowhere/at/all"]) == IMAGE_REFUSED
    assert capsys.readouterr().err == "kvmpy: /nowhere/at/all: No such file or directory\n"


# Exit statuses


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome(End.HALTED), 0),
        (Outcome(End.SHUTDOWN), 0),
        (Outcome(End.RESET), 0),
        (Outcome(End.STOPPED), 0),
        (Outcome(End.EXITED, code=1), 1),
        (Outcome(End.EXITED, code=33), 33),
        (Outcome(End.EXITED, code=0x1_FFFF), 0xFF),
        (Outcome(End.TIMEOUT), 124),
        (Outcome(End.TRIPLE_FAULT), 126),
        (Outcome(End.FAILED), 126),
        (Outcome(End.PANIC), 126),
    ],
)
def test_the_status_says_how_the_guest_ended(outcome: Outcome, status: int) -> None:
    assert exit_status(outcome) == status


def test_no_status_can_be_mistaken_for_the_guests_own() -> None:
    codes = {exit_status(Outcome(End.EXITED, code=value << 1 | 1)) for value in range(0x200)}
    assert not codes & {0, 2, 130, ENDED_BADLY, IMAGE_REFUSED, NO_KVM, OTHER_ERROR, TIMED_OUT}


# The escape key


class Typist:
    """Records what an EscapeKey does, in order."""

    def __init__(self) -> None:
        self.done: list[object] = []
        self.keys = EscapeKey(
            self.done.append, {"x": lambda: self.done.append("end"), "h": lambda: self.done.append("help")}
        )


@pytest.mark.parametrize(
    ("typed", "done"),
    [
        ((b"hello",), [b"hello"]),
        ((b"\x01x",), ["end"]),
        ((b"\x01", b"x"), ["end"]),
        ((b"ab\x01xcd",), [b"ab", "end", b"cd"]),
        ((b"\x01\x01",), [b"\x01"]),
        ((b"a\x01\x01b",), [b"a\x01b"]),
        ((b"\x01\x01x",), [b"\x01x"]),
        ((b"\x01zx",), [b"x"]),
        ((b"x",), [b"x"]),
        ((b"\x01h\x01x",), ["help", "end"]),
        ((b"\x03\x1a\x00\xff",), [b"\x03\x1a\x00\xff"]),
    ],
)
def test_the_escape_key_takes_commands_out_of_what_is_typed(typed: tuple[bytes, ...], done: list[object]) -> None:
    typist = Typist()
    for data in typed:
        typist.keys.feed(data)
    assert typist.done == done
