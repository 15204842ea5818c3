"""`kvmpy run` as a process, on real guests: output, input, statuses, the terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gnu_toolchain import assemble, compile_c

HELLO = """
    mov si, offset message; mov dx, 0x3f8
1:  lodsb; test al, al; jz 2f
    out dx, al; jmp 1b
2:  cli; hlt
message: .asciz "hello\\n"
"""

# Answers each character with its successor, so that echoing by the terminal would be seen; ends at `q`.
SUCCESSOR = """
1:  mov dx, 0x3fd; in al, dx; test al, 1; jz 1b
    mov dx, 0x3f8; in al, dx
    cmp al, 'q'; je 2f
    inc al; out dx, al; jmp 1b
2:  cli; hlt
"""

PORT_E9 = "mov al, 'A'; out 0xe9, al; mov al, 'B'; mov dx, 0x402; out dx, al; cli; hlt"

FOREVER = "mov al, '!'; mov dx, 0x3f8; out dx, al; 1: jmp 1b"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kvmpy", "run", *map(str, arguments)]


def run(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run with `text` through a pipe as standard input."""
    return subprocess.run(command(*arguments), input=text, capture_output=True, text=True, timeout=30, check=False)


def run_from(source: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run with another standard input."""
    return subprocess.run(command(*arguments), stdin=source, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Where a test writes its guest."""
    return tmp_path / "guest.bin"


# Formats


@contextmanager
def started(arguments: list[str], **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the test, whatever becomes of it."""
    with subprocess.Popen(arguments, **streams) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def test_a_flat_image_runs_and_nothing_is_said_when_it_ends_well(image: Path) -> None:
    image.write_bytes(assemble(HELLO))
    done = run(image)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")


def test_a_boot_sector_runs_at_7c00(image: Path) -> None:
    image.write_bytes(assemble(HELLO, address=0x7C00).ljust(510, b"\0") + b"\x55\xaa")
    assert run(image).stdout == "hello\n"


def test_address_and_entry_place_a_flat_image(image: Path) -> None:
    image.write_bytes(b"\xf4" * 16 + assemble(HELLO, address=0x8010))
    assert run(image, "--address", "0x8000").stdout == ""
    assert run(image, "--address", "0x8000", "--entry", "0x8010").stdout == "hello\n"


@pytest.mark.parametrize(("mode", "bits"), [("real", 16), ("protected16", 16), ("protected", 32), ("long", 64)])
def test_every_mode_starts(image: Path, mode: str, bits: int) -> None:
    name = {16: "si", 32: "esi", 64: "rsi"}[bits]
    image.write_bytes(assemble(HELLO.replace("mov si,", f"mov {name},"), bits=bits))
    done = run(image, "--mode", mode)
    assert (done.returncode, done.stdout) == (0, "hello\n")


def test_ring_3_runs(image: Path) -> None:
    image.write_bytes(assemble("mov al, 3; mov dx, 0xf4; out dx, al", bits=64))
    assert run(image, "--mode", "long", "--ring", "3").returncode == 7


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_file_runs_in_the_mode_of_its_class(bits: int) -> None:
    program = compile_c(
        """
        void _start(void) {
            for (const char *c = "from C\\n"; *c; c++)
                __asm__ volatile("outb %0, %1" : : "a"(*c), "Nd"((unsigned short)0x3f8));
            __asm__ volatile("outb %0, %1" : : "a"((char)(sizeof(void *))), "Nd"((unsigned short)0xf4));
            for (;;) __asm__ volatile("hlt");
        }
        """,
        bits=bits,
    )
    done = run(program.elf)
    assert (done.returncode, done.stdout) == (bits // 8 << 1 | 1, "from C\n")


def test_firmware_starts_at_the_reset_vector(image: Path) -> None:
    start = assemble("jmp 1f; 1: mov al, 2; out 0xf4, al; hlt", address=0xFFF0)
    image.write_bytes(bytes(0xFFF0) + start.ljust(16, b"\0"))
    assert run(image, "--firmware").returncode == 5


# The machine


def test_memory_is_as_large_as_asked(image: Path) -> None:
    program = """
        mov byte ptr [0x1fffff], 0x55; mov al, [0x1fffff]; out 0xf4, al
        hlt
    """
    image.write_bytes(assemble(program, bits=32))
    assert run(image, "--mode", "protected", "--memory", "2M").returncode == (0x55 << 1 | 1) & 0xFF
    assert run(image, "--mode", "protected", "--memory", "1M").returncode == (0xFF << 1 | 1) & 0xFF


def test_an_image_outside_of_memory_is_one_line(image: Path) -> None:
    image.write_bytes(b"\xf4")
    done = run(image, "--address", "0x1000000")
    assert done.returncode == 122
    assert done.stderr.count("\n") == 1
    assert "not all in RAM" in done.stderr


def test_memory_that_cannot_be_is_one_line(image: Path) -> None:
    image.write_bytes(b"\xf4")
    for memory, status in (("1000", 2), ("100000T", 120)):
        done = run(image, "--memory", memory)
        assert done.returncode == status
        assert done.stderr.startswith("kvmpy: ")
        assert done.stderr.count("\n") == 1


def test_a_device_that_is_not_kvms_is_one_line(image: Path) -> None:
    image.write_bytes(b"\xf4")
    done = run(image, "--device", "/dev/null")
    assert done.returncode == 120
    assert "not KVM's device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_processors_wait_to_be_started(image: Path) -> None:
    image.write_bytes(assemble("mov al, 1; out 0xf4, al; hlt"))
    assert run(image, "--cpus", "2").returncode == 3


# Output, input


def test_port_e9_writes_to_standard_output_and_402_is_not_there(image: Path) -> None:
    image.write_bytes(assemble(PORT_E9))
    assert run(image).stdout == "A"


def test_the_debug_console_goes_to_a_file(image: Path, tmp_path: Path) -> None:
    image.write_bytes(assemble(PORT_E9))
    done = run(image, "--debug-console", tmp_path / "log")
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "log").read_bytes() == b"AB"
    assert run(image, "--debug-console", "-").stderr == "AB"


def test_input_from_a_pipe_reaches_the_guest(image: Path) -> None:
    image.write_bytes(assemble(SUCCESSOR))
    done = run(image, text="HAL" * 100 + "q")
    assert (done.returncode, done.stdout) == (0, "IBM" * 100)


def test_the_escape_key_is_an_ordinary_character_in_a_pipe(image: Path) -> None:
    image.write_bytes(assemble(SUCCESSOR))
    assert run(image, text="\x01xq").stdout == "\x02y"


def test_input_from_a_file_reaches_the_guest(image: Path, tmp_path: Path) -> None:
    image.write_bytes(assemble(SUCCESSOR))
    (tmp_path / "input").write_text("HALq")
    with open(tmp_path / "input", "rb") as source:
        assert run_from(source.fileno(), image).stdout == "IBM"


def test_the_end_of_the_input_does_not_end_the_run(image: Path) -> None:
    image.write_bytes(assemble(SUCCESSOR))
    assert run_from(subprocess.DEVNULL, image, "--timeout", "0.3").returncode == 124
    done = run(image, "--timeout", "0.3", text="HAL")
    assert (done.returncode, done.stdout) == (124, "IBM")


@pytest.mark.parametrize(("closed", "shown"), [("<&-", "hello\n"), (">&-", ""), ("<&- >&- 2>&-", "")])
def test_it_runs_with_standard_descriptors_closed(image: Path, closed: str, shown: str) -> None:
    image.write_bytes(assemble(HELLO))
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command(image)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, shown)


def test_a_reader_that_goes_away_ends_the_run(image: Path) -> None:
    image.write_bytes(assemble("1: mov al, '.'; mov dx, 0x3f8; out dx, al; jmp 1b"))
    with started(command(image), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(3) == b"..."
        process.stdout.close()
        assert process.wait(20) == -signal.SIGPIPE
        assert process.stderr.read() == b""


# How it ends


@pytest.mark.parametrize("value", [0, 16, 62, 127])
def test_the_guests_code_is_the_status(image: Path, value: int) -> None:
    image.write_bytes(assemble(f"mov al, {value}; out 0xf4, al; hlt"))
    done = run(image)
    assert done.returncode == value << 1 | 1
    assert ("exited with code" in done.stderr) == (value != 0)


def test_a_guest_that_never_ends_is_timed_out(image: Path) -> None:
    image.write_bytes(assemble(FOREVER))
    done = run(image, "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (124, "!")
    assert "kvmpy: timeout: the guest did not end within 0.2 seconds; vCPU 0 is at rip 0x" in done.stderr


def test_a_triple_fault_says_so(image: Path) -> None:
    image.write_bytes(assemble("ud2", bits=32))
    done = run(image, "--mode", "protected")
    assert done.returncode == 126
    assert done.stderr.startswith("kvmpy: triple fault: ")


def test_a_bad_end_shows_the_registers_when_asked(image: Path) -> None:
    image.write_bytes(assemble("mov ebx, 0x12345678; 1: jmp 1b", bits=32))
    done = run(image, "--mode", "protected", "--timeout", "0.2", "-v")
    assert "rbx 0000000012345678" in done.stderr
    assert "cr0  0x" in done.stderr


# A guest that expects a BIOS


def boot_sector(source: str) -> bytes:
    return assemble(source, address=0x7C00).ljust(510, b"\0") + b"\x55\xaa"


def test_a_boot_sector_that_calls_the_bios_is_told_that_there_is_none(image: Path) -> None:
    image.write_bytes(boot_sector("mov sp, 0x7c00; mov ax, 0x0e48; int 0x10; 1: hlt; jmp 1b"))
    done = run(image, "--timeout", "10")
    assert done.returncode == 126
    assert "INT 0x10 at 0x0000:0x7c06 with AX=0x0e48, but there is no BIOS here" in done.stderr


def test_an_exception_without_a_handler_is_named_in_real_mode(image: Path) -> None:
    image.write_bytes(boot_sector("mov sp, 0x7c00; nop; ud2"))
    done = run(image, "--timeout", "10", "--json")
    assert done.returncode == 126
    assert "interrupt 0x06 at 0x0000:0x7c04 has no handler" in json.loads(done.stderr)["outcome"]["message"]


def test_handlers_of_the_guest_s_own_are_called(image: Path) -> None:
    source = "mov word ptr [0x40], offset 1f; mov word ptr [0x42], 0; mov sp, 0x7c00; int 0x10; cli; hlt"
    image.write_bytes(boot_sector(f"{source}; 1: mov al, 'y'; out 0xe9, al; iret"))
    done = run(image, "--timeout", "10")
    assert (done.returncode, done.stdout, done.stderr) == (0, "y", "")


def test_an_image_over_the_interrupt_vectors_is_left_as_it_is(image: Path) -> None:
    image.write_bytes(assemble("mov al, [1f]; out 0xe9, al; cli; hlt; 1: .byte 'v'", address=0x40))
    assert run(image, "--address", "0x40").stdout == "v"


def test_a_guest_with_little_memory_gets_no_handlers(image: Path) -> None:
    image.write_bytes(assemble("mov al, [0x43]; add al, 'a'; out 0xe9, al; cli; hlt"))
    assert run(image, "--memory", "64K").stdout == "a"


def test_a_reset_by_the_keyboard_controller_ends_well(image: Path) -> None:
    image.write_bytes(assemble("mov al, 0xfe; out 0x64, al; 1: jmp 1b"))
    done = run(image, "-v")
    assert done.returncode == 0
    assert "reset" in done.stderr


def test_json_to_standard_error_holds_outcome_and_statistics(image: Path) -> None:
    image.write_bytes(assemble("mov al, 'x'; out 0xe9, al; out 0xe9, al; in al, 0x99; mov al, 3; out 0xf4, al; hlt"))
    done = run(image, "--json")
    report = json.loads(done.stderr)
    assert done.returncode == report["status"] == 7
    assert report["outcome"]["end"] == "exited"
    assert report["outcome"]["code"] == 7
    assert report["outcome"]["ok"] is False
    assert report["seconds"] > 0
    assert {"kind": "port", "direction": "write", "address": 0xE9, "size": 1, "count": 2} in report["statistics"][
        "accesses"
    ]
    assert [access["address"] for access in report["statistics"]["unclaimed"]] == [0x99]


def test_json_to_a_file_leaves_standard_error_to_people(image: Path, tmp_path: Path) -> None:
    image.write_bytes(assemble("ud2", bits=32))
    done = run(image, "--mode", "protected", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["outcome"]["end"] == "triple fault"
    assert report["status"] == done.returncode == 126
    assert done.stderr.startswith("kvmpy: triple fault")


def test_statistics_are_printed_when_asked(image: Path) -> None:
    image.write_bytes(assemble(HELLO))
    done = run(image, "--stats")
    assert "6  port write 0x3f8" in done.stderr


def test_verbose_says_what_is_where(image: Path) -> None:
    image.write_bytes(assemble(HELLO))
    done = run(image, "-v")
    assert "0x1000.." in done.stderr
    assert "halted" in done.stderr


def test_an_interrupt_ends_the_run_with_status_130(image: Path) -> None:
    image.write_bytes(assemble(FOREVER))
    with started(command(image), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"!"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, b"kvmpy: interrupted\n")


# The terminal


class Terminal:
    """A pseudo-terminal as a user has it, with `kvmpy run` in the foreground of its session."""

    def __init__(self, *arguments: object) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command(*arguments)],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=False,
        )  # fmt: skip
        self.shown = b""

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        os.close(self.master)
        os.close(self.slave)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait_for(self, text: bytes, timeout: float = 20) -> None:
        """Read until `text` has been shown."""
        deadline = time.monotonic() + timeout
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"waited for {text!r}, saw {self.shown!r}"
            self.shown += os.read(self.master, 0x1000)

    @property
    def raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    @property
    def restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def status(self) -> int:
        return self.process.wait(20)


@pytest.fixture
def terminal(image: Path) -> Iterator[Terminal]:
    """A terminal with the guest `SUCCESSOR` waiting for keys."""
    image.write_bytes(assemble("mov al, '>'; mov dx, 0x3f8; out dx, al;" + SUCCESSOR))
    terminal = Terminal(image, "--timeout", "30")
    try:
        terminal.wait_for(b">")
        yield terminal
    finally:
        terminal.close()


def test_keys_reach_the_guest_unechoed_and_at_once(terminal: Terminal) -> None:
    assert terminal.raw
    terminal.type(b"HAL")
    terminal.wait_for(b">IBM")  # an echo would stand in between
    terminal.type(b"\x03\x1a\x1c\r")  # Ctrl-C, Ctrl-Z, Ctrl-\, Enter: characters like any other
    terminal.wait_for(b">IBM\x04\x1b\x1d\x0e")
    terminal.type(b"q")
    assert terminal.status() == 0
    assert terminal.restored


def test_control_a_x_ends_the_run(terminal: Terminal) -> None:
    terminal.type(b"\x01x")
    assert terminal.status() == 0
    assert terminal.restored


def test_control_a_twice_is_control_a(terminal: Terminal) -> None:
    terminal.type(b"\x01\x01")
    terminal.wait_for(b">\x02")
    terminal.type(b"\x01x")
    assert terminal.status() == 0


def test_control_a_h_helps(terminal: Terminal) -> None:
    terminal.type(b"\x01h")
    terminal.wait_for(b"Ctrl-A x       end the run")
    terminal.type(b"q")
    assert terminal.status() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(image: Path, number: int) -> None:
    image.write_bytes(assemble(FOREVER))
    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        with started(command(image), stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"!"
            assert termios.tcgetattr(slave) != before
            process.send_signal(number)
            assert process.wait(20) == (130 if number == signal.SIGINT else -number)
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)


def test_an_error_leaves_the_terminal_as_it_was(image: Path) -> None:
    # The guest writes to /dev/full: the run ends by an exception out of a device.
    image.write_bytes(assemble(FOREVER))
    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                command(image), stdin=slave, stdout=full, stderr=subprocess.PIPE, timeout=30, check=False
            )
        assert done.returncode == 118
        assert b"No space left on device" in done.stderr
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)


def test_the_end_of_a_guest_leaves_the_terminal_as_it_was(image: Path) -> None:
    image.write_bytes(assemble("ud2", bits=32))
    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        done = subprocess.run(
            command(image, "--mode", "protected"), stdin=slave, capture_output=True, timeout=30, check=False
        )
        assert done.returncode == 126
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)
