"""The network device, as a driver and the other end of the cable see it."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import ClosedError, UsageError
from kvmpy.virtio import (
    DatagramSocket,
    DeviceStatus,
    Feature,
    Passt,
    PcapFile,
    StreamSocket,
    Tap,
    VirtioNet,
    datagram_pair,
)  # fmt: skip
from kvmpy.virtio import mmio_registers as reg
from kvmpy.virtio.interrupt_status import CONFIG_CHANGE
from kvmpy.virtio.net.format import LONGEST_FRAME, NetFeature
from network_cable import HEADER, MAC, NO_OFFLOAD, arp_request, frame, framed, serve, unframed
from virtio_driver import FakeDriver, FakeQueue

ONE_BUFFER = bytes(10) + b"\1\0"


class Card(FakeDriver):
    """A driver of a network device whose other end of the cable is in the test's hand."""

    device: VirtioNet

    def __init__(self, device: VirtioNet, far: socket.socket | None = None, *, legacy: bool = False) -> None:
        super().__init__(device, legacy=legacy)
        self.far = far
        if far is not None:
            far.settimeout(5)

    def offer(self, *sizes: int) -> None:
        """Make buffers available for frames that arrive."""
        for size in sizes:
            self.queues[0].add(into=[size])
        self.queues[0].kick()
        serve(self)

    def taken(self) -> list[bytes]:
        """What has come into them, with headers."""
        serve(self)
        return [data for _, _, data in self.queues[0].used()]

    def frames(self) -> list[bytes]:
        return [data[HEADER:] for data in self.taken()]

    def put(self, *frames: bytes) -> None:
        """Send frames, with one notification."""
        for data in frames:
            self.queues[1].add([NO_OFFLOAD + data])
        self.queues[1].kick()
        serve(self)

    def arrived(self) -> list[bytes]:
        """The frames that came out at the other end of a stream until now."""
        assert self.far is not None
        stream = b""
        self.far.setblocking(False)
        while True:
            try:
                stream += self.far.recv(1 << 20)
            except BlockingIOError:
                serve(self)
                try:
                    stream += self.far.recv(1 << 20)
                except BlockingIOError:
                    self.far.settimeout(5)
                    return unframed(stream)

    @property
    def counters(self) -> Counter[str]:
        return +self.device.counters


@pytest.fixture
def cards() -> Iterator[Any]:
    """Makes cards at one end of a stream, and closes both ends after the test."""
    made: list[Card] = []

    def make(*, far: bool = True, legacy: bool = False, without: tuple[int, ...] = (), start: bool = True,
             **options: Any) -> Card:  # fmt: skip
        near, other = socket.socketpair()
        options.setdefault("mac", MAC)
        card = Card(VirtioNet(StreamSocket(near), **options), other, legacy=legacy)
        made.append(card)
        if start:
            card.start(without=without, size=64)
        return card

    yield make
    for card in made:
        card.mmio.close()
        assert card.far is not None
        card.far.close()


# --- what the driver is told ----------------------------------------------------------------------------------------


def test_address_status_and_mtu_are_in_the_configuration_space(cards: Any) -> None:
    card = cards(mtu=1400)
    assert bytes(card.config(at, 1) for at in range(6)) == MAC
    assert card.config(6, 2) == 1
    assert card.config(10, 2) == 1400
    assert card.device.mac == "52:54:00:12:34:56"
    assert card.device.has_feature(NetFeature.MTU)


def test_an_address_is_made_where_none_is_given() -> None:
    first, second = VirtioNet(), VirtioNet()
    assert first.mac != second.mac
    assert int(first.mac[:2], 16) & 3 == 2  # of local use, and of a single card
    assert not first.offered >> NetFeature.MTU & 1
    assert not first.link_up


@pytest.mark.parametrize("mac", ["", "52:54:00:12:34", "53:54:00:12:34:56", "00:00:00:00:00:00", "xx", b"\x52" * 7])
def test_an_address_that_is_none_is_refused(mac: str | bytes) -> None:
    with pytest.raises(UsageError, match="MAC"):
        VirtioNet(mac=mac)


def test_a_backend_is_closed_when_the_device_cannot_be_made(tmp_path: Path) -> None:
    for options in ({"mtu": 67}, {"mtu": 65536}, {"mac": "x"}, {"capture": tmp_path / "nowhere" / "file"}):
        near, far = datagram_pair()
        with pytest.raises((UsageError, FileNotFoundError)):
            VirtioNet(near, **options)
        with pytest.raises(ClosedError):
            near.fileno()
        far.close()


