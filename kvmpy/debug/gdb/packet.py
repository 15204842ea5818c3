"""Packets of the gdb remote serial protocol: `$` payload `#` checksum (gdb manual, appendix E.1 "Overview").

Bytes go into a `PacketReader` as they arrive, in whatever pieces, and come out as packets and marks. What it holds is
bounded whatever the other side sends.
"""

from __future__ import annotations

import re
from enum import Enum

__all__ = ["PACKET_SIZE", "Mark", "PacketReader", "encode"]

PACKET_SIZE = 0x8000
"""Bytes of the longest packet between `$` and `#`, both ways: what `qSupported` tells gdb."""

_START = re.compile(rb"[$+\-\x03]")
_END = re.compile(rb"[#$]")
_ESCAPED = re.compile(rb"\}(.)", re.DOTALL)
_TO_ESCAPE = re.compile(rb"[#$}*]")
"""`*` would begin a run length, which we never send."""
_HEX = frozenset(b"0123456789abcdefABCDEF")


class Mark(Enum):
    """What arrives besides whole packets."""

    ACK = "+"
    NAK = "-"
    INTERRUPT = "Ctrl-C"
    DAMAGED = "wrong checksum"
    TOO_LONG = "longer than PACKET_SIZE"


class PacketReader:
    """Cuts a stream of bytes into packets. `feed` takes bytes, `next` gives what has arrived whole.

    Bytes between packets that mean nothing are skipped. A `$` within a packet begins a new one: the rest of the old one
    was lost. Whoever feeds asks `next` until it answers None before feeding again; then no more than one incomplete
    packet is ever held.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 1
        """How much of the buffer is known not to end the packet that it begins with."""
        self._skipping = False
        """Whether the packet at hand is too long, and is dropped as it comes."""

    def __len__(self) -> int:
        """How many bytes wait."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes that arrived."""
        self._buffer += data

    def next(self) -> bytes | Mark | None:
        """The next packet's payload, without escapes, or a mark; None until more bytes arrive."""
        if not self._skipping:
            mark = self._skip_to_packet()
            if mark is not None or not self._buffer:
                return mark
        return self._packet()

    def _skip_to_packet(self) -> Mark | None:
        """Have the buffer begin with `$`, or be empty; answer with a mark that came before."""
        buffer = self._buffer
        if buffer.startswith(b"$"):
            return None
        found = _START.search(buffer)
        if found is None:
            buffer.clear()
            return None
        byte = found[0]
        if byte == b"$":
            del buffer[: found.start()]
            return None
        del buffer[: found.end()]
        return {b"+": Mark.ACK, b"-": Mark.NAK, b"\x03": Mark.INTERRUPT}[byte]

    def _packet(self) -> bytes | Mark | None:
        buffer = self._buffer
        while True:
            end = _END.search(buffer, self._scanned)
            if end is None:
                self._scanned = len(buffer)
                if self._scanned > PACKET_SIZE:
                    self._skipping = True
                if self._skipping:
                    buffer.clear()
                    self._scanned = 0
                return None
            if end[0] == b"#":
                break
            del buffer[: end.start()]
            self._skipping = False
            self._scanned = 1
        place = end.start()
        if len(buffer) < place + 3:
            self._scanned = place
            return None
        too_long = self._skipping or place > PACKET_SIZE + 1
        payload = bytes(buffer[1:place]) if not too_long else b""
        digits = bytes(buffer[place + 1 : place + 3])
        del buffer[: place + 3]
        self._scanned = 1
        self._skipping = False
        if too_long:
            return Mark.TOO_LONG
        if not _HEX.issuperset(digits) or int(digits, 16) != sum(payload) & 0xFF or payload.endswith(b"}"):
            return Mark.DAMAGED
        if b"}" in payload:
            payload = _ESCAPED.sub(lambda escaped: bytes((escaped[1][0] ^ 0x20,)), payload)
        return payload


def encode(payload: bytes) -> bytes:
    """The packet with this payload, as it goes over the wire."""
    if _TO_ESCAPE.search(payload):
        payload = _TO_ESCAPE.sub(lambda found: b"}" + bytes((found[0][0] ^ 0x20,)), payload)
    return b"$%s#%02x" % (payload, sum(payload) & 0xFF)
