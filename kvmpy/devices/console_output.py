"""What a console does with the characters the guest writes: keep the last ones, pass them on, wait for a pattern."""

from __future__ import annotations

import io
import re
import threading
import time
from codecs import getincrementaldecoder
from collections.abc import Callable

from kvmpy.errors import KvmpyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, TypeGuard, overload
else:
    Protocol = object

__all__ = ["ConsoleOutput", "ExpectTimeout", "Sink"]

KiB = 1024
_BYTES = tuple(bytes((value,)) for value in range(256))
_LINE_FEED = 0x0A


class _Writable(Protocol):
    def write(self, data: Any, /) -> Any: ...


class _Sendable(Protocol):
    def sendall(self, data: bytes, /) -> None: ...


Sink = Callable[[bytes], object] | _Writable | _Sendable
"""Where output goes besides the ring: a callable that takes bytes, a file object (binary or text), or a socket."""


class ExpectTimeout(KvmpyError, TimeoutError):
    """The console did not show `pattern` within `timeout` seconds, or was closed. `tail` is what it showed last."""

    def __init__(self, pattern: object, timeout: float, tail: bytes, *, closed: bool = False) -> None:
        why = "the console was closed" if closed else f"nothing in {timeout:g} s"
        super().__init__(f"waited for {pattern!r}: {why}; the output ends with {tail!r}")
        self.pattern = pattern
        self.timeout = timeout
        self.tail = tail


def _deliver_to(sink: Sink) -> Callable[[bytes], object]:
    """One way to call every kind of sink. A file is flushed after each write: a terminal must show half a line."""
    if isinstance(sink, io.TextIOWrapper):
        sink = sink.buffer  # characters arrive byte by byte: the terminal puts UTF-8 together, not we
    sendall = getattr(sink, "sendall", None)
    if sendall is not None:
        return sendall  # type: ignore[no-any-return]
    write = getattr(sink, "write", None)
    if write is None:
        if not callable(sink):
            raise TypeError(f"a sink is a callable, a file object or a socket, not {type(sink).__name__}")
        return sink
    flush = getattr(sink, "flush", None)
    decoder = getincrementaldecoder("utf-8")("replace") if isinstance(sink, io.TextIOBase) else None

    def write_and_flush(data: bytes) -> None:
        write(data if decoder is None else decoder.decode(data))
        if flush is not None:
            flush()

    return write_and_flush


def _last_byte(pattern: bytes | str | re.Pattern[Any]) -> bytes:
    """With which byte output ends in which the pattern comes; b"" when that is not known."""
    if isinstance(pattern, re.Pattern):
        return b""
    return (pattern if isinstance(pattern, bytes) else pattern.encode("utf-8", "surrogateescape"))[-1:]


def _is_bytes(pattern: re.Pattern[Any]) -> TypeGuard[re.Pattern[bytes]]:
    return isinstance(pattern.pattern, bytes)


class _Waiter(threading.Event):
    """Somebody waits for output that ends with `last`, one byte; b"" if it may end with any."""

    def __init__(self, last: bytes) -> None:
        super().__init__()
        self.last = last