def test_a_backend_has_one_device() -> None:
    near, far = datagram_pair()
    device = VirtioNet(near)
    with pytest.raises(UsageError, match="already"):
        VirtioNet(near)
    assert near.connected
    device.close()
    with pytest.raises(UsageError, match="closed"):
        VirtioNet(near)
    far.close()


# --- sending --------------------------------------------------------------------------------------------------------


def test_frames_are_sent_without_their_header(cards: Any) -> None:
    card = cards()
    card.put(frame(1), frame(2, 1514))
    assert card.arrived() == [frame(1), frame(2, 1514)]
    assert card.queues[1].used() == [(0, 0, b""), (1, 0, b"")]
    assert card.device.sent == 2


@pytest.mark.parametrize("cut", [[12], [5], [12, 26], [1, 2, 3, 11, 13, 30]])
def test_it_does_not_matter_how_the_driver_cuts_its_buffers(cards: Any, cut: list[int]) -> None:
    card = cards()
    whole, edges = NO_OFFLOAD + frame(7), [0, *cut, HEADER + 60]
    card.request([whole[start:end] for start, end in pairwise(edges)], queue=1)
    assert card.arrived() == [frame(7)]


def test_a_frame_in_more_parts_than_the_kernel_takes_at_once_is_sent() -> None:
    parts = [memoryview(bytes([number & 0xFF])) for number in range(1030)]
    near, far = socket.socketpair()
    stream = StreamSocket(near)
    assert stream.send(parts)
    assert far.recv(5000) == framed(b"".join(parts))
    stream.close()
    far.close()
    first, second = datagram_pair()
    assert first.send(parts)
    assert bytes(second.receive() or b"") == b"".join(parts)
    first.close()
    second.close()


@pytest.mark.parametrize("length", [0, 13, LONGEST_FRAME + 1])
def test_what_is_no_frame_is_not_sent(cards: Any, length: int) -> None:
    card = cards()
    card.put(bytes(length))
    card.put(frame(1))
    assert card.arrived() == [frame(1)]
    assert card.counters == {"bad_frame_sent": 1}
    assert len(card.queues[1].used()) == 2


def test_a_buffer_shorter_than_the_header_comes_back(cards: Any) -> None:
    card = cards()
    assert card.request([bytes(11)], queue=1) == b""
    assert card.counters == {"bad_frame_sent": 1}


@pytest.mark.parametrize("header", [b"\1\0", b"\0\1", b"\0\3"])
def test_work_that_nobody_agreed_to_do_is_not_sent_undone(cards: Any, header: bytes) -> None:
    card = cards()
    card.request([header + bytes(10) + frame()], queue=1)
    assert card.arrived() == []
    assert card.counters == {"offload_not_negotiated": 1}


def test_a_guest_that_sends_faster_than_the_other_end_reads_loses_nothing(cards: Any) -> None:
    card = cards()
    sent: list[bytes] = []
    while not card.device.backend.full:
        sent.append(frame(len(sent), 1514))
        card.put(sent[-1])
        assert len(sent) < 10_000
    for _ in range(20):
        sent.append(frame(len(sent), 1514))
        card.put(sent[-1])
    # Those wait in guest memory, and nobody is woken for them.
    assert card.queues[1].used_idx == len(sent) - 20
    assert card.arrived() == sent
    assert card.queues[1].used_idx == len(sent)
    assert card.counters == {}


# --- receiving ------------------------------------------------------------------------------------------------------


def test_a_frame_is_received(cards: Any) -> None:
    card = cards()
    card.offer(1526)
    card.far.sendall(framed(frame(1)))
    assert card.taken() == [ONE_BUFFER + frame(1)]
    assert card.device.received == 1


def test_a_frame_that_comes_in_pieces_is_received(cards: Any) -> None:
    card = cards()
    card.offer(1526, 1526)
    for byte in framed(frame(1)) + framed(frame(2)):
        card.far.send(bytes([byte]))
        serve(card)
    assert card.frames() == [frame(1), frame(2)]


def test_many_frames_at_once_are_received_in_order(cards: Any) -> None:
    card = cards()
    sent = [frame(number, 100) for number in range(200)]
    card.far.sendall(b"".join(map(framed, sent)))
    got: list[bytes] = []
    for _ in range(10):
        card.offer(*[1526] * 32)
        got += card.frames()
    assert got == sent


