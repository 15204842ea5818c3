"""What each packet does, asked over a real socket of a toy machine."""

from __future__ import annotations

import time
import xml.etree.ElementTree as Xml
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gdb_remote import RemoteClient
from gdb_toy_target import CODE, ToyTarget
from kvmpy.debug.gdb.architecture import Architecture
from kvmpy.debug.gdb.packet import PACKET_SIZE, Mark
from kvmpy.debug.gdb.socket_server import SocketServer
from kvmpy.debug.gdb.target import Point, RunEnded, Signal
from kvmpy.debug.gdb.target_description import describe

WIDE = describe(Architecture.X86_64)
NAMES = [register.name for register in WIDE.registers]


@contextmanager
def session(target: ToyTarget, architecture: Architecture | None = None) -> Iterator[RemoteClient]:
    with SocketServer(target, architecture=architecture) as server, RemoteClient(server.address) as client:
        yield client


@pytest.fixture
def target() -> ToyTarget:
    return ToyTarget()


@pytest.fixture
def client(target: ToyTarget) -> Iterator[RemoteClient]:
    with session(target) as client:
        yield client


def number(name: str) -> bytes:
    return b"%x" % NAMES.index(name)


# Queries


def test_features_are_announced(client: RemoteClient) -> None:
    features = client.ask(b"qSupported:multiprocess+;swbreak+;xmlRegisters=i386").split(b";")
    assert {b"QStartNoAckMode+", b"qXfer:features:read+", b"qXfer:threads:read+", b"vContSupported+"} < {*features}
    assert b"PacketSize=%x" % PACKET_SIZE in features


@pytest.mark.parametrize(
    ("packet", "answer"),
    [
        (b"?", b"T05"),
        (b"qAttached", b"1"),
        (b"qC", b"QC1"),
        (b"qSymbol::", b"OK"),
        (b"QPassSignals:e;10", b"OK"),
        (b"vMustReplyEmpty", b""),
        (b"vCont?", b"vCont;c;C;s;S;r"),
        (b"qTStatus", b""),
        (b"qXfer:auxv:read::0,100", b""),
        (b"qXfer:features:read:64bit-core.xml:0,100", b"E00"),
        (b"qXfer:features:write:target.xml:0,100", b""),
        (b"!", b""),
        (b"R00", b""),
        (b"", b""),
        (b"Hg0", b"OK"),
        (b"Hc-1", b"OK"),
        (b"T2", b"OK"),
    ],
)
def test_queries_have_their_answers(client: RemoteClient, packet: bytes, answer: bytes) -> None:
    assert client.ask(packet)[: len(answer) or None] == answer


@pytest.mark.parametrize(
    "packet",
    [
        b"Hg3", b"Hx1", b"Hg", b"T9", b"m", b"m1000", b"mxyz,4", b"m10000000000000000,4", b"mffffffffffffffff,2",
        b"M1000,2:90", b"M1000,1:9", b"M1000,1:zz", b"X1000,2:a", b"G0", b"Gzz", b"p", b"pffff", b"P0", b"P0=00",
        b"Pzz=00", b"Z0,1000", b"Z0", b"z1,,1", b"vCont;x", b"vCont;s:9", b"vCont;", b"vCont;r10", b"vCont;Czz:1",
        b"qXfer:features:read:target.xml:0", b"qThreadExtraInfo,9", b"qRcmd,6", b"czz", b"S", b"s-1",
    ],
)  # fmt: skip
def test_malformed_packets_get_an_error_and_the_session_goes_on(client: RemoteClient, packet: bytes) -> None:
    assert client.ask(packet).startswith(b"E")
    assert client.ask(b"qC") == b"QC1"


def test_damaged_and_endless_packets_get_an_answer(client: RemoteClient) -> None:
    assert client.ask(b"qC") == b"QC1"
    client.socket.sendall(b"$g#00")
    assert client.item() is Mark.NAK
    client.socket.sendall(b"$" + b"m" * 100_000 + b"#00")
    assert client.answer() == b"E16"
    assert client.ask(b"qC") == b"QC1"


