"""What every console does with its output: the ring, the sink, and waiting for a pattern."""

from __future__ import annotations

import io
import re
import socket
import threading
from typing import Any

import pytest

from device_board import RecordingBoard
from kvmpy.devices.console_output import ExpectTimeout
from kvmpy.devices.debug_console import DebugConsole
from kvmpy.errors import KvmpyError


def show(console: DebugConsole, data: bytes) -> None:
    for byte in data:
        console.write(0, 1, byte)


@pytest.mark.parametrize("port", [0xE9, 0x402])
def test_probe_reads_e9_at_either_port(port: int) -> None:
    console = DebugConsole(port=port)
    (region,) = console.regions()
    assert (region.start, region.length, region.width) == (port, 1, 1)
    assert console.read(0, 1) == 0xE9


def test_output_is_kept_as_bytes_and_as_text() -> None:
    console = DebugConsole()
    show(console, b"caf\xc3\xa9\xff")
    assert console.output == b"caf\xc3\xa9\xff"
    assert console.text == "caf\u00e9\ufffd"
    assert console.dropped == 0


@pytest.mark.parametrize("length", [9, 10, 11, 19, 20, 21, 1000])
def test_ring_keeps_the_last_bytes_and_counts_the_dropped(length: int) -> None:
    console = DebugConsole(history=10)
    data = bytes(index % 251 for index in range(length))
    show(console, data)
    assert console.output == data[-10:]
    assert console.dropped == max(0, length - 10)


def test_ring_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="history"):
        DebugConsole(history=0)


def test_reset_keeps_the_output() -> None:
    console = DebugConsole()
    show(console, b"before")
    console.reset()
    assert console.output == b"before"


# --- sinks ---------------------------------------------------------------------------------------------------------


def test_sink_is_a_callable() -> None:
    received: list[bytes] = []
    show(DebugConsole(sink=received.append), b"ab")
    assert received == [b"a", b"b"]


def test_sink_is_a_binary_file() -> None:
    file = io.BytesIO()
    show(DebugConsole(sink=file), b"a\xff")
    assert file.getvalue() == b"a\xff"


def test_sink_is_a_text_file_in_memory() -> None:
    file = io.StringIO()
    show(DebugConsole(sink=file), "\u00e9!".encode())
    assert file.getvalue() == "\u00e9!"


def test_sink_is_a_text_file_on_bytes() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    show(DebugConsole(sink=file), b"\xc3\xa9")
    assert raw.getvalue() == b"\xc3\xa9"


def test_sink_is_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        show(DebugConsole(sink=ours), b"ab")
        assert theirs.recv(16) == b"ab"


def test_sink_that_is_nothing_of_that_is_refused() -> None:
    with pytest.raises(TypeError, match="sink"):
        DebugConsole(sink=3)  # type: ignore[arg-type]


def test_sink_can_be_connected_and_taken_away() -> None:
    console = DebugConsole()
    received: list[bytes] = []
    show(console, b"a")
    console.connect_sink(received.append)
    show(console, b"b")
    console.connect_sink(None)
    show(console, b"c")
    assert received == [b"b"]
    assert console.output == b"abc"


def test_byte_whose_sink_raised_can_be_written_again_and_is_there_once() -> None:
    troubles = [BrokenPipeError()]

    def sink(data: bytes) -> None:
        if troubles:
            raise troubles.pop()

    console = DebugConsole(sink=sink)
    with pytest.raises(BrokenPipeError):
        show(console, b"x")
    show(console, b"x")
    assert console.output == b"x"


# --- expect --------------------------------------------------------------------------------------------------------


def test_expect_walks_through_the_output() -> None:
    console = DebugConsole()
    show(console, b"# ls\nbin\n# ")
    assert console.expect(b"# ").start() == 0
    assert console.expect(b"bin").group() == b"bin"
    assert console.expect(b"# ").end() == 3
    with pytest.raises(ExpectTimeout):
        console.expect(b"# ", timeout=0)