@pytest.mark.parametrize("sizes", [[100] * 20, [12] * 40 + [1526], [13] + [200] * 9, [1500, 26]])
def test_a_long_frame_is_merged_from_several_buffers(cards: Any, sizes: list[int]) -> None:
    card = cards()
    card.offer(*sizes)
    data = frame(1, 1514)
    card.far.sendall(framed(data))
    parts = card.taken()
    whole = b"".join(parts)
    assert whole == bytes(10) + struct.pack("<H", len(parts)) + data
    assert [len(part) for part in parts[:-1]] == sizes[: len(parts) - 1]


def test_a_frame_waits_until_there_are_buffers_enough(cards: Any) -> None:
    card = cards()
    card.offer(1000)
    data = frame(1, 1514)
    card.far.sendall(framed(data) + framed(frame(2)))
    assert card.taken() == []
    card.offer(1000)
    assert b"".join(card.taken()) == bytes(10) + b"\2\0" + data
    card.offer(1000)
    assert card.frames() == [frame(2)]
    assert card.counters == {}


def test_a_frame_that_the_whole_queue_cannot_hold_is_dropped(cards: Any) -> None:
    card = cards()
    card.offer(*[20] * 64)
    card.far.sendall(framed(frame(1, 1514)) + framed(frame(2)))
    assert b"".join(card.taken()) == bytes(10) + b"\4\0" + frame(2)
    assert card.counters == {"frame_longer_than_queue": 1}


def test_without_merged_buffers_a_frame_that_is_too_long_is_dropped_and_the_buffer_kept(cards: Any) -> None:
    card = cards(without=(NetFeature.MRG_RXBUF,))
    card.offer(500)
    card.far.sendall(framed(frame(1, 1514)) + framed(frame(2, 488)))
    assert card.taken() == [ONE_BUFFER + frame(2, 488)]
    assert card.counters == {"frame_longer_than_buffer": 1}


def test_a_buffer_without_room_for_the_header_is_given_back(cards: Any) -> None:
    card = cards()
    card.offer(11, 1526)
    card.far.sendall(framed(frame(1)) + framed(frame(2)))
    assert card.taken() == [b"", ONE_BUFFER + frame(2)]
    assert card.counters == {"small_buffer": 1}


def test_nothing_is_longer_than_the_mtu_that_was_agreed_on(cards: Any) -> None:
    card = cards(mtu=1500)
    card.offer(2000, 2000)
    card.far.sendall(framed(frame(1, 1519)) + framed(frame(2, 1518)))
    assert card.frames() == [frame(2, 1518)]
    assert card.counters == {"bad_frame_received": 1}


def legacy_start(card: Card, *, merge: bool) -> None:
    """What a driver of before version 1 does (sections 3.1.2 and 4.2.4)."""
    card.write(reg.STATUS, DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER)
    card.accept(card.offered & ~(0 if merge else 1 << NetFeature.MRG_RXBUF))
    card.write(reg.GUEST_PAGE_SIZE, 0x1000)
    base = 0x1000
    for index in range(2):
        queue = FakeQueue(card, index, 16, base)
        card.write(reg.QUEUE_SEL, index)
        card.write(reg.QUEUE_NUM, 16)
        card.write(reg.QUEUE_ALIGN, 0x1000)
        card.write(reg.QUEUE_PFN, base >> 12)
        card.queues.append(queue)
        base = queue.end
    card.write(reg.STATUS, card.status | DeviceStatus.DRIVER_OK)


@pytest.mark.parametrize("merge", [True, False])
def test_a_legacy_driver_has_a_shorter_header_without_merged_buffers(cards: Any, merge: bool) -> None:
    card = cards(legacy=True, start=False)
    legacy_start(card, merge=merge)
    header = 12 if merge else 10
    assert card.request([bytes(header), frame(1)], queue=1) == b""
    assert card.arrived() == [frame(1)]
    card.offer(1526)
    card.far.sendall(framed(frame(2)))
    assert card.taken() == [(ONE_BUFFER if merge else bytes(10)) + frame(2)]
    assert card.counters == {}


def test_a_legacy_driver_sets_its_address(cards: Any) -> None:
    card = cards(legacy=True, start=False)
    for at in range(6):
        card.write(reg.CONFIG + at, 0x02 + at, 1)
    assert card.device.mac == "02:03:04:05:06:07"
    card.write(reg.CONFIG + 6, 0, 1)
    assert card.device.link_up
    assert card.counters == {"config_write": 1}


