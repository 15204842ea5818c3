"""A thread that serves one gdb at a time over sockets.

The thread sleeps in poll(), which releases the interpreter's lock, until gdb sends, the target reports, or `close`.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import deque
from contextlib import suppress
from typing import Self

from kvmpy.debug.gdb.architecture import Architecture
from kvmpy.debug.gdb.link import Link
from kvmpy.debug.gdb.listening import LOOPBACK, Address, Listening
from kvmpy.debug.gdb.packet import PACKET_SIZE, PacketReader, encode
from kvmpy.debug.gdb.session import Session
from kvmpy.debug.gdb.target import GdbTarget, Report, RunEnded, Signal
from kvmpy.errors import KvmpyError

__all__ = ["SocketServer"]

_AT_ONCE = 0x1_0000
"""Bytes that are read from a socket at a time."""
_CANDIDATES = 4
"""Connections that have not said anything yet; the oldest one gives way to another."""
_REFUSAL = b"+" + encode(b"E.another gdb is attached to this machine; it takes one at a time")


class _Candidate:
    """A connection from which no packet has come: whoever only looks whether the port is open stops no guest."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.received = b""
        self._reader = PacketReader()

    def read(self) -> bool | None:
        """Whether a packet has come by now; None when the connection is gone, or talks something else."""
        data = _receive(self.socket)
        if data is None:
            return False
        if not data or len(self.received) + len(data) > PACKET_SIZE + _AT_ONCE:
            return None
        self.received += data
        self._reader.feed(data)
        while (item := self._reader.next()) is not None:
            if isinstance(item, bytes):
                return True
        return False


class _Client:
    """The gdb that is being served."""

    def __init__(self, connection: socket.socket, session: Session) -> None:
        self.socket = connection
        self.session = session
        self.hungry = True
        """Whether the session has handled all that was read."""

    @property
    def link(self) -> Link:
        return self.session.link

    def read(self) -> bool:
        """Take what has arrived. False: the connection is gone."""
        data = _receive(self.socket)
        if data:
            self.link.feed(data)
        return data != b""

    def flush(self) -> bool:
        """Send what can be sent without waiting. False: the connection is gone."""
        output = self.link.output
        try:
            while output:
                del output[: self.socket.send(output)]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


class SocketServer:
    """Serves `target` to gdb at `address`, in a thread of its own, until `close`. A context manager.

    `address` is (host, port), port 0 for any that is free, or the path of a UNIX socket; the attribute says what it
    became. `architecture` fixes what gdb is told about the processor. Raises UsageError when the address cannot be had.
    """

    def __init__(
        self, target: GdbTarget, address: Address = (LOOPBACK, 0), *, architecture: Architecture | None = None
    ) -> None:
        self._target = target
        self._architecture = architecture
        self._listening = Listening(address)
        self.address = self._listening.address
        self._closing = False
        self._client: _Client | None = None
        self._candidates: list[_Candidate] = []
        self._reports: deque[tuple[Session, Report]] = deque()
        self._wake_lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._woken = False
        self._thread = threading.Thread(target=self._serve, name="kvmpy gdb server", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether a gdb is attached."""
        return self._client is not None

    def close(self) -> None:
        """End the session, telling gdb, and stop listening. The guest goes on."""
        self._closing = True
        self._wake_up()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # From other threads

    def _report_soon(self, session: Session, report: Report) -> None:
        self._reports.append((session, report))
        self._wake_up()

    def _wake_up(self) -> None:
        with self._wake_lock:
            if self._wake >= 0 and not self._woken:
                self._woken = True
                os.eventfd_write(self._wake, 1)

    # The thread

    def _serve(self) -> None:
        try:
            while not self._closing:
                self._serve_once()
        finally:
            if self._client is not None:
                self._client.session.ended(RunEnded(signal=Signal.KILL, message="the gdb server was closed"))
                self._client.flush()
                self._drop_client()
            for candidate in self._candidates:
                candidate.socket.close()
            self._listening.close()
            with self._wake_lock:
                os.close(self._wake)
                self._wake = -1

    def _serve_once(self) -> None:
        """Wait for something to happen, and deal with it."""
        poller = select.poll()
        poller.register(self._listening.socket, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        for candidate in self._candidates:
            poller.register(candidate.socket, select.POLLIN)
        client = self._client
        if client is not None:
            mask = select.POLLIN if client.hungry and not client.link.output else 0
            poller.register(client.socket, mask | (select.POLLOUT if client.link.output else 0))
        ready = dict(poller.poll())
        if self._wake in ready:
            self._take_reports()
        if self._closing:
            return
        if client is not None:
            self._attend_client(client, ready.get(client.socket.fileno(), 0))
        for candidate in list(self._candidates):
            if candidate.socket.fileno() in ready:
                self._attend_candidate(candidate)
        if self._listening.socket.fileno() in ready:
            self._accept()

    def _take_reports(self) -> None:
        with self._wake_lock:
            os.eventfd_read(self._wake)
            self._woken = False
        # Not until there are none: a guest that steps within a range reports again and again, and gdb must be heard.
        for _ in range(len(self._reports)):
            session, report = self._reports.popleft()
            if self._client is None or session is not self._client.session:
                continue  # of a session that is over
            try:
                session.report(report)
            except KvmpyError as error:  # the machine was closed meanwhile
                session.ended(RunEnded(signal=Signal.KILL, message=str(error)))

    def _attend_client(self, client: _Client, events: int) -> None:
        there = True
        if events & select.POLLIN:
            there = client.read()
        elif events & (select.POLLHUP | select.POLLERR):
            there = False
        while there:
            client.hungry = client.session.work()
            there = client.flush()
            if client.hungry or client.link.output or client.session.over:
                break  # else there was more to answer than is kept at a time, and all of that is sent
        if not there or (client.session.over and not client.link.output):
            self._drop_client()

    def _drop_client(self) -> None:
        client = self._client
        if client is not None:
            try:
                client.session.close()
            finally:
                self._client = None
                with suppress(OSError):
                    client.socket.shutdown(socket.SHUT_WR)
                client.socket.close()

    def _accept(self) -> None:
        connection = self._listening.accept()
        if connection is not None:
            self._candidates.append(_Candidate(connection))
            for candidate in self._candidates[:-_CANDIDATES]:
                self._forget(candidate)

    def _attend_candidate(self, candidate: _Candidate) -> None:
        speaks = candidate.read()
        if speaks is None:
            self._forget(candidate)
        elif speaks and self._client is None:
            self._candidates.remove(candidate)
            session = Session(
                self._target, lambda report: self._report_soon(session, report), architecture=self._architecture
            )
            session.link.feed(candidate.received)
            self._client = _Client(candidate.socket, session)
            self._attend_client(self._client, 0)
        elif speaks:
            with suppress(OSError):
                candidate.socket.send(_REFUSAL)
            self._forget(candidate)

    def _forget(self, candidate: _Candidate) -> None:
        self._candidates.remove(candidate)
        candidate.socket.close()


def _receive(connection: socket.socket) -> bytes | None:
    """What has arrived, at most _AT_ONCE bytes; none when the other side has closed; None when nothing is there."""
    try:
        return connection.recv(_AT_ONCE)
    except BlockingIOError:
        return None
    except OSError:
        return b""