def test_expect_takes_bytes_and_text_literally() -> None:
    console = DebugConsole()
    show(console, b"aXb a.b a.b")
    assert console.expect(b"a.b").start() == 4
    assert console.expect("a.b").start() == 1


def test_expect_searches_expressions() -> None:
    console = DebugConsole()
    show(console, b"took 25 ms, took 31 ms")
    assert console.expect(re.compile(rb"took (\d+) ms"))[1] == b"25"
    assert console.expect(re.compile(r"took (\d+) ms"))[1] == "31"


def test_expect_of_text_goes_on_behind_bytes_that_are_no_text() -> None:
    console = DebugConsole()
    show(console, b"\xff\xc3\xa9A\xfeA")
    assert console.expect("\u00e9A").group() == "\u00e9A"
    assert console.expect(b"\xfeA").start() == 0


def test_expect_waits_for_another_thread() -> None:
    console = DebugConsole()
    asked = threading.Event()

    def guest() -> None:
        asked.wait()
        show(console, b"x" * 1000 + b"login: ")

    thread = threading.Thread(target=guest)
    thread.start()
    asked.set()
    assert console.expect(b"login: ", timeout=30).group() == b"login: "
    thread.join()


@pytest.mark.parametrize("pattern", [b"login:", "login:"])
def test_expect_searches_when_the_last_byte_of_what_it_waits_for_comes(pattern: bytes | str) -> None:
    class Counted(DebugConsole):
        searches = 0
        began: threading.Event

        def _search(self, pattern: Any) -> Any:
            self.searches += 1
            self.began.set()
            return super()._search(pattern)

    console = Counted()
    console.began = threading.Event()
    thread = threading.Thread(target=console.expect, args=(pattern, 30))
    thread.start()
    console.began.wait()
    show(console, b"log in" * 100)
    thread.join(0.1)
    show(console, b" login:")
    thread.join()
    assert console.searches == 2


def test_expect_from_two_threads_serves_both() -> None:
    console = DebugConsole()
    found: list[bytes] = []

    def wait() -> None:
        found.append(console.expect(re.compile(b"done."), timeout=30).group())

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    show(console, b"done1 done2 ")
    for thread in threads:
        thread.join()
    assert sorted(found) == [b"done1", b"done2"]


def test_expect_timeout_shows_what_was_wanted_and_the_end_of_the_output() -> None:
    console = DebugConsole()
    show(console, b"y" * 500 + b"Kernel panic")
    with pytest.raises(TimeoutError) as caught:
        console.expect(b"login:", timeout=0.01)
    error = caught.value
    assert isinstance(error, ExpectTimeout)
    assert isinstance(error, KvmpyError)
    assert error.pattern == b"login:"
    assert error.tail.endswith(b"Kernel panic")
    assert "login:" in str(error)
    assert "Kernel panic" in str(error)


def test_expect_after_the_ring_has_lost_bytes_finds_what_is_left() -> None:
    console = DebugConsole(history=10)
    show(console, b"first")
    console.expect(b"first")
    show(console, b"x" * 1000 + b"last")
    assert console.expect(b"last").end() == 10


def test_close_ends_waiting() -> None:
    console = DebugConsole()
    console.attach(RecordingBoard())
    failures: list[ExpectTimeout] = []

    def wait() -> None:
        try:
            console.expect(b"never", timeout=60)
        except ExpectTimeout as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    console.close()
    thread.join()
    assert "closed" in str(failures[0])


def test_whoever_asked_for_lines_gets_each_when_it_has_ended() -> None:
    console = DebugConsole(history=16)
    lines: list[bytes] = []
    console.on_line(lines.append)
    show(console, b"one\r\n\ntw")
    assert lines == [b"one\r\n", b"\n"]
    show(console, b"o\n" + b"." * 60 + b"!\n")
    assert lines[2] == b"two\n"
    assert lines[3].endswith(b"...!\n")
    console.on_line(None)
    show(console, b"five\n")
    assert len(lines) == 4