def test_a_driver_of_today_cannot_write_the_address(cards: Any) -> None:
    card = cards()
    card.write(reg.CONFIG, 0x02, 1)
    assert card.device.mac == MAC.hex(":")
    assert card.counters == {"config_write": 1}


# --- the guest does not take what arrives ---------------------------------------------------------------------------


def test_nothing_is_read_while_the_guest_has_no_buffers(cards: Any) -> None:
    card = cards()
    card.far.setblocking(False)
    sent = 0
    with suppress(BlockingIOError):  # in the end the sender has to wait
        while sent < 8 << 20:
            sent += card.far.send(framed(frame(1, 1514)))
            serve(card)
    assert sent < 8 << 20
    assert card.counters == {}
    got = 0
    while got < sent // 1518:
        card.offer(*[1526] * 32)
        taken = card.taken()
        assert taken
        got += len(taken)


def test_what_arrives_before_a_driver_runs_is_lost(cards: Any) -> None:
    card = cards(start=False)
    card.far.sendall(framed(frame(1)))
    serve(card)
    assert card.counters == {"no_driver": 1}
    card.start()
    card.offer(1526)
    card.far.sendall(framed(frame(2)))
    assert card.frames() == [frame(2)]


def test_after_a_reset_the_link_goes_on(cards: Any) -> None:
    card = cards()
    card.far.sendall(framed(frame(1)))
    serve(card)  # it waits for a buffer
    card.start()
    card.far.sendall(framed(frame(2)))
    card.offer(1526)
    assert card.frames() == [frame(2)]
    card.put(frame(3))
    assert card.arrived() == [frame(3)]


# --- the other end goes ---------------------------------------------------------------------------------------------


def test_the_link_goes_down_when_the_other_end_closes(cards: Any) -> None:
    card = cards()
    card.far.close()
    serve(card)
    assert not card.device.link_up
    assert card.config(6, 2) == 0
    assert card.acknowledge() & CONFIG_CHANGE
    card.put(frame(1))
    assert card.counters == {"peer_closed": 1, "link_down": 1}
    assert card.board.inputs == []
    assert not card.status & DeviceStatus.DEVICE_NEEDS_RESET


def test_a_closed_end_is_noticed_when_something_is_sent(cards: Any) -> None:
    card = cards()
    card.far.close()
    card.queues[1].add([NO_OFFLOAD + frame(1)])
    card.queues[1].kick()
    assert not card.device.link_up
    assert len(card.queues[1].used()) == 1


def test_what_waits_for_the_other_end_is_given_up_when_it_closes(cards: Any) -> None:
    card = cards()
    while not card.device.backend.full:
        card.put(frame(1, 1514))
    for _ in range(5):
        card.put(frame(2, 1514))
    card.far.close()
    serve(card)
    assert not card.device.link_up
    assert card.counters == {"peer_closed": 1, "unsent_frame": 1, "link_down": 5}
    assert card.queues[1].used_idx == card.queues[1].avail_idx


@pytest.mark.parametrize("end", [b"\0", b"\0\0\0\x40", framed(frame(9))[:-1]])
def test_a_frame_that_is_cut_off_is_lost_with_the_link(cards: Any, end: bytes) -> None:
    card = cards()
    card.offer(1526, 1526)
    card.far.sendall(framed(frame(1)) + end)
    card.far.close()
    assert card.frames() == [frame(1)]
    assert not card.device.link_up


