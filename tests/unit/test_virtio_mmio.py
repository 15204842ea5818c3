"""The registers of virtio-mmio, its interrupt and its notifications, and the legacy device."""

from __future__ import annotations

import pytest

from device_board import RecordingBoard
from kvmpy.errors import UsageError
from kvmpy.virtio import DeviceStatus, Entropy, VirtioDevice, VirtioMmio, linux_parameters
from kvmpy.virtio import mmio_registers as reg
from virtio_devices import Echo, Keeper
from virtio_driver import EMPTY_ROOM, FakeDriver, FakeQueue, buffer_memory

ACKNOWLEDGE_DRIVER = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER


def test_a_driver_finds_the_device() -> None:
    driver = FakeDriver(Echo())
    assert driver.read(reg.MAGIC_VALUE).to_bytes(4, "little") == b"virt"
    assert driver.read(reg.VERSION) == 2
    assert driver.read(reg.DEVICE_ID) == 42
    assert driver.read(reg.STATUS) == 0


def test_registers_are_32_bits_wide_and_read_at_any_width() -> None:
    driver = FakeDriver(Echo())
    assert driver.read(reg.MAGIC_VALUE, 1) == ord("v")
    assert driver.read(reg.MAGIC_VALUE + 1, 1) == ord("i")
    assert driver.read(reg.MAGIC_VALUE + 2, 2) == int.from_bytes(b"rt", "little")
    assert driver.read(reg.MAGIC_VALUE, 8) == 2 << 32 | reg.MAGIC
    assert driver.read(reg.MAGIC_VALUE + 2, 4) == int.from_bytes(b"rt\2\0", "little")
    assert driver.read(reg.CONFIG_GENERATION, 8) == 0x55667788 << 32


@pytest.mark.parametrize(("offset", "size"), [(reg.STATUS, 1), (reg.STATUS, 2), (reg.STATUS, 8), (reg.STATUS + 1, 4)])
def test_writes_of_other_widths_are_counted_and_lost(offset: int, size: int) -> None:
    driver = FakeDriver(Echo())
    driver.write(offset, 1, size)
    assert driver.status == 0
    assert driver.device.counters == {"register_width": 1}


def test_queues_that_do_not_exist_have_no_size() -> None:
    driver = FakeDriver(Echo())
    sizes = []
    for index in (0, 1, 2, 0xFFFF_FFFF):
        driver.write(reg.QUEUE_SEL, index)
        sizes.append(driver.read(reg.QUEUE_NUM_MAX))
    assert sizes == [256, 16, 0, 0]
    assert driver.read(reg.QUEUE_READY) == 0
    driver.write(reg.QUEUE_READY, 1)
    assert driver.device.counters == {"register_write": 1}


def test_features_beyond_63_do_not_exist() -> None:
    driver = FakeDriver(Echo())
    driver.write(reg.DEVICE_FEATURES_SEL, 2)
    assert driver.read(reg.DEVICE_FEATURES) == 0
    driver.write(reg.DEVICE_FEATURES_SEL, 0xFFFF_FFFF)
    assert driver.read(reg.DEVICE_FEATURES) == 0
    driver.write(reg.DRIVER_FEATURES_SEL, 2)
    driver.write(reg.DRIVER_FEATURES, 1)
    assert driver.device.accepted == 0
    assert driver.device.counters == {"features_beyond_63": 1}


def test_there_is_no_shared_memory() -> None:
    driver = FakeDriver(Echo())
    driver.write(reg.SHM_SEL, 0)
    assert driver.read(reg.SHM_LEN_LOW) == driver.read(reg.SHM_LEN_HIGH) == 0xFFFF_FFFF


@pytest.mark.parametrize(
    ("size", "table", "available", "used"),
    [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (32, 0x1000, 0x2000, 0x3000),  # more than the queue's 16
        (16, 0x1008, 0x2000, 0x3000),
        (16, 0x1000, 0x2001, 0x3000),
        (16, 0x1000, 0x2000, 0x3002),
        (16, EMPTY_ROOM, 0x2000, 0x3000),
        (16, 0x1000, 0xF_FFF0, 0x3000),
        (16, 0x1000, 0x2000, (1 << 64) - 4),
    ],
)
def test_a_queue_that_cannot_be_is_not_ready(size: int, table: int, available: int, used: int) -> None:
    driver = FakeDriver(Echo())
    driver.negotiate()
    queue = FakeQueue(driver, 1, 16, 0x1000)
    queue.size, queue.table, queue.available, queue.used_ring = size, table, available, used
    driver.enable(queue)
    assert driver.read(reg.QUEUE_READY) == 0
    assert driver.device.counters == {"queue_set_up": 1}


