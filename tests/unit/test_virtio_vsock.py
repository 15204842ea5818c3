"""The vsock device: connections both ways, credit, ends of streams, packets that are wrong."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kvmpy.errors import ClosedError, UsageError
from kvmpy.virtio.vsock.connection import BUFFER
from kvmpy.virtio.vsock.device import Vsock
from kvmpy.virtio.vsock.format import HEADER, SHUT_BOTH, VsockOperation, VsockShutdown
from virtio_driver import FakeDriver
from vsock_guest import CID, ROOM, Packet, VsockGuest

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = (
    operation for operation in VsockOperation if operation
)
FIRST_PORT = 1 << 30


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "v.sock")


@pytest.fixture
def guest(path: str) -> Iterator[VsockGuest]:
    device = Vsock(CID, path)
    guest = VsockGuest(device)
    yield guest
    guest.driver.mmio.close()


def dial(path: str, line: bytes = b"CONNECT 1234\n") -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(path)
    sock.sendall(line)
    return sock


def accepted(guest: VsockGuest, host_port: int = 50, guest_port: int = 1000, *, again: bool = True) -> socket.socket:
    """A connection of the guest to a listener: the host's end."""
    with guest.device.listen(host_port) as listener:
        assert guest.connect(host_port, guest_port, again=again) == "RESPONSE"
        sock, address = listener.accept(5)
    assert address == (CID, guest_port)
    sock.settimeout(5)
    return sock


def read_all(guest: VsockGuest) -> bytes:
    return b"".join(packet.data for packet in guest.packets() if packet.operation == RW)


# --- what the driver finds --------------------------------------------------------------------------------------------


def test_the_configuration_space_has_the_cid() -> None:
    device = Vsock(0x1234_5678)
    driver = FakeDriver(device)
    assert driver.read(8) == 19
    assert (driver.config(0, 4), driver.config(4, 4)) == (0x1234_5678, 0)
    driver.mmio.close()


@pytest.mark.parametrize("cid", [0, 1, 2, 0xFFFF_FFFF, 1 << 32, -1])
def test_a_cid_that_no_guest_can_have_is_the_callers_fault(cid: int) -> None:
    with pytest.raises(UsageError):
        Vsock(cid)


# --- connections of the host ------------------------------------------------------------------------------------------


def test_who_says_connect_reaches_the_guest(guest: VsockGuest, path: str) -> None:
    with dial(path, b"CONNECT 1234\nearly") as sock:
        (request,) = guest.packets()
        assert request[:9] == (2, CID, FIRST_PORT, 1234, 0, 1, REQUEST, 0, BUFFER)
        guest.send(RESPONSE, 1234, FIRST_PORT)
        assert sock.recv(100) == b"OK 1073741824\n"
        assert read_all(guest) == b"early"
        guest.send(RW, 1234, FIRST_PORT, b"hello, host")
        assert sock.recv(100) == b"hello, host"
        sock.sendall(b"hello, guest")
        assert read_all(guest) == b"hello, guest"


def test_a_greeting_may_come_in_pieces(guest: VsockGuest, path: str) -> None:
    with dial(path, b"CON") as sock:
        for piece in (b"NECT 1", b"2\r\n"):
            assert guest.names() == []
            sock.sendall(piece)
        assert [packet.target_port for packet in guest.packets()] == [12]


