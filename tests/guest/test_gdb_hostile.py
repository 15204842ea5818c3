"""Hostile clients of the gdb server, while a real guest runs: the machine lives, and the next gdb is served."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz_settings import PROFILE
from gdb_remote import RemoteClient
from gnu_toolchain import assemble
from kvmpy import Machine
from kvmpy.boot import FlatImage
from kvmpy.debug.gdb.packet import encode
from kvmpy.debug.gdb.server import GdbServer

pytestmark = pytest.mark.kvm

SECONDS = 30.0
CODE, COUNTERS = 0x1000, 0x8000
EXAMPLES = {"dev": 40, "ci": 400}[PROFILE]

HARMLESS = [
    b"?", b"g", b"qC", b"vCont;c", b"vCont;s:1", b"vCont;s:2;c", b"vCont;r1000,2000:1;c", b"c", b"s", b"D", b"Hg2",
    b"Hc2", b"Hc0", b"m0,ffffffff", b"m1000,10", b"mffffffffffffffff,1", b"M8100,4:deadbeef", b"X8100,1:\x03",
    b"Z0,1000,1", b"Z0,1007,1", b"z0,1007,1", b"Z1,1007,1", b"Z2,8000,4", b"Z4,8000,4", b"Z2,ffffffffffff0000,8",
    b"Z2,8000,ffffffff", b"z2,8000,4", b"qXfer:threads:read::0,ffff", b"qRcmd,6578697473", b"qRcmd,77616c6b2030",
    b"QStartNoAckMode", b"T3", b"qSupported:", b"qfThreadInfo", b"P18=abcd", b"P10=ffff",
]  # fmt: skip
"""Packets that leave the guest what it was, and some that are refused."""

HARMFUL = [
    b"M1000,4:0f0b0f0b", b"X1000,3:\xcc\xcc\xcc", b"P0=ffffffffffffffff", b"P10=0000000000000000", b"P12=ffffffff",
    b"G" + b"ff" * 300, b"k", b"vKill;1", b"X40000,8:\0\0\0\0\0\0\0\0", b"M100,8:zz", b"P11=00030000",
]  # fmt: skip


def streams(packets: list[bytes]) -> st.SearchStrategy[bytes]:
    pieces = st.one_of(
        st.sampled_from(packets).map(encode),
        st.sampled_from([b"\x03", b"$m0", b"+-", b"$c#00"]),
        st.binary(max_size=30),
    )
    return st.lists(pieces, max_size=8).map(b"".join)


class Victim:
    """A machine with two vCPUs that count, and its gdb server."""

    def __init__(self) -> None:
        self.machine = Machine(memory=1 << 20, vcpus=2, irqchip=False)
        self.server = GdbServer(self.machine)
        code = assemble(f"_start: inc dword ptr [{COUNTERS:#x} + 4 * rbx]\ninc rax\njmp _start", address=CODE, bits=64)
        self.machine.load(FlatImage(code, CODE, "long", stack=0x7000))
        state = self.machine.vcpus[0].cpu_state()
        state.regs.rbx = 1
        self.machine.vcpus[1].set_cpu_state(state)
        self.machine.start()

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.machine.close()

    def counts(self) -> bool:
        """Whether both vCPUs run on."""
        before = self.machine.memory.read(COUNTERS, 8)
        end = time.monotonic() + SECONDS
        while any(now == then for now, then in zip(*self._halves(before), strict=True)):
            if time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    def _halves(self, before: bytes) -> tuple[list[bytes], list[bytes]]:
        now = self.machine.memory.read(COUNTERS, 8)
        return [now[:4], now[4:]], [before[:4], before[4:]]

    def attack(self, stream: bytes, patient: bool) -> None:
        """One session of a client that sends `stream` and goes, at once or after it has seen some answers."""
        with RemoteClient(self.server.address) as client:
            assert client.ask(b"qSupported").startswith(b"PacketSize")
            with suppress(ConnectionError):  # closed already, after D or k
                client.socket.sendall(stream)
            if patient:
                client.socket.settimeout(0.01)
                with suppress(TimeoutError):
                    client.is_closed()
        end = time.monotonic() + SECONDS
        while self.server.connected:
            assert time.monotonic() < end, "the session does not end"
            time.sleep(0.001)

    def serves(self) -> bool:
        """Whether a gdb that comes now can stop the guest and have it go on."""
        with RemoteClient(self.server.address) as client:
            head = client.ask(b"?")[:3]
            stepped = client.ask(b"vCont;s:1")[:3]
            return (head, stepped, client.ask(b"D")) == (b"T05", b"T05", b"OK")


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with Victim() as victim:
        yield victim


@settings(max_examples=EXAMPLES)
@given(stream=streams(HARMLESS), patient=st.booleans())
def test_the_guest_runs_on_after_any_stream_and_disconnect(victim: Victim, stream: bytes, patient: bool) -> None:
    code = victim.machine.memory.read(CODE, 16)
    victim.attack(stream, patient)
    assert victim.counts()
    assert victim.machine.memory.read(CODE, 16) == code
    assert victim.machine.debugger.points == []
    assert victim.serves()


@settings(max_examples=EXAMPLES)
@given(stream=streams(HARMLESS + HARMFUL * 2), patient=st.booleans())
def test_a_client_that_ruins_the_guest_ruins_nothing_else(stream: bytes, patient: bool) -> None:
    with Victim() as victim:
        victim.attack(stream, patient)
        with RemoteClient(victim.server.address) as client:
            assert client.ask(b"?")[:1] in (b"T", b"X")
            assert client.ask(b"D") == b"OK"


def serves_soon(victim: Victim) -> bool:
    """Whether it serves when the last session is over."""
    end = time.monotonic() + SECONDS
    while victim.server.connected:
        assert time.monotonic() < end
        time.sleep(0.001)
    return victim.serves()


def test_gdbs_that_come_at_once_are_served_or_refused_and_the_guest_runs_on(victim: Victim) -> None:
    served, refused, failures = [], [], []

    def debug(number: int) -> None:
        try:
            for _ in range(15):
                with RemoteClient(victim.server.address) as client:
                    answer = client.ask(b"qSupported")
                    if answer.startswith(b"E.another gdb"):
                        refused.append(number)
                        continue
                    served.append(number)
                    assert client.ask(b"Z0,1007,1") == b"OK"
                    assert client.ask(b"vCont;c").startswith(b"T05")
                    if number % 2:
                        assert client.ask(b"D") == b"OK"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=debug, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(served) + len(refused) == 60
    assert served
    assert victim.counts()
    assert serves_soon(victim)


def test_connections_that_come_and_go_do_not_stop_the_guest(victim: Victim) -> None:
    assert isinstance(victim.server.address, tuple)
    for _ in range(100):
        socket.create_connection(victim.server.address).close()
    assert victim.counts()
    assert serves_soon(victim)
