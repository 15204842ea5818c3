"""Answers to `q` and `Q` packets (gdb manual, E.4 "General Query Packets")."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from kvmpy.debug.gdb.packet import PACKET_SIZE
from kvmpy.debug.gdb.wire import Malformed, address_and_length, data, number

if TYPE_CHECKING:
    from kvmpy.debug.gdb.session import Session

__all__ = ["Queries"]

_FEATURES = (
    b"PacketSize=%x" % PACKET_SIZE,
    b"QStartNoAckMode+",
    b"qXfer:features:read+",
    b"qXfer:threads:read+",
    b"vContSupported+",
    b"swbreak+",
    b"hwbreak+",
)
_PIECE = PACKET_SIZE // 2 - 1
"""Bytes of a document that fit into a packet even when all of them have to be escaped."""
_CONSOLE_PIECE = PACKET_SIZE // 2 - 1
_LISTED = (PACKET_SIZE - 1) // 17
"""Thread ids that surely fit into a packet."""


class Queries:
    """Answers queries for a session, whose state they look at."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._documents: dict[bytes, bytes] = {}
        """Documents as they were when gdb began to read them."""
        self._unlisted: list[int] = []

    def answer(self, packet: bytes) -> bytes | None:
        """The answer; empty for what is not known, as the protocol wants it; None when it has been sent already."""
        session = self._session
        name, _, rest = packet.partition(b":")
        match name:
            case b"qSupported":
                return b";".join(_FEATURES)
            case b"qXfer":
                return self._transfer(rest)
            case b"qAttached":
                return b"1"  # so that gdb detaches when it leaves, instead of killing the guest
            case b"qC":
                return b"QC%x" % session.thread
            case b"qfThreadInfo":
                self._unlisted = list(session.target.threads())
                return self._list_threads()
            case b"qsThreadInfo":
                return self._list_threads()
            case b"qSymbol" | b"QPassSignals":
                return b"OK"
            case b"QStartNoAckMode":
                session.link.send(b"OK")
                session.link.stop_acknowledging()
                return None
        if packet.startswith(b"qThreadExtraInfo,"):
            return self._thread_text(number(packet.partition(b",")[2])).encode().hex().encode()
        if packet.startswith(b"qRcmd,"):
            return self._monitor(data(packet.partition(b",")[2]))
        return b""

    def _list_threads(self) -> bytes:
        listed, self._unlisted = self._unlisted[:_LISTED], self._unlisted[_LISTED:]
        return b"m" + b",".join(b"%x" % thread for thread in listed) if listed else b"l"

    def _thread_text(self, thread: int) -> str:
        target = self._session.target
        if thread not in target.threads():
            raise Malformed(f"no thread {thread}")
        return f"{target.thread_name(thread)} [{target.thread_state(thread)}]"

    def _monitor(self, command: bytes) -> bytes:
        text = self._session.target.monitor(self._session.thread, command.decode("utf-8", "replace"))
        content = text.encode("utf-8", "replace")
        if content and not content.endswith(b"\n"):
            content += b"\n"
        for start in range(0, len(content), _CONSOLE_PIECE):
            self._session.link.send(b"O" + content[start : start + _CONSOLE_PIECE].hex().encode())
        return b"OK"

    # Documents, read in pieces

    def _transfer(self, text: bytes) -> bytes:
        kind, _, rest = text.partition(b":")
        operation, _, rest = rest.partition(b":")
        annex, _, span = rest.partition(b":")
        if operation != b"read" or kind not in (b"features", b"threads"):
            return b""
        offset, length = address_and_length(span)
        if kind == b"features" and annex != b"target.xml":
            return b"E00"  # the annex is not known
        if offset == 0 or kind not in self._documents:
            self._documents[kind] = self._session.describe().xml if kind == b"features" else self._threads()
        document = self._documents[kind]
        piece = document[offset : offset + min(length, _PIECE)]
        return (b"m" if offset + len(piece) < len(document) else b"l") + piece

    def _threads(self) -> bytes:
        target = self._session.target
        lines = ['<?xml version="1.0"?>', "<threads>"]
        for thread in target.threads():
            name, state = quoteattr(target.thread_name(thread)), escape(target.thread_state(thread))
            lines.append(f'<thread id="{thread:x}" core="{thread - 1}" name={name}>{state}</thread>')
        return "\n".join([*lines, "</threads>", ""]).encode()
