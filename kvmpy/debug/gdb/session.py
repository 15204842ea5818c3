"""One gdb's session: what each packet does to the target (gdb manual, E.2 "Packets" and E.3 "Stop Reply Packets").

The session knows bytes and a `GdbTarget`, and neither sockets nor KVM. It runs in one thread; `report` is called there,
too, with what the target reported. In between the guest runs on its own, so nothing here waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from kvmpy.debug.gdb.architecture import Architecture
from kvmpy.debug.gdb.link import Link
from kvmpy.debug.gdb.packet import PACKET_SIZE, Mark
from kvmpy.debug.gdb.queries import Queries
from kvmpy.debug.gdb.resumption import Resumption, from_vcont
from kvmpy.debug.gdb.state_packets import StatePackets
from kvmpy.debug.gdb.target import GdbTarget, Point, Reason, Report, RunEnded, Signal, TargetError, ThreadStopped
from kvmpy.debug.gdb.wire import (
    ALL_THREADS,
    ANY_THREAD,
    Malformed,
    address_and_length,
    number,
    register_bytes,
    thread_id,
)
from kvmpy.errors import KvmpyError

__all__ = ["Session"]

_ENOUGH_OUTPUT = 4 * PACKET_SIZE
"""As long as so much waits to be sent, no further packet is looked at: a client that does not read gets no more."""

_OK = b"OK"
_MALFORMED = b"E16"  # EINVAL
_NO_SUCH_MEMORY = b"E0e"  # EFAULT; gdb takes no text in answers to `m`
_WHILE_RUNNING = (b"k", b"D", b"vKill")

Handler = Callable[[Any, bytes], bytes | None]


class Session(StatePackets):
    """Answers one gdb. `report_soon` is what the target calls from its threads: it has `report` called here, later.

    `architecture` fixes what gdb is told; otherwise it is what fits the mode of the guest when gdb asks.
    """

    def __init__(
        self, target: GdbTarget, report_soon: Callable[[Report], None], architecture: Architecture | None = None
    ) -> None:
        super().__init__(target, architecture)
        self.link = Link()
        self.over = False
        """Whether the connection is to be closed when the output has been sent."""
        self._report_soon = report_soon
        self._connected = False
        self._resumption: Resumption | None = None
        """How the guest runs now; None while it stands."""
        self._resumed_by_hc = ALL_THREADS
        self._stopped = ThreadStopped(1)
        self._ended: RunEnded | None = None
        self._queries = Queries(self)

    # Bytes in, bytes out

    def work(self) -> bool:
        """Handle the packets that have arrived, as long as gdb takes the answers. True: all of them, feed more."""
        link = self.link
        while not self.over and len(link.output) < _ENOUGH_OUTPUT:
            received = link.next()
            if received is None:
                return True
            if isinstance(received, bytes):
                self._packet(received)
            elif received is Mark.INTERRUPT:
                self._interrupt()
            elif received in (Mark.TOO_LONG, Mark.DAMAGED):
                link.send(_MALFORMED)
        return False

    def close(self) -> None:
        """The connection is gone: the guest goes on without a debugger."""
        self.over = True
        if self._connected:
            self._connected = False
            self.target.disconnect()

    def ended(self, report: RunEnded) -> None:
        """The machine goes away: tell a gdb that waits."""
        if self._connected:
            self.report(report)
        self.over = True

    # What the target reports

    def report(self, report: Report) -> None:
        """A stop, or the end of the run."""
        resumption = self._resumption
        if isinstance(report, RunEnded):
            self._ended = report
            self._resumption = None
            if resumption is not None:
                self._console(report.message)
                self.link.send(self.stop_reply())
            return
        if resumption is None:
            return
        self.target.wait_until_standing()
        if self._steps_on(resumption, report):
            return
        if resumption.interrupted and report.signal is Signal.TRAP and report.reason is Reason.OTHER:
            report = ThreadStopped(report.thread, Signal.INT, message=report.message)
        self._stopped = report
        self.thread = report.thread
        reply = self.stop_reply()
        self._resumption = None
        self._console(report.message)
        self.link.send(reply)

    def _steps_on(self, resumption: Resumption, report: ThreadStopped) -> bool:
        """Whether a step within a range was not the last one, and the next one is under way."""
        step = (resumption.stepping, Signal.TRAP, Reason.OTHER)
        if resumption.range is None or (report.thread, report.signal, report.reason) != step:
            return False
        (pc,) = self.target.read_registers(report.thread, ("pc",))
        if pc is None or not resumption.goes_on(pc) or self.target.has_breakpoint(pc):
            return False
        try:
            self.target.resume(resumption.running, resumption.stepping)
        except KvmpyError:
            return False
        return True

    def stop_reply(self) -> bytes:
        """Why the guest stands, or how it ended; with the registers that gdb would ask for next."""
        if self._ended is not None:
            if self._ended.signal is not None:
                return b"X%02x" % self._ended.signal
            return b"W%02x" % (self._ended.code & 0xFF)
        stop, description = self._stopped, self.description
        reply = bytearray(b"T%02x" % stop.signal)
        if stop.reason is not Reason.OTHER:
            reply += b"%s:%s;" % (stop.reason.value.encode(), b"" if stop.address is None else b"%x" % stop.address)
        registers = [description.registers[index] for index in description.expedited]
        values = self.target.read_registers(stop.thread, [register.source for register in registers])
        for index, register, value in zip(description.expedited, registers, values, strict=True):
            if value is not None:
                reply += b"%x:%s;" % (index, register_bytes(value, register.size))
        reply += b"thread:%x;" % stop.thread
        return bytes(reply)

    def _console(self, text: str) -> None:
        """Print on gdb's console, which is allowed while it waits for a stop."""
        if text:
            self.link.send(b"O" + f"kvmpy: {text}\n".encode().hex().encode())

    def _interrupt(self) -> None:
        if self._resumption is not None:
            self._resumption.interrupted = True
            self.target.interrupt()

    # Packets

    def _packet(self, packet: bytes) -> None:
        try:
            answer = self._answer(packet)
        except Malformed:
            answer = _MALFORMED
        except KvmpyError as error:
            # gdb prints it, except for packets whose answer is data.
            answer = b"E." + str(error).encode("ascii", "replace") if packet[:1] != b"m" else _NO_SUCH_MEMORY
        if answer is not None:
            self.link.send(answer)

    def _answer(self, packet: bytes) -> bytes | None:
        if not self._connected:
            self._connect()
        letter = packet[:1]
        if self._resumption is not None and not packet.startswith(_WHILE_RUNNING):
            raise TargetError("the guest is running")
        if letter in (b"q", b"Q"):
            return self._queries.answer(packet)
        if letter == b"v":
            return self._multi_letter(packet)
        handler = self._HANDLERS.get(letter)
        if handler is None:
            return b""  # gdb's sign for "not supported"
        if self._ended is not None and letter not in (b"?", b"D", b"k", b"H"):
            raise TargetError("the run has ended")
        return handler(self, packet[1:])

    def _connect(self) -> None:
        self._stopped = self.target.connect(self._report_soon)
        self._connected = True
        self.thread = self._stopped.thread
        self.describe()

    def _multi_letter(self, packet: bytes) -> bytes | None:
        if packet == b"vCont?":
            return b"vCont;c;C;s;S;r"
        if packet.startswith(b"vCont;"):
            self._resume(from_vcont(packet[5:], self.target.threads(), self.thread))
            return None
        if packet.startswith(b"vKill"):
            self._kill(b"")
            return _OK
        return b""

    # One letter each

    def _why(self, _: bytes) -> bytes:
        return self.stop_reply()

    def _set_thread(self, text: bytes) -> bytes:
        operation, thread = text[:1], thread_id(text[1:])
        if thread not in (ALL_THREADS, ANY_THREAD):
            self._check_thread(thread)
        if operation == b"g":
            if thread > ANY_THREAD:
                self.thread = thread
        elif operation == b"c":
            self._resumed_by_hc = thread
        else:
            raise Malformed("H is followed by g or c")
        return _OK

    def _thread_is_alive(self, text: bytes) -> bytes:
        self._check_thread(thread_id(text))
        return _OK

    def _check_thread(self, thread: int) -> None:
        if thread not in self.target.threads():
            raise Malformed(f"no thread {thread}")

    def _insert(self, text: bytes) -> bytes:
        point = _point(text)
        if point is None:
            return b""
        self.target.insert(*point)
        return _OK

    def _remove(self, text: bytes) -> bytes:
        point = _point(text)
        if point is None:
            return b""
        self.target.remove(*point)
        return _OK

    def _continue(self, text: bytes) -> None:
        self._go_to(text)
        self._resume(from_vcont(b";c", self._named_by_hc(), self.thread))

    def _continue_with_signal(self, text: bytes) -> None:
        signal, _, address = text.partition(b";")
        number(signal)
        self._continue(address)

    def _step(self, text: bytes) -> None:
        self._go_to(text)
        threads = self._named_by_hc()
        thread = self.thread if self.thread in threads else threads[0]
        self._resume(Resumption(tuple(other for other in threads if other != thread), thread))

    def _step_with_signal(self, text: bytes) -> None:
        signal, _, address = text.partition(b";")
        number(signal)
        self._step(address)

    def _named_by_hc(self) -> tuple[int, ...]:
        chosen = self._resumed_by_hc
        return tuple(self.target.threads()) if chosen in (ALL_THREADS, ANY_THREAD) else (chosen,)

    def _go_to(self, address: bytes) -> None:
        if address:
            self.target.write_registers(self.thread, {"pc": number(address)})

    def _resume(self, resumption: Resumption) -> None:
        """Have the guest go on. The answer to gdb is the next stop."""
        if self._ended is not None:
            self.link.send(self.stop_reply())
            return
        if not resumption.running and resumption.stepping is None:
            raise Malformed("no thread is to go on")
        self._resumption = resumption
        try:
            self.target.resume(resumption.running, resumption.stepping)
        except BaseException:
            self._resumption = None
            raise

    def _detach(self, _: bytes) -> bytes:
        self._resumption = None
        self.close()
        return _OK

    def _kill(self, _: bytes) -> None:
        self.over = True
        self._connected = False
        self._resumption = None
        self.target.kill()

    _HANDLERS: ClassVar[dict[bytes, Handler]] = {
        b"?": _why,
        b"H": _set_thread,
        b"T": _thread_is_alive,
        **StatePackets.HANDLERS,
        b"Z": _insert,
        b"z": _remove,
        b"c": _continue,
        b"C": _continue_with_signal,
        b"s": _step,
        b"S": _step_with_signal,
        b"D": _detach,
        b"k": _kill,
    }


def _point(text: bytes) -> tuple[Point, int, int] | None:
    """`type,address,kind` of Z and z; what follows (conditions, commands) is never announced. None: unknown type."""
    kind, _, rest = text.partition(b",")
    address, length = address_and_length(rest.partition(b";")[0])
    try:
        return Point(number(kind)), address, length
    except ValueError:
        return None