def read_document(client: RemoteClient, kind: bytes, piece: int) -> bytes:
    document = b""
    while True:
        answer = client.ask(b"qXfer:%s,%x" % (kind + b":%x" % len(document), piece))
        document += answer[1:]
        if answer[:1] == b"l":
            return document


@pytest.mark.parametrize("piece", [100, 0xFFFFFF])
def test_documents_are_read_in_pieces(client: RemoteClient, piece: int) -> None:
    assert read_document(client, b"features:read:target.xml", piece) == WIDE.xml
    threads = Xml.fromstring(read_document(client, b"threads:read:", piece))
    assert [(thread.attrib["id"], thread.attrib["name"], thread.text) for thread in threads] == [
        ("1", "toy 1", "standing"),
        ("2", "toy 2", "standing"),
    ]


def test_threads_are_listed(client: RemoteClient) -> None:
    assert client.ask(b"qfThreadInfo") == b"m1,2"
    assert client.ask(b"qsThreadInfo") == b"l"
    assert bytes.fromhex(client.ask(b"qThreadExtraInfo,2").decode()) == b"toy 2 [standing]"


def test_a_thousand_threads_are_listed_in_parts() -> None:
    with session(ToyTarget(threads=5000)) as client:
        listed = client.ask(b"qfThreadInfo")
        while (more := client.ask(b"qsThreadInfo")) != b"l":
            listed += b"," + more[1:]
    assert [int(thread, 16) for thread in listed[1:].split(b",")] == list(range(1, 5001))


def test_the_description_is_that_of_the_mode_when_it_is_read(target: ToyTarget, client: RemoteClient) -> None:
    assert read_document(client, b"features:read:target.xml", 0x1000) == WIDE.xml
    target.mode = Architecture.I8086
    assert len(client.ask(b"g")) == 2 * sum(WIDE.sizes), "gdb has not read the new one"
    narrow = describe(Architecture.I8086)
    assert read_document(client, b"features:read:target.xml", 0x1000) == narrow.xml
    assert len(client.ask(b"g")) == 2 * sum(narrow.sizes)


def test_the_description_can_be_fixed(target: ToyTarget) -> None:
    with session(target, Architecture.I386) as client:
        assert read_document(client, b"features:read:target.xml", 0x1000) == describe(Architecture.I386).xml


def test_monitor_output_of_any_length_arrives(client: RemoteClient) -> None:
    client.send(b"qRcmd," + b"long".hex().encode())
    text = b""
    while (packet := client.packet()) != b"OK":
        assert packet[:1] == b"O"
        assert len(packet) <= PACKET_SIZE
        text += bytes.fromhex(packet[1:].decode())
    assert text == b"x" * 100_000 + b"\n"


# Registers and memory


def test_registers_are_read_in_the_order_of_the_description(target: ToyTarget, client: RemoteClient) -> None:
    target.registers[1].update(rax=0x1122334455667788, xmm1=1 << 100)
    values = client.ask(b"g")
    assert values.startswith(b"8877665544332211")
    assert client.ask(b"p0") == b"8877665544332211"
    assert client.ask(b"p" + number("xmm1")) == (1 << 100).to_bytes(16, "little").hex().encode()
    assert client.ask(b"p" + number("k_gs_base")) == b"xx" * 8, "not available"


def test_registers_of_the_selected_thread_are_meant(target: ToyTarget, client: RemoteClient) -> None:
    target.registers[2]["rbx"] = 5
    assert client.ask(b"Hg2") == b"OK"
    assert client.ask(b"p1") == b"0500000000000000"
    assert client.ask(b"P1=0700000000000000") == b"OK"
    assert (target.registers[1].get("rbx"), target.registers[2]["rbx"]) == (None, 7)


