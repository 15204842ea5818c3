"""One gdb's connection, as bytes: acknowledgements and output on top of packets (gdb manual, E.1 and E.5)."""

from __future__ import annotations

from kvmpy.debug.gdb.packet import Mark, PacketReader, encode

__all__ = ["Link"]


class Link:
    """Takes bytes from gdb by `feed`, gives payloads by `next`, keeps in `output` what is to be sent.

    Every packet is acknowledged until `stop_acknowledging`. A packet that gdb did not understand is sent again.
    """

    def __init__(self) -> None:
        self.output = bytearray()
        self._reader = PacketReader()
        self._acknowledging = True
        self._last = b""

    def feed(self, data: bytes) -> None:
        """Bytes from gdb. Before the next ones, `next` must have answered None."""
        self._reader.feed(data)

    def next(self) -> bytes | Mark | None:
        """The next payload, or a mark, which is dealt with here unless it is INTERRUPT or, needing an answer like a
        packet, TOO_LONG, or DAMAGED when nothing is acknowledged. None: no more."""
        received = self._reader.next()
        if not self._acknowledging:
            return Mark.ACK if received is Mark.NAK else received
        if received is Mark.NAK:
            self.output += self._last
        elif received is Mark.DAMAGED:
            self.output += b"-"
            return Mark.NAK
        elif isinstance(received, bytes) or received is Mark.TOO_LONG:
            self.output += b"+"
        return received

    def stop_acknowledging(self) -> None:
        """From now on neither side sends + or -."""
        self._acknowledging = False
        self._last = b""

    def send(self, payload: bytes) -> None:
        """Queue a packet."""
        packet = encode(payload)
        if self._acknowledging:
            self._last = packet
        self.output += packet