@pytest.mark.parametrize("length", [LONGEST_FRAME + 1, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_a_length_that_no_frame_has_ends_the_link(cards: Any, length: int) -> None:
    card = cards()
    card.offer(1526, 1526)
    card.far.sendall(framed(frame(1)) + struct.pack(">I", length) + frame(2))
    assert card.frames() == [frame(1)]
    assert not card.device.link_up
    assert card.counters == {"bad_stream_length": 1}
    assert card.far.recv(1) == b""  # it is told


@pytest.mark.parametrize("length", [0, 1, 13])
def test_a_frame_that_is_too_short_is_dropped(cards: Any, length: int) -> None:
    card = cards()
    card.offer(1526)
    card.far.sendall(framed(bytes(length)) * 100 + framed(frame(1)))
    assert card.frames() == [frame(1)]
    assert card.counters == {"bad_frame_received": 100}


def test_the_longest_frame_is_received(cards: Any) -> None:
    card = cards()
    card.offer(*[1526] * 60)
    data = frame(1, LONGEST_FRAME)
    card.far.sendall(framed(data))
    assert b"".join(card.taken())[HEADER:] == data


def test_the_cable_can_be_pulled_and_plugged_in_elsewhere(cards: Any) -> None:
    card = cards()
    card.device.connect(None)
    assert card.far.recv(1) == b""
    assert card.config(6, 2) == 0
    assert card.acknowledge() & CONFIG_CHANGE
    card.put(frame(1))
    near, far = socket.socketpair()
    card.device.connect(StreamSocket(near))
    assert card.config(6, 2) == 1
    assert card.acknowledge() & CONFIG_CHANGE
    card.far.close()
    card.far = far
    card.put(frame(2))
    assert card.arrived() == [frame(2)]
    card.offer(1526)
    far.sendall(framed(frame(3)))
    assert card.frames() == [frame(3)]
    assert card.counters == {"link_down": 1}


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=5))
def test_whatever_the_other_end_sends_frames_before_it_arrive(data: bytes, cuts: list[int]) -> None:
    near, far = socket.socketpair()
    card = Card(VirtioNet(StreamSocket(near)), far)
    card.start()
    card.offer(*[1526] * 16)
    far.sendall(framed(frame(1)))
    edges = [0, *sorted(cuts), len(data)]
    for start, end in pairwise(edges):
        if card.device.link_up:
            far.sendall(data[start:end])
        serve(card)
    assert card.frames()[0] == frame(1)
    # Not one byte more than the frames that are in the data.
    far.close()
    serve(card)
    assert not card.device.link_up
    card.mmio.close()


# --- state ----------------------------------------------------------------------------------------------------------


def test_a_frame_that_waits_for_a_buffer_is_part_of_the_state(cards: Any) -> None:
    card = cards(mtu=9000)
    card.far.sendall(framed(frame(1)))
    serve(card)
    state = card.mmio.state()
    near, far = socket.socketpair()
    other = Card(VirtioNet(StreamSocket(near), mtu=1500), far)
    other.memory.write(0, card.memory.read(0, 0x10_0000))
    other.mmio.restore(state)
    other.queues = card.queues
    for queue in other.queues:
        queue.driver, queue.memory = other, other.memory
    assert other.device.mac == "52:54:00:12:34:56"
    assert other.mmio.state() == state
    other.mmio.resume()
    other.offer(1526)
    far.sendall(framed(frame(2)))
    other.offer(1526)
    assert other.frames() == [frame(1), frame(2)]
    other.mmio.close()
    far.close()


STOPPED = """
import os, pickle, socket, sys
sys.path[:0] = sys.argv[1:]
from kvmpy.virtio import StreamSocket, VirtioNet
from network_cable import MAC, NO_OFFLOAD, frame, framed, serve
from virtio_driver import FakeDriver, FakeQueue
near, far = socket.socketpair()
driver = FakeDriver(VirtioNet(StreamSocket(near), mac=MAC)).start()
def put(data):
    driver.queues[1].add([NO_OFFLOAD + data])
    driver.queues[1].kick()
    serve(driver)
while not driver.device.backend.full:
    put(frame(0, 1514))
for number in range(5):
    put(frame(number, 1000))
far.send(framed(frame(7)))
serve(driver)
driver.mmio.quiesce()
rings = [{name: value for name, value in vars(queue).items() if name not in ("driver", "memory")}
         for queue in driver.queues]
with open(1, "wb", closefd=False) as output:
    pickle.dump((driver.mmio.state(), driver.memory.read(0, 0x100000), rings), output)
os.kill(os.getpid(), 9)
"""


def test_what_waited_is_sent_and_received_in_another_process() -> None:
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, tests, tests.parent], capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (-9, b"")
    state, memory, rings = pickle.loads(done.stdout)
    near, far = socket.socketpair()
    card = Card(VirtioNet(StreamSocket(near)), far)
    card.memory.write(0, memory)
    card.mmio.restore(state)
    card.queues = [FakeQueue.__new__(FakeQueue) for _ in rings]
    for queue, ring in zip(card.queues, rings, strict=True):
        vars(queue).update(ring, driver=card, memory=card.memory)
    card.mmio.resume()
    assert card.arrived() == [frame(number, 1000) for number in range(5)]
    card.offer(1526)
    assert card.frames() == [frame(7)]
    assert card.device.mac == MAC.hex(":")
    card.mmio.close()
    far.close()


