"""Split virtqueues from the device's side: chains, notifications both ways, batches, drivers that break the rules."""

from __future__ import annotations

import threading
from collections.abc import Callable
from struct import pack

import pytest

from kvmpy.errors import UsageError
from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.virtio import Chain, DeviceStatus, Feature, VirtioDevice, Virtqueue
from kvmpy.virtio import mmio_registers as reg
from kvmpy.virtio.virtqueue import BATCH
from virtio_devices import Echo, Keeper
from virtio_driver import EMPTY_ROOM, INDIRECT, NEXT, WRITE, FakeDriver, FakeQueue

EVENT_IDX, IN_ORDER = Feature.EVENT_IDX, Feature.IN_ORDER


def echo(*, without: tuple[int, ...] = (EVENT_IDX,)) -> FakeDriver:
    return FakeDriver(Echo()).start(without=without)


def echo_device(driver: FakeDriver) -> Echo:
    assert isinstance(driver.device, Echo)
    return driver.device


def keeper(*features: int, without: tuple[int, ...] = (EVENT_IDX,)) -> tuple[FakeDriver, Keeper, FakeQueue]:
    device = Keeper()
    device.features |= set(features)
    driver = FakeDriver(device).start(without=without)
    return driver, device, driver.queues[0]


# Chains


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_is_read_and_written_however_it_is_cut_up(indirect: bool) -> None:
    driver = echo()
    assert driver.request([b"ab", b"cdef", b"g"], [1, 3, 100], indirect=indirect) == b"abcdefg"
    assert driver.request([b"abcdefg"], [4], indirect=indirect) == b"abcd"
    assert driver.request([b"abc"], indirect=indirect) == b""
    assert driver.request([], [5], indirect=indirect) == b""


def test_an_indirect_table_may_come_after_other_descriptors() -> None:
    driver = echo()
    queue = driver.queues[0]
    table = pack("<QIHH", driver.place(b"def"), 3, NEXT, 1) + pack("<QIHH", driver.place(bytes(8)), 8, WRITE, 0)
    queue.desc(0, driver.place(b"abc"), 3, NEXT, 5)
    queue.desc(5, driver.place(table), len(table), INDIRECT | WRITE)  # WRITE is to be ignored there (2.7.5.3.2)
    queue.make_available(0)
    queue.kick()
    assert [(head, length) for head, length, _ in queue.used()] == [(0, 6)]
    assert driver.device.counters == {}


def test_empty_buffers_are_passed_over() -> None:
    driver = echo()
    assert driver.request([b"", b"abc", b""], [0, 3, 0]) == b"abc"


class Pieces(VirtioDevice):
    """Takes its requests apart as a disk does: 4 bytes, data, a status byte."""

    queue_sizes = (16,)

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        self.header = chain.read(4)
        self.rest = [view.tobytes() for view in chain.take_readable(3)], chain.readable_left
        self.room = [len(view) for view in chain.take_writable(chain.writable_left - 1)], chain.writable_left
        chain.write(b"S")
        self.full = chain.write(b"more")
        chain.complete()


def test_views_are_cut_where_the_device_wants() -> None:
    device = Pieces()
    driver = FakeDriver(device).start()
    assert driver.request([b"ab", b"cdef", b"gh"], [3, 2, 2]) == b"\0\0\0\0\0\0S"
    assert device.header == b"abcd"
    assert device.rest == ([b"ef", b"g"], 1)
    assert device.room == ([3, 2, 1], 1)
    assert device.full == 0


def test_a_view_shows_what_the_guest_has_in_its_memory_now() -> None:
    driver, device, queue = keeper()
    queue.add([b"before"], [6])
    queue.kick()
    (view,) = device.kept[0].take_readable(6)
    driver.memory.write(driver._free - 12, b"after!")
    assert bytes(view) == b"after!"


def test_a_buffer_may_span_two_regions_of_ram() -> None:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, 0x8_0000))
    memory.add(MemoryRegion.anonymous(0x8_0000, 0x8_0000))
    driver = FakeDriver(Echo(), memory=memory).start()
    queue = driver.queues[0]
    memory.write(0x7_FFFE, b"abcd")
    queue.desc(0, 0x7_FFFE, 4, NEXT, 1)
    queue.desc(1, 0x7_FFFF, 4, WRITE)
    queue.make_available(0)
    queue.kick()
    assert memory.read(0x7_FFFE, 5) == b"aabcd"


def test_ram_that_comes_later_is_found() -> None:
    driver = echo()
    assert driver.request([b"a"], [1]) == b"a"
    driver.memory.add(MemoryRegion.anonymous(EMPTY_ROOM, 0x1000))
    queue = driver.queues[0]
    queue.desc(0, EMPTY_ROOM, 4, WRITE)
    queue.make_available(0)
    queue.kick()
    assert driver.device.counters == {}


