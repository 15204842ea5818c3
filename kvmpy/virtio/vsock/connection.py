"""One stream between a socket of the host and one of the guest, with the credit of both (virtio 1.2, 5.10.6.3)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

__all__ = ["BUFFER", "VsockConnection"]

BUFFER = 0x4_0000
"""Bytes that the guest may send beyond what the host's program has taken (our buf_alloc)."""
_TELL = BUFFER // 4
"""After so many bytes that were forwarded the guest is told, if no packet has done so."""
_IOV_MAX = 1024
_WRAP = 0xFFFF_FFFF


class VsockConnection:
    """`sock`, which does not block, is the host's end: what the guest sends is written there, and what can be read
    there is sent to the guest. Counters of bytes wrap at 4 GiB, as in packets.

    `answered(accepted)` is called when the guest answers a connection that the host has begun.
    """

    def __init__(
        self, sock: socket.socket, host_port: int, guest_port: int, answered: Callable[[bool], object] | None = None
    ) -> None:
        self.socket: socket.socket | None = sock
        self.host_port = host_port
        self.guest_port = guest_port
        self.answered = answered
        self.established = answered is None
        self.guest_sends = self.guest_receives = True
        """No SHUTDOWN of the guest has said otherwise."""
        self.host_sends = self.host_receives = True
        """The host's end was not read to its end, and takes what is written."""
        self.credit_asked = False
        self.forwarded = 0
        """Bytes that went on to the host's socket: our fwd_cnt."""
        self._told = 0
        self._unsent = bytearray()  # what that socket had no room for
        self._guest_buffer = self._guest_forwarded = 0  # what the guest says of itself
        self._sent = 0

    # --- to the guest -----------------------------------------------------------------------------------------------

    def peer_says(self, buffer: int, forwarded: int) -> None:
        """Each packet of the guest has its buf_alloc and fwd_cnt."""
        self._guest_buffer, self._guest_forwarded = buffer, forwarded
        if self.credit:
            self.credit_asked = False

    @property
    def credit(self) -> int:
        """How many bytes the guest has room for. What it says need not make sense."""
        return max(0, self._guest_buffer - (self._sent - self._guest_forwarded & _WRAP))

    def sent(self, length: int) -> None:
        """So many bytes went to the guest."""
        self._sent = self._sent + length & _WRAP

    # --- to the host ------------------------------------------------------------------------------------------------

    @property
    def unsent(self) -> int:
        """Bytes that the host's socket had no room for yet."""
        return len(self._unsent)

    def receive(self, views: list[memoryview], length: int) -> bool:
        """The guest sends. False: more than it was told there is room for. Raises OSError when nobody will read it."""
        if len(self._unsent) + length > BUFFER:
            return False
        if not self.host_receives:
            self._has_forwarded(length)
            return True
        done = 0
        if not self._unsent and self.socket is not None:
            with suppress(BlockingIOError, InterruptedError):
                done = self.socket.sendmsg(views[:_IOV_MAX])
            self._has_forwarded(done)
        for view in views:
            if done >= len(view):
                done -= len(view)
            else:
                self._unsent += view[done:]
                done = 0
        return True

    def flush(self) -> None:
        """The host's socket has room. Raises OSError when its other end is gone."""
        if self._unsent and self.socket is not None:
            try:
                done = self.socket.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                return
            del self._unsent[:done]
            self._has_forwarded(done)

    def discard(self) -> None:
        """Nobody reads at the host's end any more."""
        self.host_receives = False
        self._has_forwarded(len(self._unsent))
        self._unsent.clear()

    def _has_forwarded(self, length: int) -> None:
        self.forwarded = self.forwarded + length & _WRAP

    @property
    def has_news(self) -> bool:
        """Whether the guest knows too little of the room that there is by now."""
        return (self.forwarded - self._told & _WRAP) >= _TELL

    def credit_told(self) -> None:
        """A packet with `forwarded` is on its way."""
        self._told = self.forwarded

    def __repr__(self) -> str:
        return f"<VsockConnection host port {self.host_port}, guest port {self.guest_port}>"