def test_all_registers_are_written_and_only_those_that_changed(target: ToyTarget, client: RemoteClient) -> None:
    values = bytearray(bytes.fromhex(client.ask(b"g").replace(b"x", b"0").decode()))
    values[0:8] = (0x1234).to_bytes(8, "little")
    assert client.ask(b"G" + values.hex().encode()) == b"OK", "cr0, which cannot be set, is as it was"
    assert target.registers[1]["rax"] == 0x1234
    assert "k_gs_base" not in target.registers[1]
    at = sum(WIDE.sizes[: NAMES.index("cr0")])
    values[at] = 1
    assert client.ask(b"G" + values.hex().encode()) == b"E.cr0 is carved in stone"


def test_memory_is_read_and_written(target: ToyTarget, client: RemoteClient) -> None:
    assert client.ask(b"m1000,3") == b"90ebfd"
    assert client.ask(b"M2000,2:cafe") == b"OK"
    assert client.ask(b"X2002,4:#$}*") == b"OK"
    assert target.memory[0x2000:0x2006] == b"\xca\xfe#$}*"
    assert client.ask(b"X2000,0:") == b"OK", "gdb's probe"


def test_as_much_memory_is_read_as_there_is_and_fits(client: RemoteClient) -> None:
    assert client.ask(b"mfffe,10") == b"0000"
    assert len(client.ask(b"m0,ffffffff")) == PACKET_SIZE
    assert client.ask(b"m10000,1") == b"E0e"
    assert client.ask(b"M10000,1:00").startswith(b"E.")
    assert client.ask(b"m0,0") == b""


# Running