def test_rom_is_read_and_never_written() -> None:
    memory = GuestMemory()
    memory.add(MemoryRegion.anonymous(0, 0x8_0000))
    memory.add(MemoryRegion.anonymous(0x8_0000, 0x1000, read_only=True))
    driver = FakeDriver(Echo(), memory=memory).start()
    device, queue = echo_device(driver), driver.queues[0]
    memory.write(0x8_0000, b"rom")
    queue.desc(0, 0x8_0000, 3, 0)
    queue.make_available(0)
    queue.kick()
    assert device.handled == [b"rom"]
    queue.desc(1, 0x8_0000, 3, WRITE)
    queue.make_available(1)
    queue.kick()
    assert device.counters == {"buffer_not_in_ram": 1}
    assert memory.read(0x8_0000, 3) == b"rom"


# Drivers that break the rules

Break = Callable[[FakeDriver, FakeQueue], None]


def table_of(driver: FakeDriver, *descriptors: tuple[int, int, int, int]) -> int:
    return driver.place(b"".join(pack("<QIHH", *one) for one in descriptors), 16)


def _loop(driver: FakeDriver, queue: FakeQueue) -> None:
    queue.desc(0, 0x5_0000, 16, NEXT, 1)
    queue.desc(1, 0x5_0000, 16, NEXT, 0)


def _indirect_loop(driver: FakeDriver, queue: FakeQueue) -> None:
    table = table_of(driver, (0x5_0000, 1, NEXT, 1), (0x5_0000, 1, NEXT, 0))
    queue.desc(0, table, 32, INDIRECT)


def _indirect_in_indirect(driver: FakeDriver, queue: FakeQueue) -> None:
    queue.desc(0, table_of(driver, (0x5_0000, 16, INDIRECT, 0)), 16, INDIRECT)


def _many_gigabytes(driver: FakeDriver, queue: FakeQueue) -> None:
    # One buffer again and again: 1024 of 0x50_0000 bytes are more than 4 GiB.
    driver.memory.add(MemoryRegion.anonymous(EMPTY_ROOM, 0x60_0000))
    table = table_of(driver, *((EMPTY_ROOM, 0x50_0000, NEXT if at < 1023 else 0, at + 1 & 1023) for at in range(1024)))
    queue.desc(0, table, 16 * 1024, INDIRECT)


def _readable_after_writable(driver: FakeDriver, queue: FakeQueue) -> None:
    queue.desc(0, 0x5_0000, 1, WRITE | NEXT, 1)
    queue.desc(1, 0x5_0000, 1)