@pytest.mark.parametrize(
    "line", [b"\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"GET / HTTP\n", b"x" * 64, b"CONNECT -1\n"]
)
def test_who_says_something_else_is_turned_away(guest: VsockGuest, path: str, line: bytes) -> None:
    with dial(path, line) as sock:
        assert guest.names() == []
        try:
            assert sock.recv(10) == b""
        except ConnectionResetError:  # not all of the line was read
            assert len(line) > 32


def test_a_port_where_no_program_listens_refuses(guest: VsockGuest, path: str) -> None:
    with dial(path) as sock:
        assert guest.names() == ["REQUEST"]
        guest.send(RST, 1234, FIRST_PORT)
        assert sock.recv(10) == b""
    assert guest.device.connections == 0


def test_who_gives_up_before_the_answer_is_forgotten(guest: VsockGuest, path: str) -> None:
    sock = dial(path)
    assert guest.names() == ["REQUEST"]
    sock.close()
    assert guest.names() == ["RST"]
    guest.send(RESPONSE, 1234, FIRST_PORT)
    assert guest.names() == ["RST"]


def test_without_a_driver_nobody_is_connected(path: str) -> None:
    device = Vsock(CID, path)
    driver = FakeDriver(device)
    with dial(path) as sock:
        for _ in range(3):
            assert driver.board.inputs[0].ready()
        assert sock.recv(10) == b""
    with pytest.raises(ConnectionRefusedError, match="no driver runs"):
        device.connect(1)
    driver.mmio.close()


def test_programs_in_python_connect(guest: VsockGuest) -> None:
    found: list[socket.socket | Exception] = []

    def connect(port: int) -> None:
        try:
            found.append(guest.device.connect(port))
        except OSError as error:
            found.append(error)

    for port, answer in ((70, RESPONSE), (71, RST)):
        thread = threading.Thread(target=connect, args=(port,))
        thread.start()
        while not (packets := guest.packets()):
            pass
        guest.send(answer, port, packets[0].source_port)
        thread.join()
    sock, error = found
    assert isinstance(sock, socket.socket)
    assert isinstance(error, ConnectionRefusedError)
    with sock:
        sock.sendall(b"x")
        assert read_all(guest) == b"x"


def test_a_guest_that_does_not_answer_is_not_waited_for_longer(guest: VsockGuest) -> None:
    with pytest.raises(TimeoutError):
        guest.device.connect(70, timeout=0.01)
    assert guest.names() == ["REQUEST", "RST"]
    assert guest.device.connections == 0


# --- connections of the guest -----------------------------------------------------------------------------------------


def test_the_guest_reaches_who_listens_beside_the_socket(guest: VsockGuest, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}_52")
        listener.listen()
        assert guest.connect(52) == "RESPONSE"
        sock, _ = listener.accept()
        with sock:
            guest.send(RW, 1000, 52, b"from the guest")
            assert sock.recv(100) == b"from the guest"
            sock.sendall(b"from the host")
            assert read_all(guest) == b"from the host"
        listener.listen(0)
        assert guest.connect(52, 1) == "RESPONSE"
        assert guest.connect(52, 2) == "RST", "it can take no more now"


def test_the_guest_is_refused_where_nobody_listens(guest: VsockGuest) -> None:
    assert guest.connect(52) == "RST"
    listener = guest.device.listen(60, backlog=1)
    assert guest.connect(60, 1) == "RESPONSE"
    assert guest.connect(60, 2) == "RST"
    with pytest.raises(UsageError):
        guest.device.listen(60)
    listener.close()
    assert guest.connect(60, 3) == "RST"
    with pytest.raises(ClosedError):
        listener.accept(1)
    with guest.device.listen(60) as again, pytest.raises(TimeoutError):
        again.accept(0.01)


# --- data and credit --------------------------------------------------------------------------------------------------


def test_a_message_may_be_cut_anyhow(guest: VsockGuest) -> None:
    with accepted(guest) as sock:
        header = HEADER.pack(CID, 2, 1000, 50, 6, 1, RW, 0, ROOM, 0)
        guest.raw(header[:10], header[10:] + b"ab", b"cd", b"efgh")
        assert sock.recv(100) == b"abcdef"


def test_buffers_may_be_cut_anyhow() -> None:
    guest = VsockGuest(Vsock(CID), buffers=1)
    with accepted(guest, again=False) as sock:
        for sizes in ((10, 34, 3, 4), (44, 5), (50,)):
            guest.receive.add((), sizes)
        sock.sendall(b"abcdefghijklmnopqrstuvwxyz")
        guest.receive.kick()
        data = [packet.data for packet in guest.packets(again=False)]
        assert data == [b"abcdefg", b"hijkl", b"mnopqr"]
    guest.driver.mmio.close()


def test_buffers_without_room_are_given_back() -> None:
    guest = VsockGuest(Vsock(CID), buffers=1)
    with accepted(guest, again=False) as sock:
        sock.sendall(b"data")
        for size in (44, 20, 1):
            guest.offer(1, size)
        guest.poll()
        assert guest.device.counters["no_room"] == 3
        assert [length for _, length, _ in guest.receive.used()] == [0, 0, 0]
        guest.offer(1)
        assert read_all(guest) == b"data"
    guest.driver.mmio.close()


def test_no_more_goes_to_the_guest_than_it_has_room_for(guest: VsockGuest) -> None:
    with accepted(guest) as sock:
        data = os.urandom(ROOM + 5000)
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        packets: list[Packet] = []
        while sum(packet.length for packet in packets) < ROOM:
            packets += guest.packets()
        sender.join()
        packets += guest.packets()
        assert b"".join(packet.data for packet in packets) == data[:ROOM]
        assert [packet.name for packet in packets if packet.operation != RW] == ["CREDIT_REQUEST"]
        guest.send(CREDIT_UPDATE, 1000, 50, forwarded=1000)
        assert read_all(guest) == data[ROOM : ROOM + 1000]
        guest.send(CREDIT_UPDATE, 1000, 50, forwarded=ROOM)
        assert read_all(guest) == data[ROOM + 1000 :]


@pytest.mark.parametrize(("buffer", "forwarded"), [(0, 0), (100, 200), (ROOM, 0xFFFF_0000), (0, 0xFFFF_FFFF)])
def test_credit_that_makes_no_sense_is_no_credit(guest: VsockGuest, buffer: int, forwarded: int) -> None:
    with accepted(guest) as sock:
        guest.send(CREDIT_UPDATE, 1000, 50, buffer=buffer, forwarded=forwarded)
        sock.sendall(b"data")
        assert [name for name in guest.names() if name != "CREDIT_REQUEST"] == []
        guest.send(CREDIT_UPDATE, 1000, 50)
        assert read_all(guest) == b"data"


def test_counters_of_bytes_wrap(guest: VsockGuest) -> None:
    with accepted(guest) as sock:
        connection = guest.device._streams.get((50, 1000))
        assert connection is not None
        connection.sent(0xFFFF_FFF0)
        guest.send(CREDIT_UPDATE, 1000, 50, forwarded=0xFFFF_FFF0)
        sock.sendall(b"x" * 100)
        assert read_all(guest) == b"x" * 100
        guest.send(CREDIT_UPDATE, 1000, 50, buffer=100, forwarded=0x10)
        assert connection.credit == 100 - 0x44


def test_what_nobody_reads_waits_and_the_guest_is_told_when_it_has_gone_on(guest: VsockGuest) -> None:
    with accepted(guest) as sock:
        sent = b""
        connection = guest.device._streams.get((50, 1000))
        assert connection is not None
        while connection.unsent < BUFFER - 0x1000:
            piece = os.urandom(0x1000)
            guest.send(RW, 1000, 50, piece)
            sent += piece
        guest.packets()
        got = b""
        told = []
        while len(got) < len(sent):
            got += sock.recv(0x1_0000)
            told += guest.packets()
        assert got == sent
        assert {packet.name for packet in told} == {"CREDIT_UPDATE"}
        assert told[-1].forwarded >= len(sent) - BUFFER // 4
        guest.send(CREDIT_REQUEST, 1000, 50)
        (answer,) = guest.packets()
        assert (answer.name, answer.forwarded, answer.buffer) == ("CREDIT_UPDATE", len(sent), BUFFER)


def test_a_guest_that_sends_more_than_it_may_is_cut_off(guest: VsockGuest) -> None:
    with accepted(guest) as sock:
        for _ in range(200):
            guest.send(RW, 1000, 50, bytes(0x2000))
            if guest.device.counters["credit_exceeded"]:
                break
        assert "RST" in guest.names()
        assert guest.device.connections == 0
        assert sock.recv(10) == bytes(10), "what came before is not lost"


def test_data_waits_for_buffers_of_the_guest(path: str) -> None:
    guest = VsockGuest(Vsock(CID, path), buffers=1)
    with accepted(guest) as sock:
        guest.packets(again=False)
        sock.sendall(b"first")
        guest.poll()
        guest.poll()
        sock.sendall(b", second")
        assert [packet.data for packet in guest.packets()] in ([b"first", b", second"], [b"first, second"])
        guest.receive.used()
    guest.driver.mmio.close()


def test_several_streams_take_turns(guest: VsockGuest) -> None:
    socks = [accepted(guest, 50 + number) for number in range(3)]
    for number, sock in enumerate(socks):
        sock.sendall(bytes([number]) * 0xC000)
    packets = guest.packets()
    for number in range(3):
        assert sum(packet.length for packet in packets if packet.source_port == 50 + number) == 0xC000
    assert {packet.source_port for packet in packets[:16]} != {50}
    for sock in socks:
        sock.close()


# --- ends -------------------------------------------------------------------------------------------------------------


def test_the_host_closes(guest: VsockGuest) -> None:
    sock = accepted(guest)
    sock.sendall(b"last words")
    sock.close()
    packets = guest.packets()
    assert [(packet.name, packet.flags, packet.data) for packet in packets] == [
        ("RW", 0, b"last words"),
        ("SHUTDOWN", SHUT_BOTH, b""),
    ]
    assert guest.device.connections == 1, "until the guest has answered"
    guest.send(RST, 1000, 50)
    assert guest.device.connections == 0
    assert guest.names() == []


def test_the_host_says_that_it_sends_no_more(guest: VsockGuest) -> None:
    with accepted(guest) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert [(packet.name, packet.flags) for packet in guest.packets()] == [("SHUTDOWN", VsockShutdown.SEND)]
        guest.send(RW, 1000, 50, b"still heard")
        assert sock.recv(100) == b"still heard"
    assert [(packet.name, packet.flags) for packet in guest.packets()] == [("SHUTDOWN", SHUT_BOTH)]


def test_the_guest_closes_and_all_it_has_sent_arrives(guest: VsockGuest) -> None:
    with accepted(guest) as sock:
        guest.send(RW, 1000, 50, b"last words")
        guest.send(SHUTDOWN, 1000, 50, flags=SHUT_BOTH)
        assert guest.names() == ["RST"]
        assert (sock.recv(100), sock.recv(100)) == (b"last words", b"")
    assert guest.device.connections == 0


def test_what_waits_arrives_before_the_end(guest: VsockGuest) -> None:
    with accepted(guest) as sock:
        connection = guest.device._streams.get((50, 1000))
        assert connection is not None
        sent = b""
        while connection.unsent < 0x8000:
            guest.send(RW, 1000, 50, piece := os.urandom(0x1000))
            sent += piece
        guest.send(SHUTDOWN, 1000, 50, flags=SHUT_BOTH)
        assert "RST" not in guest.names()
        got = b""
        while piece := sock.recv(0x1_0000):
            got += piece
            guest.poll()
        assert got == sent
    assert guest.names()[-1] == "RST"


def test_the_guest_says_that_it_sends_no_more(guest: VsockGuest) -> None:
    with accepted(guest) as sock:
        guest.send(SHUTDOWN, 1000, 50, flags=VsockShutdown.SEND)
        assert sock.recv(10) == b""
        sock.sendall(b"still heard")
        assert read_all(guest) == b"still heard"
        guest.send(RW, 1000, 50, b"liar")
        assert guest.names() == ["RST"]


def test_the_guest_says_that_it_receives_no_more(guest: VsockGuest) -> None:
    with accepted(guest) as sock:
        guest.send(SHUTDOWN, 1000, 50, flags=VsockShutdown.RECEIVE)
        with pytest.raises(BrokenPipeError):
            sock.sendall(b"nobody hears")
        guest.send(RW, 1000, 50, b"still heard")
        assert sock.recv(100) == b"still heard"
        guest.send(SHUTDOWN, 1000, 50, flags=VsockShutdown.SEND)
        assert guest.names() == ["RST"]


def test_a_host_that_is_gone_while_the_guest_sends_ends_the_stream(guest: VsockGuest) -> None:
    sock = accepted(guest)
    connection = guest.device._streams.get((50, 1000))
    assert connection is not None
    while not connection.unsent:
        guest.send(RW, 1000, 50, bytes(0x2000))
    guest.packets()
    sock.close()
    names = guest.names()
    assert names[0] in ("SHUTDOWN", "RST")
    assert names[-1] in ("SHUTDOWN", "RST")
    guest.send(RW, 1000, 50, b"data")
    assert guest.names() in ([], ["RST"])
    assert guest.device.connections == 0


def test_a_reset_of_the_device_ends_all(guest: VsockGuest, path: str) -> None:
    with accepted(guest) as sock, dial(path) as waiting:
        guest.poll()
        guest.poll()
        guest.driver.write(0x70, 0)
        assert (sock.recv(10), waiting.recv(10)) == (b"", b"")
    assert guest.device.connections == 0


# --- packets that are wrong -------------------------------------------------------------------------------------------


def test_packets_of_no_connection_are_answered_by_rst(guest: VsockGuest) -> None:
    for operation in (RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 99):
        guest.send(operation, 5, 6)
        (answer,) = guest.packets()
        assert (answer.name, answer.source_port, answer.target_port) == ("RST", 6, 5)
    guest.send(RST, 5, 6)
    assert guest.names() == []


@pytest.mark.parametrize("operation", [REQUEST, RESPONSE, 0, 8, 0xFFFF])
def test_packets_that_a_connection_cannot_get_end_it(guest: VsockGuest, operation: int) -> None:
    with accepted(guest) as sock:
        guest.send(operation, 1000, 50)
        assert guest.names() == ["RST"]
        assert sock.recv(10) == b""


def test_packets_with_wrong_addresses_and_types_reach_nobody(guest: VsockGuest) -> None:
    with accepted(guest) as sock:
        for source, target in ((CID + 1, 2), (CID, 3), (2, 2), (CID | 1 << 32, 2)):
            guest.send(RW, 1000, 50, b"data", source=source, target=target)
        assert guest.device.counters["wrong_cid"] == 4
        for kind in (0, 2, 0xFFFF):
            guest.send(RW, 1000, 50, b"data", kind=kind)
            (answer,) = guest.packets()
            assert (answer.name, answer.kind) == ("RST", kind)
        guest.send(RW, 1000, 50, b"good")
        assert sock.recv(100) == b"good"


def test_a_length_that_is_not_there_ends_the_connection(guest: VsockGuest) -> None:
    with accepted(guest):
        guest.send(RW, 1000, 50, b"data", length=5)
        assert guest.names() == ["RST"]
    guest.raw(bytes(43))
    assert guest.device.counters == {"bad_packet": 1, "short_packet": 1}


def test_a_guest_that_takes_no_answers_is_not_asked_for_more(path: str) -> None:
    guest = VsockGuest(Vsock(CID, path), buffers=0)
    for _ in range(256 + 16):
        guest.send(RW, 5, 6)
    assert len(guest.device._replies) == 256
    answers = []
    for _ in range(100):
        guest.offer(8)
        answers += [packet.name for packet in guest.packets(again=False)]
        guest.transmit.used()
    assert answers == ["RST"] * (256 + 16), "as many as the queue of the guest has room for, beyond those that waited"
    guest.driver.mmio.close()


# --- the UNIX socket, state -------------------------------------------------------------------------------------------


def test_the_unix_socket_comes_and_goes_with_the_device(path: str) -> None:
    device = Vsock(CID, path)
    with pytest.raises(UsageError, match="there already"):
        Vsock(CID + 1, path)
    device.close()
    assert not os.path.exists(path)
    with pytest.raises(OSError, match="absent"):
        Vsock(CID, "/absent/v.sock")


def test_nothing_stays_open(path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    guest = VsockGuest(Vsock(CID, path))
    socks = [accepted(guest), dial(path), dial(path, b"CON")]
    guest.poll()
    listener = guest.device.listen(9)
    guest.connect(9)
    guest.driver.mmio.close()
    for sock in socks:
        sock.close()
    assert listener.port == 9
    assert len(os.listdir("/proc/self/fd")) == before


def test_after_a_restore_the_guest_is_told_that_its_connections_are_gone(guest: VsockGuest) -> None:
    with accepted(guest):
        guest.events.add((), [4])
        guest.events.kick()
        assert guest.events.used() == []
        state = guest.driver.mmio.state()
    other = FakeDriver(Vsock(3), memory=guest.driver.memory)
    other.mmio.restore(state)
    assert other.mmio.state() == state
    other.mmio.resume()
    for timer in other.board.timers:
        timer.call()
    assert [content for _, _, content in guest.events.used()] == [bytes(4)]
    device = other.device
    assert isinstance(device, Vsock)
    assert device.cid == CID
    guest.driver.mmio.close()
    other.queues = guest.driver.queues
    again = VsockGuest(device, buffers=0, driver=other)
    for queue in other.queues:
        queue.driver = other
    again.send(RW, 1000, 50, b"data")
    assert again.names() == ["RST"]
    other.mmio.close()


@contextmanager
def no_more_files() -> Iterator[None]:
    """Within this context the process has as many open files as it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.dup(0)
    os.close(probe)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_refuse_the_guest(guest: VsockGuest, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server, guest.device.listen(51):
        server.bind(f"{path}_50")
        server.listen()
        for port in (50, 51):
            with no_more_files():
                guest.send(REQUEST, 1000, port)
            assert guest.names() == ["RST"]
        for port in (50, 51):
            assert guest.connect(port) == "RESPONSE"


def test_too_many_open_files_turn_programs_away_and_keep_the_thread_asleep(guest: VsockGuest, path: str) -> None:
    sock = dial(path)
    with no_more_files():
        assert guest.driver.board.inputs[0].ready()
    with sock, suppress(ConnectionResetError):
        assert sock.recv(10) == b""
    with dial(path):
        assert guest.names() == ["REQUEST"]