def test_the_link_of_a_restored_device_is_that_of_its_own_backend(cards: Any) -> None:
    card = cards()
    other = Card(VirtioNet())
    other.memory.write(0, card.memory.read(0, 0x10_0000))
    other.mmio.restore(card.mmio.state())
    other.mmio.resume()
    assert not other.device.link_up
    assert other.config(6, 2) == 0
    assert other.acknowledge() & CONFIG_CHANGE
    other.mmio.close()


def test_a_quiet_device_holds_what_arrives(cards: Any) -> None:
    card = cards()
    card.offer(1526, 1526)
    card.mmio.quiesce()
    card.far.sendall(framed(frame(1)) + framed(frame(2)))
    assert card.taken() == []
    card.put(frame(3))
    assert card.arrived() == []
    card.mmio.resume()
    assert card.frames() == [frame(1), frame(2)]
    assert card.arrived() == [frame(3)]


# --- datagrams ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[Card, Card]]:
    near, far = datagram_pair()
    cards = Card(VirtioNet(near)), Card(VirtioNet(far))
    for card in cards:
        card.start(size=64)
    yield cards
    for card in cards:
        card.mmio.close()


def test_two_cards_exchange_frames(pair: tuple[Card, Card]) -> None:
    first, second = pair
    for here, there in (pair, (second, first)):
        there.offer(*[1526] * 3)
        here.put(frame(1), frame(2, 14), frame(3, 1514))
        assert there.frames() == [frame(1), frame(2, 14), frame(3, 1514)]


def test_a_card_whose_neighbour_does_not_take_frames_loses_some_and_goes_on(pair: tuple[Card, Card]) -> None:
    first, second = pair
    sent = 0
    while not first.counters["send_queue_full"]:
        first.put(frame(sent, 1514))
        sent += 1
        assert sent < 10_000
    assert first.queues[1].used_idx == sent  # all came back: nobody waits for a neighbour
    got: list[bytes] = []
    while True:
        second.offer(*[1526] * 32)
        serve(first)
        more = second.frames()
        if not more:
            break
        got += more
    assert got == [frame(number, 1514) for number in range(sent - 1)]
    first.put(frame(7))
    assert second.frames() == [frame(7)]


def test_when_one_is_closed_the_other_has_no_link(pair: tuple[Card, Card]) -> None:
    first, second = pair
    first.device.close()
    serve(second)
    assert not second.device.link_up
    assert second.counters == {"peer_closed": 1}


def test_a_neighbour_that_is_closed_is_noticed_by_sending(pair: tuple[Card, Card]) -> None:
    first, second = pair
    while not first.device.backend._unsent:  # type: ignore[union-attr]
        first.put(frame(1, 1514))
    second.device.close()
    serve(first)
    assert not first.device.link_up


def test_datagram_sockets_of_both_kinds_do() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    card = Card(VirtioNet(DatagramSocket(near)), far)
    card.start()
    card.offer(*[1526] * 3)
    far.send(b"")
    far.send(frame(1))
    far.send(bytes(LONGEST_FRAME + 1))
    assert card.frames() == [frame(1)]
    assert card.counters == {"bad_frame_received": 2, "giant_frame": 1}
    card.put(frame(2))
    assert far.recv(2000) == frame(2)
    far.close()
    card.put(frame(3))
    assert not card.device.link_up
    card.mmio.close()


def test_udp_without_a_listener_keeps_the_link() -> None:
    near, far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for sock in (near, far):
        sock.bind(("127.0.0.1", 0))
    near.connect(far.getsockname())
    card = Card(VirtioNet(DatagramSocket(near)), far)
    card.start()
    far.close()
    for number in range(4):
        card.put(frame(number))
    assert card.device.link_up
    assert set(card.counters) == {"host_ECONNREFUSED"}
    card.mmio.close()


def test_a_socket_of_another_kind_is_refused() -> None:
    near, far = socket.socketpair()
    with near, far, pytest.raises(UsageError, match="SOCK_STREAM"):
        DatagramSocket(near)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far, pytest.raises(UsageError, match="DatagramSocket"):
        StreamSocket(near)


# --- captures -------------------------------------------------------------------------------------------------------


