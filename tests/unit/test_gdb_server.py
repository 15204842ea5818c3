"""The server's sockets: one gdb at a time, nobody hangs, nothing is left behind."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from gdb_remote import PATIENCE, RemoteClient
from gdb_toy_target import ToyTarget
from kvmpy.debug.gdb.listening import parse_address
from kvmpy.debug.gdb.packet import encode
from kvmpy.debug.gdb.socket_server import SocketServer
from kvmpy.errors import UsageError


def wait_for(what: str, target: ToyTarget) -> None:
    """Until the target was asked for something."""
    end = time.monotonic() + PATIENCE
    while what not in target.log:
        assert time.monotonic() < end, f"no {what} in {target.log}"
        time.sleep(0.002)


def connect(server: SocketServer) -> socket.socket:
    """A bare connection."""
    assert isinstance(server.address, tuple)
    return socket.create_connection(server.address, PATIENCE)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":1234", ("127.0.0.1", 1234)),
        ("1234", ("127.0.0.1", 1234)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:7", ("::1", 7)),
        ("localhost:99", ("localhost", 99)),
        ("/run/gdb.sock", "/run/gdb.sock"),
        ("./gdb", "./gdb"),
    ],
)
def test_addresses_are_written_as_usual(text: str, address: object) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "gdb", ":", ":x", "host:", ":-1", ":65536", ":12 34", "1:2:x", ":²"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write :PORT"):
        parse_address(text)


def test_it_listens_on_loopback_at_a_port_of_its_choice() -> None:
    with SocketServer(ToyTarget()) as server:
        assert server.address[0] == "127.0.0.1"
        assert int(server.address[1]) > 0


def test_a_unix_socket_serves_and_goes_with_the_server(tmp_path: Path) -> None:
    path = str(tmp_path / "gdb.sock")
    with SocketServer(ToyTarget(), path) as server:
        assert server.address == path
        with RemoteClient(path) as client:
            assert client.ask(b"qC") == b"QC1"
    assert not os.path.exists(path)


@pytest.mark.parametrize("address", [("127.0.0.1", 99999), ("127.0.0.1", -1), ("no host", 0), "/no/such/folder/x", 7])
def test_an_address_that_cannot_be_had_is_a_usage_error(address: object) -> None:
    before = threading.active_count()
    with pytest.raises(UsageError, match="cannot listen"):
        SocketServer(ToyTarget(), address)  # type: ignore[arg-type]
    assert threading.active_count() == before


def test_a_port_in_use_is_a_usage_error(tmp_path: Path) -> None:
    with SocketServer(ToyTarget()) as server, pytest.raises(UsageError, match="in use"):
        SocketServer(ToyTarget(), server.address)


def test_a_second_gdb_is_told_and_closed_and_the_first_one_does_not_notice() -> None:
    with SocketServer(ToyTarget()) as server, RemoteClient(server.address) as first:
        assert first.ask(b"qC") == b"QC1"
        with RemoteClient(server.address) as second:
            assert second.ask(b"qSupported").startswith(b"E.another gdb is attached")
            assert second.is_closed()
        assert first.ask(b"qC") == b"QC1"


def test_after_the_first_gdb_has_gone_the_next_one_is_served() -> None:
    target = ToyTarget()
    with SocketServer(target) as server:
        for _ in range(3):
            with RemoteClient(server.address) as client:
                assert client.ask(b"qC") == b"QC1"
            wait_for("disconnect", target)
            target.log.clear()


def test_a_connection_that_says_nothing_stops_no_guest_and_keeps_nobody_out() -> None:
    target = ToyTarget()
    with SocketServer(target) as server:
        silent = [connect(server) for _ in range(10)]
        silent[0].close()
        silent[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
        with RemoteClient(server.address) as client:
            assert target.log == []
            assert client.ask(b"qC") == b"QC1"
        for connection in silent:
            connection.close()


def test_a_connection_that_sends_rubbish_without_end_is_closed() -> None:
    with SocketServer(ToyTarget()) as server, connect(server) as connection:
        with pytest.raises(OSError):  # noqa: PT011  reset or broken pipe
            connection.sendall(b"rubbish " * 1_000_000)
        with RemoteClient(server.address) as client:
            assert client.ask(b"qC") == b"QC1"


@pytest.mark.parametrize("last", [b"", b"$vCont;c", encode(b"vCont;c"), encode(b"vCont;s:1"), encode(b"g") + b"$g#6"])
def test_a_disconnect_at_any_moment_detaches(last: bytes) -> None:
    target = ToyTarget()
    with SocketServer(target) as server:
        with RemoteClient(server.address) as client:
            client.ask(b"Z0,1001,1")
            client.socket.sendall(last)
        wait_for("disconnect", target)
        assert target.points == set()
        with RemoteClient(server.address) as client:
            assert client.ask(b"qC") == b"QC1"


def test_a_client_that_does_not_read_costs_little_and_can_be_closed() -> None:
    with SocketServer(ToyTarget()) as server, RemoteClient(server.address) as client:
        client.ask(b"qC")
        client.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.socket.sendall(encode(b"m0,8000") * 1_000_000)
        session = server._client
        assert session is not None
        assert len(session.link.output) < 1 << 20


def test_more_requests_at_once_than_answers_are_kept_are_all_answered() -> None:
    with SocketServer(ToyTarget()) as server, RemoteClient(server.address) as client:
        client.stop_acknowledging()
        client.socket.sendall(encode(b"m0,8000") * 20 + encode(b"qC"))
        assert [len(client.answer()) for _ in range(20)] == [0x8000] * 20
        assert client.answer() == b"QC1"


def test_close_tells_a_gdb_that_waits_and_ends_the_thread() -> None:
    target = ToyTarget()
    before = threading.active_count()
    server = SocketServer(target)
    with RemoteClient(server.address) as client:
        client.ask(b"qC")
        client.send(b"vCont;c")
        wait_for("resume [1, 2] step None", target)
        server.close()
        assert client.answer() == b"X09"
        assert client.is_closed()
    server.close()
    assert target.log[-1] == "disconnect"
    assert threading.active_count() == before


def test_close_ends_connections_of_a_guest_that_stands() -> None:
    with SocketServer(ToyTarget()) as server, RemoteClient(server.address) as client:
        client.ask(b"qC")
        assert server.connected
        server.close()
        assert client.is_closed()
        with pytest.raises(OSError):  # noqa: PT011
            connect(server)


def test_many_servers_leave_no_descriptor_behind() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(20):
        with SocketServer(ToyTarget()) as server, RemoteClient(server.address) as client:
            client.ask(b"qC")
    assert descriptors() == before
