"""Whatever bytes arrive at the gdb server, it answers or ignores them, and neither hangs nor grows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from gdb_remote import RemoteClient
from gdb_toy_target import ToyTarget
from kvmpy.debug.gdb.architecture import Architecture
from kvmpy.debug.gdb.packet import PACKET_SIZE, Mark, PacketReader, encode
from kvmpy.debug.gdb.session import Session
from kvmpy.debug.gdb.socket_server import SocketServer
from kvmpy.debug.gdb.target import Report, Signal, ThreadStopped

HEX = st.text("0123456789abcdefABCDEF", max_size=20).map(str.encode)
NUMBER = st.one_of(
    st.integers(0, 0x1_2000), st.sampled_from([0, 0xFFFF, (1 << 32) - 1, (1 << 63), (1 << 64) - 1, 1 << 64, 1 << 200])
).map(lambda number: b"%x" % number)  # fmt: skip
THREAD = st.sampled_from([b"-1", b"0", b"1", b"2", b"3", b"p1.1", b"ffffffffffffffff", b""])


def joined(*parts: bytes | st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    strategies = [st.just(part) if isinstance(part, bytes) else part for part in parts]
    return st.tuples(*strategies).map(b"".join)


ACTION = st.one_of(
    st.sampled_from([b"c", b"s", b"t", b"C05", b"S05", b"r1000,1010"]), joined(b"r", NUMBER, b",", NUMBER)
)
PACKET = st.one_of(
    st.sampled_from(
        [
            b"?",
            b"g",
            b"qC",
            b"D",
            b"k",
            b"vCont?",
            b"vCont;c",
            b"c",
            b"s",
            b"qfThreadInfo",
            b"qsThreadInfo",
            b"!",
            b"QStartNoAckMode",
            b"qSupported",
            b"qAttached",
            b"qSymbol::",
            b"vMustReplyEmpty",
            b"vKill;1",
        ]
    ),
    joined(st.sampled_from([b"Hg", b"Hc", b"T", b"qThreadExtraInfo,"]), THREAD),
    joined(b"m", NUMBER, b",", NUMBER),
    joined(b"M", NUMBER, b",", NUMBER, b":", HEX),
    joined(b"X", NUMBER, b",", NUMBER, b":", st.binary(max_size=40)),
    joined(b"G", HEX),
    joined(b"p", NUMBER),
    joined(b"P", NUMBER, b"=", HEX),
    joined(st.sampled_from([b"Z", b"z"]), NUMBER, b",", NUMBER, b",", NUMBER),
    joined(b"vCont;", st.lists(joined(ACTION, b":", THREAD), max_size=3).map(b";".join)),
    joined(st.sampled_from([b"c", b"C", b"s", b"S"]), NUMBER),
    joined(b"qXfer:", st.sampled_from([b"features:read:target.xml", b"threads:read:"]), b":", NUMBER, b",", NUMBER),
    joined(b"qRcmd,", HEX),
    st.binary(max_size=60),
)
"""Packets as gdb sends them, and nearly so."""


def mutated(packet: bytes, change: tuple[int, int]) -> bytes:
    """The bytes of a packet with one of them changed."""
    stream = bytearray(encode(packet))
    at, value = change
    stream[at % len(stream)] = value
    return bytes(stream)


STREAM = st.lists(
    st.one_of(
        PACKET.map(encode),
        st.builds(mutated, PACKET, st.tuples(st.integers(0, 200), st.integers(0, 255))),
        st.sampled_from([b"\x03", b"+", b"-", b"$", b"#", b"$#", b"}", b"$m0,ffff", b"$" + b"m" * (PACKET_SIZE + 9)]),
        st.binary(max_size=20),
    ),
    max_size=12,
).map(b"".join)


class PromptTarget(ToyTarget):
    """Runs at once, and not for long: what would be reported later stands in `reports`."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: deque[Report] = deque()

    def resume(self, running: Sequence[int], stepping: int | None) -> None:
        thread = running[0] if stepping is None else stepping
        for _ in range(1 if stepping is not None else 5):
            ended = self._execute(self.registers[thread])
            if ended is not None:
                self.reports.append(ended if not isinstance(ended, Signal) else ThreadStopped(thread, ended))
                return
        if stepping is not None:
            self.reports.append(ThreadStopped(thread))

    def interrupt(self) -> None:
        self.reports.append(ThreadStopped(1, Signal.INT))


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_any_bytes_become_packets_or_nothing(pieces: list[bytes]) -> None:
    reader = PacketReader()
    for piece in pieces:
        reader.feed(piece)
        while (item := reader.next()) is not None:
            assert isinstance(item, (bytes, Mark))
        assert len(reader) <= PACKET_SIZE + len(piece)


@given(st.lists(st.binary(max_size=200), max_size=6), st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_packets_come_out_as_they_went_in_however_they_are_cut(payloads: list[bytes], cuts: list[int]) -> None:
    stream, reader, out = b"".join(map(encode, payloads)), PacketReader(), []
    turn = 0
    while stream:
        cut = cuts[turn % len(cuts)]
        turn += 1
        reader.feed(stream[:cut])
        stream = stream[cut:]
        while (item := reader.next()) is not None:
            out.append(item)
    assert out == payloads


@given(STREAM, st.integers(1, 400), st.sampled_from(list(Architecture)))
def test_a_session_survives_any_stream(stream: bytes, cut: int, architecture: Architecture) -> None:
    target = PromptTarget()
    session = Session(target, target.reports.append, architecture)
    for start in range(0, len(stream), cut):
        session.link.feed(stream[start : start + cut])
        while not session.work() and not session.over:
            assert session.link.output
            session.link.output.clear()
        for _ in range(len(target.reports)):
            if not session.over:
                session.report(target.reports.popleft())
        if session.over:
            break
    session.close()
    assert target.log.count("connect") == target.log.count("disconnect") + target.log.count("kill")


@given(STREAM)
def test_a_server_serves_the_next_gdb_after_any_stream_and_disconnect(stream: bytes) -> None:
    with SocketServer(ToyTarget()) as server:
        with RemoteClient(server.address) as client:
            client.send(b"qC")
            client.socket.sendall(stream)
        with RemoteClient(server.address) as client:
            answer = client.ask(b"qC")
            while answer.startswith(b"E.another"):  # the first one has not been seen to be gone yet
                client.close()
                client = RemoteClient(server.address)
                answer = client.ask(b"qC")
            client.close()
        assert answer == b"QC1"