def test_rings_in_use_do_not_move() -> None:
    driver = FakeDriver(Echo()).start()
    driver.write(reg.QUEUE_SEL, 0)
    driver.write(reg.QUEUE_DESC_LOW, 0x8_0000)
    driver.write(reg.QUEUE_NUM, 2)
    assert driver.request([b"here"], [4]) == b"here"
    assert driver.device.counters == {"queue_moved_while_ready": 2}


def test_a_queue_is_taken_out_of_use() -> None:
    driver = FakeDriver(Echo()).start()
    driver.write(reg.QUEUE_SEL, 0)
    driver.write(reg.QUEUE_READY, 0)
    assert driver.request([b"a"], [1]) is None
    assert driver.read(reg.QUEUE_READY) == 0


def test_a_notification_of_no_queue_is_counted() -> None:
    driver = FakeDriver(Echo()).start()
    driver.write(reg.QUEUE_NOTIFY, 2)
    driver.write(reg.QUEUE_NOTIFY, 0xFFFF_FFFF)
    assert driver.device.counters == {"notify_not_ready": 2}


# The interrupt


def test_the_line_is_high_until_all_is_acknowledged() -> None:
    driver = FakeDriver(Echo()).start()
    line = driver.board.lines[5]
    driver.request([b"a"], [1])
    driver.request([b"b"], [1])
    assert (driver.interrupt_status, line.level, line.edges) == (1, True, 1)
    driver.device.needs_reset("why")
    assert driver.interrupt_status == 3
    driver.write(reg.INTERRUPT_ACK, 1)
    assert (driver.interrupt_status, line.level, line.edges) == (2, True, 2)  # an edge for what is left
    driver.write(reg.INTERRUPT_ACK, 2)
    assert (driver.interrupt_status, line.level) == (0, False)
    driver.write(reg.INTERRUPT_ACK, 3)
    assert line.history == [True, False, True, False]


def test_an_event_gives_an_edge_for_each_new_cause() -> None:
    driver = FakeDriver(Echo(), events=True).start()
    event = driver.board.interrupt_events[5]
    driver.request([b"a"], [1])
    driver.request([b"b"], [1])
    assert event.signals == 1
    driver.device.needs_reset("why")
    assert event.signals == 1
    driver.write(reg.INTERRUPT_ACK, 1)
    assert event.signals == 2  # for what is left
    driver.write(reg.INTERRUPT_ACK, 2)
    assert event.signals == 2
    assert driver.board.lines[5].history == []


def test_without_irqfd_it_is_the_line() -> None:
    board = RecordingBoard()
    board.has_events, board.memory = True, buffer_memory()
    mmio = VirtioMmio(Echo(), 0xD000_0000, 7, irqfd=False, ioeventfd=False)
    mmio.attach(board)
    assert board.interrupt_events == {}
    assert board.write_events == {}
    mmio.config_notification()
    assert board.lines[7].level


# Notifications by ioeventfd


def test_each_queue_has_its_event() -> None:
    driver = FakeDriver(Echo(), events=True).start()
    address = driver.mmio.address
    assert address is not None
    notify = address + reg.QUEUE_NOTIFY
    assert set(driver.board.write_events) == {("mmio", notify, 4, 0), ("mmio", notify, 4, 1)}
    queue = driver.queues[1]
    queue.add([b"a"], [1])
    driver.board.write_events["mmio", notify, 4, 1].call()
    assert [answer for _, _, answer in queue.used()] == [b"a"]
    driver.mmio.close()
    assert all(event.closed for event in driver.board.write_events.values())
    assert driver.board.interrupt_events[5].closed


def test_a_bug_of_the_device_is_told_to_guest_and_host() -> None:
    echo = Echo()

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    echo.on_chain = fail
    driver = FakeDriver(echo, events=True).start()
    driver.queues[0].add([b"a"])
    with pytest.raises(RuntimeError, match="a bug"):  # the host input thread keeps it in `host_errors`
        next(iter(driver.board.write_events.values())).call()
    assert driver.status & DeviceStatus.DEVICE_NEEDS_RESET


# Legacy (section 4.2.4)