BREAKS: dict[str, tuple[str, Break]] = {
    "a loop": ("chain_too_long", _loop),
    "a loop in a table": ("chain_too_long", _indirect_loop),
    "a table in a table": ("indirect_not_allowed", _indirect_in_indirect),
    "a table with a next": ("indirect_not_allowed", lambda d, q: q.desc(0, 0x5_0000, 16, INDIRECT | NEXT, 1)),
    "an odd table": ("indirect_table_size", lambda d, q: q.desc(0, 0x5_0000, 17, INDIRECT)),
    "an empty table": ("indirect_table_size", lambda d, q: q.desc(0, 0x5_0000, 0, INDIRECT)),
    "a giant table": ("indirect_table_size", lambda d, q: q.desc(0, 0x5_0000, 0xFFFF_FFF0, INDIRECT)),
    "a table nowhere": ("indirect_table_not_in_ram", lambda d, q: q.desc(0, EMPTY_ROOM, 16, INDIRECT)),
    "a next outside": ("descriptor_index", lambda d, q: q.desc(0, 0x5_0000, 1, NEXT, 16)),
    "a buffer nowhere": ("buffer_not_in_ram", lambda d, q: q.desc(0, EMPTY_ROOM, 1, WRITE)),
    "a buffer over the end": ("buffer_not_in_ram", lambda d, q: q.desc(0, 0xF_FFFF, 2, WRITE)),
    "a buffer that wraps": ("buffer_not_in_ram", lambda d, q: q.desc(0, (1 << 64) - 1, 2, 0)),
    "a giant buffer": ("buffer_not_in_ram", lambda d, q: q.desc(0, 0, 0xFFFF_FFFF, WRITE)),
    "many gigabytes": ("chain_of_too_many_bytes", _many_gigabytes),
    "readable after writable": ("readable_after_writable", _readable_after_writable),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_malformed_chain_needs_a_reset(name: str) -> None:
    rule, breaks = BREAKS[name]
    driver = echo()
    device, queue = echo_device(driver), driver.queues[0]
    breaks(driver, queue)
    queue.make_available(0)
    queue.kick()
    assert device.counters == {rule: 1}
    assert driver.status & DeviceStatus.DEVICE_NEEDS_RESET
    assert driver.acknowledge() == 2  # 2.1.2: a configuration change notification
    assert queue.used() == []
    queue.kick()  # and nothing more
    assert queue.used() == []
    driver.start()
    assert driver.request([b"again"], [5]) == b"again"


def test_a_head_outside_of_the_table_needs_a_reset() -> None:
    driver = echo()
    driver.queues[0].make_available(16)
    driver.queues[0].kick()
    assert driver.device.counters == {"descriptor_index": 1}


def test_a_table_without_the_feature_needs_a_reset() -> None:
    driver = echo(without=(Feature.INDIRECT_DESC,))
    driver.request([b"a"], [1], indirect=True)
    assert driver.device.counters == {"indirect_not_allowed": 1}


@pytest.mark.parametrize("jump", [17, 0x8000, 0xFFFF])
def test_an_index_that_offers_more_than_the_queue_has_needs_a_reset(jump: int) -> None:
    driver = echo()
    driver.queues[0].make_available(0, index=jump)
    driver.queues[0].kick()
    assert driver.device.counters == {"available_index": 1}


def test_chains_in_flight_count_against_the_queue() -> None:
    _driver, device, queue = keeper()
    for _ in range(16):
        queue.add([b"a"])
    queue.kick()
    assert len(device.kept) == 16
    queue.make_available(0)  # all descriptors are with the device
    queue.kick()
    assert device.counters == {"available_index": 1}
    assert device.queues[0].in_flight == 16


# Notifications of the driver


def test_a_batch_interrupts_once_and_a_driver_that_polls_sees_each_at_once() -> None:
    driver = echo()
    device, queue = echo_device(driver), driver.queues[0]
    during: list[tuple[int, int]] = []

    def handle(virtqueue: Virtqueue, chain: Chain) -> None:
        device.echo(virtqueue, chain)
        during.append((queue.used_idx, driver.interrupt_status))

    device.on_chain = handle
    for number in range(5):
        queue.add([bytes([number])], [1])
    queue.kick()
    assert during == [(number, 0) for number in range(1, 6)]
    assert [answer for _, _, answer in queue.used()] == [bytes([number]) for number in range(5)]
    assert driver.board.lines[5].edges == 1
    assert driver.acknowledge() == 1


def test_a_driver_that_wants_no_interrupt_gets_none() -> None:
    driver = echo()
    driver.queues[0].set_no_interrupt(True)
    assert driver.request([b"a"], [1]) == b"a"
    assert driver.interrupt_status == 0


@pytest.mark.parametrize("start", [0, 0xFFFD])
@pytest.mark.parametrize(
    ("event", "interrupts"), [(0, True), (1, True), (2, True), (3, False), (0x8000, False), (-1, False)]
)
def test_the_event_index_says_which_entry_interrupts(start: int, event: int, interrupts: bool) -> None:
    # Three entries are used at once, from `start` on; the driver wants to hear of one of them, or of another.
    driver = echo(without=())
    device, queue = echo_device(driver), driver.queues[0]
    state = device.state()
    state["queues"][0].update(next=start, used=start)
    device.restore(state)
    device.resume()
    queue.avail_idx = queue.seen = start
    queue.memory.write_u16(queue.used_ring + 2, start)
    queue.set_used_event(start + event & 0xFFFF)
    for _ in range(3):
        queue.add([b"a"], [1])
    queue.kick()
    assert len(queue.used()) == 3
    assert driver.interrupt_status == int(interrupts)


def test_before_driver_ok_nothing_is_used() -> None:
    driver = FakeDriver(Echo())
    driver.negotiate()
    queue = driver.set_up_queue(0)
    queue.add([b"a"], [1])
    queue.kick()
    assert queue.used() == []
    assert driver.device.counters == {"notify_not_ready": 1}
    driver.write(reg.STATUS, driver.status | DeviceStatus.DRIVER_OK)
    queue.kick()
    assert [answer for _, _, answer in queue.used()] == [b"a"]


# Notifications of the device


def test_while_it_works_the_device_wants_no_notification() -> None:
    driver = echo()
    device, queue = echo_device(driver), driver.queues[0]
    flags: list[int] = []

    def handle(virtqueue: Virtqueue, chain: Chain) -> None:
        flags.append(queue.flags)
        chain.complete()

    device.on_chain = handle
    queue.add([b"a"])
    queue.kick()
    assert flags == [1]
    assert queue.flags == 0


def test_with_the_event_index_it_asks_for_the_next_entry() -> None:
    driver = echo(without=())
    queue = driver.queues[0]
    for _ in range(3):
        queue.add([b"a"])
    queue.kick()
    assert queue.avail_event == 3


def test_what_comes_while_it_stops_looking_is_found() -> None:
    # The driver adds a chain between the device's last look and its wish to be notified.
    driver = echo(without=())
    device, queue = echo_device(driver), driver.queues[0]
    virtqueue = device.queues[0]

    class Barrier:
        """In the place of the real one: here is where the other processor's store becomes visible."""

        left = 1

        def __enter__(self) -> None:
            if self.left:
                self.left -= 1
                queue.add([b"late"])

        def __exit__(self, *_: object) -> None:
            pass

    virtqueue._barrier = Barrier()  # type: ignore[assignment]
    queue.add([b"early"])
    queue.kick()
    assert device.handled == [b"early", b"late"]
    assert queue.avail_event == 2


def test_a_guest_that_adds_without_end_does_not_keep_the_thread() -> None:
    driver = echo()
    device, queue = echo_device(driver), driver.queues[0]
    handled = 0

    def handle(virtqueue: Virtqueue, chain: Chain) -> None:
        nonlocal handled
        handled += 1
        chain.complete()
        queue.make_available(0)

    device.on_chain = handle
    queue.add([b"a"])
    queue.kick()
    assert handled == BATCH
    (timer,) = driver.board.timers
    assert timer.deadline is not None
    timer.call()
    assert handled == 2 * BATCH


# Completing later


def test_chains_are_completed_in_any_order() -> None:
    _driver, device, queue = keeper()
    for data in (b"a", b"b", b"c"):
        queue.add([data], [1])
    queue.kick()
    assert queue.used() == []
    device.answer(1)
    device.answer(1)
    device.answer(0)
    assert [answer for _, _, answer in queue.used()] == [b"b", b"c", b"a"]


def test_in_order_means_in_order() -> None:
    _driver, device, queue = keeper(IN_ORDER)
    for data in (b"a", b"b", b"c"):
        queue.add([data], [1])
    queue.kick()
    device.answer(2)
    device.answer(1)
    assert queue.used() == []
    device.answer(0)
    assert [answer for _, _, answer in queue.used()] == [b"a", b"b", b"c"]


def test_a_batch_of_answers_from_another_thread_interrupts_once() -> None:
    driver, device, queue = keeper()
    for data in (b"a", b"b", b"c"):
        queue.add([data], [1])
    queue.kick()

    def answer() -> None:
        with device.queues[0].batch():
            while device.kept:
                device.answer()

    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()
    assert [answer for _, _, answer in queue.used()] == [b"a", b"b", b"c"]
    assert driver.board.lines[5].edges == 1


def test_a_chain_is_completed_once() -> None:
    _, device, queue = keeper()
    queue.add([b"a"])
    queue.kick()
    chain = device.kept[0]
    chain.complete()
    with pytest.raises(UsageError, match="completed already"):
        chain.complete()


def test_a_chain_that_is_put_back_is_taken_again() -> None:
    driver = echo()
    device, queue = echo_device(driver), driver.queues[0]
    virtqueue = device.queues[0]
    queue.add([b"a"])
    queue.add([b"b"])
    first, second = virtqueue.take(), virtqueue.take()
    assert first is not None
    assert second is not None
    assert virtqueue.take() is None
    with pytest.raises(UsageError, match="taken last"):
        virtqueue.put_back(first)
    virtqueue.put_back(second)
    virtqueue.put_back(first)
    assert virtqueue.in_flight == 0
    queue.kick()
    assert device.handled == [b"a", b"b"]


def test_a_chain_whose_handler_raised_is_there_again() -> None:
    driver = echo()
    device, queue = echo_device(driver), driver.queues[0]

    def fail(virtqueue: Virtqueue, chain: Chain) -> None:
        chain.read(1)
        raise RuntimeError("a bug")

    device.on_chain = fail
    queue.add([b"abc"], [3])
    with pytest.raises(RuntimeError, match="a bug"):
        queue.kick()
    device.on_chain = device.echo
    queue.kick()
    assert [answer for _, _, answer in queue.used()] == [b"abc"]


@pytest.mark.parametrize("size", [0, 3, 65536])
def test_a_queue_has_a_power_of_two_of_entries(size: int) -> None:
    class Odd(VirtioDevice):
        queue_sizes = (size,)

    with pytest.raises(UsageError, match="power of 2"):
        Odd()
