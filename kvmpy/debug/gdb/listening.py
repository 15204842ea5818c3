"""Where a gdb server listens: a TCP port, on the loopback interface unless told otherwise, or a UNIX socket."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from kvmpy.errors import UsageError

__all__ = ["Address", "Listening", "parse_address"]

Address = tuple[str, int] | str
"""(host, port), or the path of a UNIX socket."""

LOOPBACK = "127.0.0.1"


def parse_address(text: str) -> Address:
    """What people write: ":1234" and "1234" (loopback), "host:port", "[::1]:1234", or a path, which has a slash.

    Raises UsageError for anything else.
    """
    if "/" in text:
        return text
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        raise UsageError(f"{text!r} is no address: write :PORT, HOST:PORT, or a path with a slash")
    return host or LOOPBACK, int(port)


class Listening:
    """A listening socket. `address` is where it is: the port is chosen by the system when 0 was asked for.

    Raises UsageError when the address cannot be had.
    """

    def __init__(self, address: Address) -> None:
        path = address if isinstance(address, str) else None
        try:
            self.socket = _unix_socket(path) if path is not None else _tcp_socket(address)  # type: ignore[arg-type]
        except (OSError, OverflowError, TypeError, ValueError) as error:
            raise UsageError(f"a gdb server cannot listen at {address!r}: {error}") from error
        self.socket.setblocking(False)
        self._pid = os.getpid()
        self._path = path
        if path is not None:
            self.address: Address = path
        else:
            host, port = self.socket.getsockname()[:2]
            self.address = (host, port)

    def close(self) -> None:
        """Stop listening; a UNIX socket's file goes, too."""
        self.socket.close()
        if self._path is not None and os.getpid() == self._pid:
            with suppress(OSError):
                os.unlink(self._path)
            self._path = None

    def accept(self) -> socket.socket | None:
        """A connection that waits, not blocking; None when it is gone already."""
        try:
            connection, _ = self.socket.accept()
        except OSError:
            return None
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # packets are small, and gdb waits
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection


def _tcp_socket(address: tuple[str, int]) -> socket.socket:
    host, port = address
    if not 0 <= port <= 0xFFFF:  # getaddrinfo would cut it to 16 bits
        raise ValueError("a port is a number from 0 to 65535")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, place = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen()
    except BaseException:
        listening.close()
        raise
    return listening


def _unix_socket(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(path)
        listening.listen()
    except BaseException:
        listening.close()
        raise
    return listening