class LegacyDriver(FakeDriver):
    """Begins as a driver of before version 1 does: no FEATURES_OK, a page number for the queue."""

    def __init__(self, device: VirtioDevice) -> None:
        super().__init__(device, legacy=True)

    def begin(self, *, page: int = 0x1000, align: int = 0x1000, size: int = 16) -> FakeQueue:
        self.write(reg.GUEST_PAGE_SIZE, page)  # before the reset: so does Linux
        self.write(reg.STATUS, 0)
        self.write(reg.STATUS, ACKNOWLEDGE_DRIVER)
        self.write(reg.DRIVER_FEATURES_SEL, 0)
        self.write(reg.DRIVER_FEATURES, 0xFFFF_FFFF & ~(1 << 29))
        queue = FakeQueue(self, 0, 16, 0x1000)
        queue.available, queue.used_ring = (
            0x1100,
            0x2000,
        )  # 2.7.2: right behind the table; at the next multiple of align
        self.write(reg.QUEUE_SEL, 0)
        self.write(reg.QUEUE_NUM, size)
        self.write(reg.QUEUE_ALIGN, align)
        self.write(reg.QUEUE_PFN, 0x1000 // page if page == 0x1000 else 1)
        self.queues = [queue]
        self.write(reg.STATUS, ACKNOWLEDGE_DRIVER | DeviceStatus.DRIVER_OK)
        return queue


def test_a_legacy_driver_is_served() -> None:
    driver = LegacyDriver(Echo())
    assert driver.read(reg.VERSION) == 1
    driver.begin()
    assert driver.read(reg.QUEUE_PFN) == 1
    assert driver.request([b"old"], [3]) == b"old"
    assert driver.device.accepted == 0b1001 | 1 << 28  # of all ones, what was offered
    assert driver.acknowledge() == 1


def test_it_is_offered_no_feature_beyond_31() -> None:
    assert LegacyDriver(Echo()).offered >> 32 == 0


def test_it_takes_a_queue_out_of_use_with_page_0() -> None:
    driver = LegacyDriver(Echo())
    driver.begin()
    driver.write(reg.QUEUE_PFN, 0)
    assert driver.read(reg.QUEUE_PFN) == 0
    assert driver.request([b"old"], [3]) is None


@pytest.mark.parametrize(
    ("page", "align", "size"),
    [(0, 0x1000, 16), (0x1800, 0x1000, 16), (0x1000, 0, 16), (0x1000, 3, 16), (0x1000, 1, 512)],
)
def test_what_cannot_be_is_refused(page: int, align: int, size: int) -> None:
    driver = LegacyDriver(Echo())
    driver.begin(page=page, align=align, size=size)
    assert driver.read(reg.QUEUE_PFN) == 0
    assert driver.device.counters["queue_set_up"] == 1


def test_a_legacy_device_is_restored_with_its_queue() -> None:
    driver = LegacyDriver(Keeper())
    queue = driver.begin()
    queue.add([b"old"], [3])
    queue.kick()
    echo = Echo()
    other = FakeDriver(echo, legacy=True, memory=driver.memory)
    other.mmio.restore(driver.mmio.state())
    other.write(reg.QUEUE_SEL, 0)
    assert other.read(reg.QUEUE_PFN) == 1
    other.mmio.resume()
    other.board.timers[0].call()
    assert echo.handled == [b"old"]


# Its place


def test_linux_is_told_where_it_is() -> None:
    first = VirtioMmio(Entropy(), 0xD000_0000, 5)
    second = VirtioMmio(Entropy(), 0x2_0000_0000, 11)
    assert first.linux_parameter == "virtio_mmio.device=0x200@0xd0000000:5"
    assert linux_parameters([first, object(), second]) == (
        "virtio_mmio.device=0x200@0xd0000000:5 virtio_mmio.device=0x200@0x200000000:11"
    )


def test_without_a_place_it_says_so() -> None:
    mmio = VirtioMmio(Entropy())
    for ask in (lambda: mmio.linux_parameter, mmio.regions):
        with pytest.raises(UsageError, match="virtio-entropy has no"):
            ask()


def test_one_transport_for_one_device() -> None:
    entropy = Entropy()
    VirtioMmio(entropy)
    with pytest.raises(UsageError, match="plugged in already"):
        VirtioMmio(entropy)
    with pytest.raises(UsageError, match="takes a virtio device"):
        VirtioMmio(RecordingBoard())  # type: ignore[arg-type]