class ConsoleOutput:
    """The output half of a console: a bounded ring of the last `history` bytes, and a sink.

    What the sink raises goes to whoever runs the vCPU. The ring takes a byte after the sink did, so a handler that is
    called again after such an exception doubles nothing. The ring is a record on the host and no part of `state()`.
    """

    def __init__(self, *, sink: Sink | None = None, history: int = 64 * KiB) -> None:
        if history < 1:
            raise ValueError(f"history must be at least 1 byte, not {history}")
        self._history = history
        self._limit = 2 * history  # trimmed in one go when twice as long, so that a byte costs a constant time
        self._recent = bytearray()
        self._trimmed = 0  # bytes of the stream before `_recent`
        self._cursor = 0  # where in the stream the next expect() starts
        self._output_closed = False
        self._line_listener: Callable[[bytes], object] | None = None
        self._output_lock = threading.Lock()
        self._search_lock = threading.Lock()
        self._waiters: list[_Waiter] = []
        self._sink = None if sink is None else _deliver_to(sink)

    def connect_sink(self, sink: Sink | None) -> None:
        """Send output from now on to `sink` too (None: to the ring only)."""
        self._sink = None if sink is None else _deliver_to(sink)

    def _put(self, byte: int) -> None:
        """The guest wrote `byte`. On the path of every character: no lock unless somebody waits or the ring is full."""
        if self._sink is not None:
            self._sink(_BYTES[byte])
        recent = self._recent
        recent.append(byte)
        if byte == _LINE_FEED and self._line_listener is not None:
            self._line_listener(bytes(recent[recent.rfind(b"\n", 0, -1) + 1 :]))
        if len(recent) > self._limit:
            self._trim()
        # Append, then look for waiters; expect() registers, then looks at the bytes: nobody sleeps through one.
        if self._waiters:
            self._wake(_BYTES[byte])

    def _put_bytes(self, data: bytes) -> None:
        """The guest wrote all of `data` at once."""
        if self._sink is not None:
            self._sink(data)
        recent = self._recent
        unfinished = recent.rfind(b"\n") + 1
        recent += data
        if self._line_listener is not None and _LINE_FEED in data:
            *ended, _ = bytes(recent[unfinished:]).split(b"\n")
            for line in ended:
                self._line_listener(line + b"\n")
        if len(recent) > self._limit:
            self._trim()
        if self._waiters:
            self._wake(data)

    def _trim(self) -> None:
        with self._output_lock:
            excess = max(0, len(self._recent) - self._history)
            del self._recent[:excess]
            self._trimmed += excess

    def on_line(self, call: Callable[[bytes], object] | None) -> None:
        """Call `call(line)` whenever the guest has ended a line, with its line feed; None: no longer.

        It is called in the guest's thread, which waits for it, and must not raise. Of a line longer than `history` it
        gets the end.
        """
        self._line_listener = call

    def _wake(self, written: bytes | None = None) -> None:
        """Wake those for whom the end of what they wait for may be in `written`; None: all.

        To search at every character would cost the guest's thread more than the rest of its way through Python: both
        want the interpreter.
        """
        for waiter in self._waiters:
            if written is None or waiter.last in written:
                with self._output_lock:
                    self._waiters = [other for other in self._waiters if other is not waiter]
                waiter.set()

    def _snapshot(self) -> tuple[int, bytes]:
        """(stream offset of the first byte, the retained bytes)."""
        with self._output_lock:
            recent = bytes(self._recent)
            excess = max(0, len(recent) - self._history)
            return self._trimmed + excess, recent[excess:]

    @property
    def output(self) -> bytes:
        """The last bytes that the guest wrote, at most `history` of them."""
        return self._snapshot()[1]

    @property
    def text(self) -> str:
        """`output` as UTF-8; what is not UTF-8 shows as U+FFFD."""
        return self.output.decode("utf-8", "replace")

    @property
    def dropped(self) -> int:
        """How many bytes have left the ring. (The sink had them.)"""
        return self._snapshot()[0]

    if TYPE_CHECKING:

        @overload
        def expect(self, pattern: bytes | re.Pattern[bytes], timeout: float = 5.0) -> re.Match[bytes]: ...
        @overload
        def expect(self, pattern: str | re.Pattern[str], timeout: float = 5.0) -> re.Match[str]: ...

    def expect(
        self, pattern: bytes | str | re.Pattern[bytes] | re.Pattern[str], timeout: float = 5.0
    ) -> re.Match[bytes] | re.Match[str]:
        """Wait up to `timeout` seconds until the output contains `pattern`, from another thread than the vCPU's.

        Bytes and str are taken literally; a compiled expression is searched for. The search starts after the match of
        the last `expect`, so successive calls walk through the output. Raises `ExpectTimeout` (a TimeoutError).
        """
        deadline = time.monotonic() + timeout
        wake = _Waiter(_last_byte(pattern))
        try:
            while True:
                wake.clear()
                with self._output_lock:
                    if wake not in self._waiters:
                        self._waiters = [*self._waiters, wake]
                    closed = self._output_closed
                with self._search_lock:  # two that wait for the same find two
                    match = self._search(pattern)
                if match is not None:
                    return match
                remaining = deadline - time.monotonic()
                if closed or remaining <= 0:
                    raise ExpectTimeout(pattern, timeout, self.output[-200:], closed=closed)
                wake.wait(remaining)
        finally:
            with self._output_lock:
                self._waiters = [waiter for waiter in self._waiters if waiter is not wake]

    def _search(
        self, pattern: bytes | str | re.Pattern[bytes] | re.Pattern[str]
    ) -> re.Match[bytes] | re.Match[str] | None:
        start, data = self._snapshot()
        data = data[max(0, self._cursor - start) :]
        start = max(start, self._cursor)
        if isinstance(pattern, bytes):  # noqa: SIM114 - joined, the two would be one type to the checker
            pattern = re.compile(re.escape(pattern))
        elif isinstance(pattern, str):
            pattern = re.compile(re.escape(pattern))
        if _is_bytes(pattern):
            match = pattern.search(data)
            if match is not None:
                self._cursor = start + match.end()
            return match
        # surrogateescape loses nothing, so a place in the text can be turned back into a place in the bytes.
        text = data.decode("utf-8", "surrogateescape")
        characters: re.Pattern[str] = pattern  # type: ignore[assignment]
        found = characters.search(text)
        if found is not None:
            self._cursor = start + len(text[: found.end()].encode("utf-8", "surrogateescape"))
        return found

    def _close_output(self) -> None:
        """No more output comes: whoever waits for some is told."""
        self._output_closed = True
        self._wake()