def stop(client: RemoteClient, packet: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """The head of a stop reply, and what it tells."""
    answer = client.ask(packet)
    return answer[:3], dict(part.split(b":") for part in answer[3:].split(b";") if part)


def test_a_step_moves_one_thread_by_one_instruction(target: ToyTarget, client: RemoteClient) -> None:
    assert stop(client, b"vCont;s:2;c") == (
        b"T05",
        {b"thread": b"2", b"10": (CODE + 1).to_bytes(8, "little").hex().encode(), b"7": b"0080000000000000"}
        | {b"6": b"0000000000000000"},
    )
    assert target.log[-1] == "resume [1] step 2"
    assert client.ask(b"qC") == b"QC2"
    assert stop(client, b"s")[0] == b"T05"
    assert target.registers[2]["pc"] == CODE
    assert stop(client, b"S05")[0] == b"T05"
    assert target.log[-1] == "resume [1] step 2"


def test_a_thread_can_go_on_alone(target: ToyTarget, client: RemoteClient) -> None:
    target.points.add((Point.SOFTWARE, CODE + 1))
    for packet in (b"vCont;c:2", b"Hc2"):
        answer = client.ask(packet)
        if answer == b"OK":
            stop(client, b"c")
        assert target.log[-1] == "resume [2] step None"
        target.registers[2]["pc"] = CODE


def test_steps_within_a_range_are_one_stop(target: ToyTarget) -> None:
    target = ToyTarget(b"\x90" * 20 + b"\xf4")
    with session(target) as client:
        assert stop(client, b"vCont;r1000,100a:1;c")[0] == b"T05"
        assert target.registers[1]["pc"] == 0x100A
        assert len([line for line in target.log if line.startswith("resume")]) == 10
        target.registers[1]["pc"] = CODE
        client.ask(b"Z0,1005,1")
        stop(client, b"vCont;r1000,100a:1")
        assert target.registers[1]["pc"] == 0x1005


def test_a_range_that_never_ends_is_interrupted(target: ToyTarget, client: RemoteClient) -> None:
    client.send(b"vCont;r1000,1010:1;c")
    time.sleep(0.05)
    client.interrupt()
    assert client.answer().startswith(b"T02")


def test_a_breakpoint_stops_and_says_which_kind_it_was(client: RemoteClient) -> None:
    assert client.ask(b"Z0,1001,1") == b"OK"
    head, told = stop(client, b"vCont;c")
    assert (head, told[b"swbreak"]) == (b"T05", b"")
    assert client.ask(b"z0,1001,1") == b"OK"
    assert client.ask(b"Z1,1000,1") == b"OK"
    head, told = stop(client, b"c")
    assert (head, told[b"hwbreak"]) == (b"T05", b"")
    assert client.ask(b"Z3,1000,1") == b"E.no read watchpoints"
    assert client.ask(b"Z5,1000,1") == client.ask(b"z5,1000,1") == b""


def test_ctrl_c_stops_a_running_guest(client: RemoteClient) -> None:
    client.send(b"vCont;c")
    time.sleep(0.02)
    client.interrupt()
    assert client.answer().startswith(b"T02")
    assert client.ask(b"qC") == b"QC1"


def test_ctrl_c_means_nothing_to_a_guest_that_stands(client: RemoteClient) -> None:
    client.interrupt()
    assert client.ask(b"qC") == b"QC1"


def test_packets_while_the_guest_runs_are_refused_and_harmless(client: RemoteClient) -> None:
    client.send(b"vCont;c")
    assert client.ask(b"g").startswith(b"E.")
    assert client.ask(b"vCont;c").startswith(b"E.")
    client.interrupt()
    assert client.answer().startswith(b"T02")


def test_continuing_elsewhere_sets_pc(target: ToyTarget, client: RemoteClient) -> None:
    target.memory[0x2000] = 0xF4
    assert client.ask(b"c2000") == b"W00"


def test_an_unknown_instruction_is_a_signal(target: ToyTarget, client: RemoteClient) -> None:
    target.memory[CODE] = 0x0F
    assert stop(client, b"c")[0] == b"T04"


@pytest.mark.parametrize(
    ("ended", "answer"),
    [(RunEnded(0), b"W00"), (RunEnded(7), b"W07"), (RunEnded(signal=Signal.KILL), b"X09")],
)
def test_the_end_of_the_run_is_told_and_final(target: ToyTarget, ended: RunEnded, answer: bytes) -> None:
    target = ToyTarget(b"\xf4")
    target.outcome = ended
    with session(target) as client:
        assert client.ask(b"c") == answer
        assert client.ask(b"?") == answer
        assert client.ask(b"g").startswith(b"E")
        assert client.ask(b"vCont;c") == answer, "it is not resumed again"
        assert client.ask(b"D") == b"OK"


def test_a_message_about_the_end_is_on_the_console(target: ToyTarget) -> None:
    target = ToyTarget(b"\xf4")
    target.outcome = RunEnded(0, message="halted")
    with session(target) as client:
        client.send(b"c")
        assert client.packet() == b"O" + b"kvmpy: halted\n".hex().encode()
        assert client.packet() == b"W00"


# Leaving


def test_detaching_lets_the_guest_go_on(target: ToyTarget) -> None:
    with session(target) as client:
        client.ask(b"Z0,1001,1")
        assert client.ask(b"D") == b"OK"
        assert client.is_closed()
    assert target.log == ["connect", "disconnect"]
    assert target.points == set()


@pytest.mark.parametrize("packet", [b"k", b"vKill;1"])
def test_killing_ends_the_run(target: ToyTarget, packet: bytes) -> None:
    with session(target) as client:
        client.send(b"vCont;c")
        client.send(packet)
        assert client.is_closed()
    assert target.log[-1] == "kill"


def test_nothing_is_acknowledged_when_gdb_wants_it_so(client: RemoteClient) -> None:
    client.stop_acknowledging()
    client.send(b"qC")
    assert client.item() == b"QC1"


def test_an_answer_that_gdb_did_not_get_comes_again(client: RemoteClient) -> None:
    assert client.ask(b"qC") == b"QC1"
    client.socket.sendall(b"-")
    assert client.answer() == b"QC1"