def records(path: Path) -> list[bytes]:
    """The frames of a capture file; asserts that it is one of nanoseconds, with rising times."""
    data = path.read_bytes()
    magic, major, minor, _, _, _, link = struct.unpack_from("<IHHiIII", data)
    assert (magic, major, minor, link) == (0xA1B23C4D, 2, 4, 1)
    at, frames, before = 24, [], 0.0
    while at < len(data):
        seconds, nanoseconds, kept, length = struct.unpack_from("<IIII", data, at)
        assert nanoseconds < 1_000_000_000
        assert kept <= length
        assert seconds + nanoseconds / 1e9 >= before
        before = seconds + nanoseconds / 1e9
        frames.append(data[at + 16 : at + 16 + kept])
        at += 16 + kept
    return frames


def test_a_capture_has_what_went_both_ways(cards: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.pcap"
    card = cards(capture=path)
    card.put(frame(1), frame(2))
    card.far.sendall(framed(frame(3, 1514)) + framed(b"") + framed(frame(4)))
    card.offer(1526, 1526)
    assert records(path) == [frame(1), frame(2), frame(3, 1514), frame(4)]


def test_a_capture_can_keep_the_beginnings_only(cards: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.pcap"
    card = cards(capture=PcapFile(path, snapshot=30))
    card.put(frame(1))
    assert records(path) == [frame(1)[:30]]


def test_the_network_goes_on_when_the_capture_cannot(cards: Any) -> None:
    capture = PcapFile("/dev/full")
    assert capture.error is not None
    card = cards(capture=capture)
    card.put(frame(1), frame(2))
    assert card.arrived() == [frame(1), frame(2)]
    assert card.counters == {"capture_failed": 1}
    assert capture.frames == 0


@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="tcpdump is not installed (Debian package tcpdump)")
def test_tcpdump_reads_a_capture(cards: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.pcap"
    card = cards(capture=path)
    card.put(arp_request("192.0.2.7", sender="192.0.2.9"))
    told = subprocess.run(["tcpdump", "-nr", path], capture_output=True, text=True, check=True)
    assert "who-has 192.0.2.7 tell 192.0.2.9" in told.stdout
    assert "EN10MB (Ethernet)" in told.stderr


# --- programs and interfaces of the host ----------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed (Debian package passt)")
def test_passt_answers_and_ends_with_the_device() -> None:
    device = VirtioNet(Passt(), mac=MAC)
    passt = device.backend
    assert isinstance(passt, Passt)
    card = Card(device)
    card.start()
    card.offer(1526)
    card.put(arp_request("10.99.1.1"))
    while not (frames := card.frames()):  # length and frame may come one after the other
        serve(card, wait=5)
    (answer,) = frames
    assert answer[:6] == MAC
    assert answer[12:14] == b"\x08\x06"
    assert answer[20:22] == b"\0\2"  # an ARP reply
    card.mmio.close()
    assert passt.process.returncode is not None


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed (Debian package passt)")
def test_the_link_goes_down_when_passt_is_killed() -> None:
    card = Card(VirtioNet(Passt()))
    card.start()
    assert isinstance(card.device.backend, Passt)
    card.device.backend.process.kill()
    serve(card, wait=5)
    assert not card.device.link_up
    card.mmio.close()


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed (Debian package passt)")
def test_passt_that_does_not_start_says_why() -> None:
    with pytest.raises(OSError, match="nosuch0"):
        Passt(arguments=["--interface", "nosuch0"])


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(UsageError, match="apt-get install passt"):
        Passt(program="passt-that-is-not-there")


@pytest.mark.parametrize("name", ["", "sixteen-bytes-xx", "a/b", "nul\0"])
def test_a_name_that_no_interface_has_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="1 to 15"):
        Tap(name)


def test_who_may_not_make_an_interface_is_told_how() -> None:
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(OSError, match=r"ip tuntap add|modprobe tun|chmod 666"):
            Tap("kvmpytest0")
    finally:
        os.seteuid(user)


def test_a_stream_socket_connects_to_a_path(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with pytest.raises(FileNotFoundError, match="socket"):
        StreamSocket(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        backend = StreamSocket(path)
        far, _ = server.accept()
        with far:
            assert backend.send([memoryview(frame(1))])
            assert far.recv(100) == framed(frame(1))
        backend.close()


def test_frames_are_used_in_order() -> None:
    assert VirtioNet().offered >> Feature.IN_ORDER & 1
