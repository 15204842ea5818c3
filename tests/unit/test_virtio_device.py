"""What a driver and a device agree on, how they begin and end, and what is saved of them."""

from __future__ import annotations

import threading
import time

import pytest

from kvmpy.errors import UsageError
from kvmpy.virtio import DeviceStatus, Entropy, Feature, VirtioMmio, device
from kvmpy.virtio import mmio_registers as reg
from virtio_devices import Echo, Keeper
from virtio_driver import FakeDriver, FakeQueue

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = DeviceStatus
VERSION_1 = 1 << Feature.VERSION_1


def keeping(*requests: bytes) -> tuple[FakeDriver, Keeper, FakeQueue]:
    """A device that has taken these requests, and answered none."""
    keeper = Keeper()
    driver = FakeDriver(keeper).start()
    queue = driver.queues[0]
    for data in requests:
        queue.add([data], [len(data)])
    queue.kick()
    assert len(keeper.kept) == len(requests)
    return driver, keeper, queue


# Features (sections 2.2 and 3.1.1)


def test_a_device_offers_its_features_and_those_of_the_queues() -> None:
    offered = FakeDriver(Echo()).offered
    assert offered == 0b1001 | 1 << 28 | 1 << 29 | VERSION_1 | 1 << Feature.RING_RESET


def test_a_driver_accepts_what_it_likes_of_it() -> None:
    driver = FakeDriver(Echo())
    assert driver.negotiate(without=[3]) & FEATURES_OK
    assert driver.device.has_feature(0)
    assert not driver.device.has_feature(3)


@pytest.mark.parametrize(
    ("features", "what"),
    [
        (VERSION_1 | 1 << 5, "not offered"),
        (0b1, "without VERSION_1"),
        (VERSION_1 | 0b1000, "3 without 0, which the device does not accept"),
        (VERSION_1 | 1 << Feature.RING_PACKED, "packed queues"),
    ],
)
def test_features_that_do_not_fit_are_refused(features: int, what: str) -> None:
    driver = FakeDriver(Echo())
    driver.write(reg.STATUS, ACKNOWLEDGE | DRIVER)
    driver.accept(features)
    driver.write(reg.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert driver.status == ACKNOWLEDGE | DRIVER, what
    assert driver.device.counters == {"features_refused": 1}
    driver.accept(VERSION_1)  # 3.1.1: it may try others
    driver.write(reg.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert driver.status & FEATURES_OK


def test_after_features_ok_none_can_be_added() -> None:
    driver = FakeDriver(Echo())
    driver.negotiate(without=[0, 3])
    driver.accept(VERSION_1 | 1)
    assert not driver.device.has_feature(0)
    assert driver.device.counters["features_too_late"] == 2


# Status (section 2.1)


def test_driver_ok_needs_features_ok() -> None:
    driver = FakeDriver(Echo())
    driver.write(reg.STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert driver.status == ACKNOWLEDGE | DRIVER
    assert driver.device.counters == {"driver_ok_without_features_ok": 1}


def test_bits_are_only_added_and_never_those_of_the_device() -> None:
    driver = FakeDriver(Echo()).start()
    driver.write(reg.STATUS, ACKNOWLEDGE | NEEDS_RESET | 0x30)
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert driver.device.counters == {"status_bit_cleared": 1}
    assert driver.request([b"works"], [5]) == b"works"


def test_after_failed_nothing_is_used() -> None:
    driver = FakeDriver(Echo()).start()
    driver.write(reg.STATUS, driver.status | FAILED)
    assert driver.request([b"a"], [1]) is None
    driver.start()
    assert driver.request([b"a"], [1]) == b"a"


def test_the_device_is_told_when_it_starts_and_stops() -> None:
    echo = Echo()
    driver = FakeDriver(echo).start()
    assert echo.calls == ["stopped", "started"]  # a driver begins with a reset
    driver.write(reg.STATUS, 0)
    assert echo.calls == ["stopped", "started", "stopped"]


def test_needs_reset_is_told_once_and_only_to_a_driver_that_runs() -> None:
    echo = Echo()
    driver = FakeDriver(echo)
    echo.needs_reset("why")
    assert (driver.status, driver.interrupt_status) == (NEEDS_RESET, 0)
    driver.start()
    echo.needs_reset("why")
    assert driver.acknowledge() == 2
    echo.needs_reset("why")
    assert driver.acknowledge() == 0
    assert echo.counters == {"why": 3}


def test_a_reset_forgets_everything() -> None:
    driver = FakeDriver(Echo()).start()
    driver.request([b"a"], [1])
    driver.write(reg.STATUS, 0)
    assert driver.status == 0
    assert driver.interrupt_status == 0
    assert driver.device.accepted == 0
    assert not any(queue.ready for queue in driver.device.queues)


# Chains in flight at a reset (section 2.4)


def test_a_reset_waits_for_a_worker_that_still_uses_guest_memory() -> None:
    driver, keeper, _ = keeping(b"slow")

    def work() -> None:
        time.sleep(0.05)
        keeper.answer()

    thread = threading.Thread(target=work)
    thread.start()
    driver.write(reg.STATUS, 0)
    assert not keeper.kept
    assert driver.status == 0
    thread.join()


def test_a_reset_that_waits_too_long_ends_with_the_last_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "RESET_PATIENCE", 0.01)
    driver, keeper, _ = keeping(b"one", b"two")
    driver.write(reg.STATUS, 0)
    assert driver.status & DRIVER_OK  # 2.4.2: not 0, so not over
    driver.write(reg.STATUS, ACKNOWLEDGE)
    assert keeper.counters == {"slow_reset": 1, "status_during_reset": 1}
    keeper.answer()
    assert driver.status & DRIVER_OK
    keeper.answer()
    assert driver.status == 0
    driver.start()
    keeper.on_chain = keeper.echo
    assert driver.request([b"again"], [5]) == b"again"


def test_a_device_may_give_chains_back_when_it_is_asked_to() -> None:
    class Willing(Keeper):
        def cancel(self) -> None:
            while self.kept:
                self.kept.pop().complete(0)

    keeper = Willing()
    driver = FakeDriver(keeper).start()
    driver.request([b"a"], [1])
    assert keeper.queues[0].in_flight == 1
    driver.write(reg.STATUS, 0)
    assert (driver.status, keeper.queues[0].in_flight) == (0, 0)


# Reset of a queue (section 2.6.1)


def test_one_queue_is_reset_and_set_up_elsewhere() -> None:
    driver = FakeDriver(Echo()).start()
    driver.request([b"a"], [1])
    driver.write(reg.QUEUE_SEL, 0)
    driver.write(reg.QUEUE_RESET, 1)
    assert (driver.read(reg.QUEUE_RESET), driver.read(reg.QUEUE_READY)) == (0, 0)
    assert driver.request([b"b"], [1]) is None
    assert driver.request([b"other"], [5], queue=1) == b"other"
    again = driver.set_up_queue(0, 8)
    again.add([b"c"], [1])
    again.kick()
    assert [answer for _, _, answer in again.used()] == [b"c"]


def test_without_the_feature_it_is_not() -> None:
    driver = FakeDriver(Echo()).start(without=[Feature.RING_RESET])
    driver.write(reg.QUEUE_SEL, 0)
    driver.write(reg.QUEUE_RESET, 1)
    assert driver.device.counters == {"register_write": 1}
    assert driver.request([b"b"], [1]) == b"b"


def test_queues_that_are_reset_at_the_same_time_wait_each_for_its_own_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "RESET_PATIENCE", 60)
    driver, keeper, _ = keeping(b"one")
    driver.queues[1].add([b"two"])
    driver.queues[1].kick()
    resets = [threading.Thread(target=keeper.reset_queue, args=(index,)) for index in (0, 1)]
    for thread in resets:
        thread.start()
    while keeper.waiting_for_chains < 2:
        time.sleep(0.001)
    for thread, chain in zip(resets, list(keeper.kept), strict=True):
        chain.complete(0)
        thread.join(20)
        assert not thread.is_alive()
    assert not keeper.waiting_for_chains
    assert not driver.status & NEEDS_RESET


# Configuration space (section 2.5)


def test_the_configuration_is_read_at_any_width() -> None:
    driver = FakeDriver(Echo())
    assert driver.config(0, 8) == 0x1122334455667788
    assert [driver.config(at, 1) for at in (0, 8, 12)] == [0x88, 0xCC, 0xDD]
    assert driver.config(2, 4) == 0x33445566
    assert driver.config(11, 4) == 0x0000DD99
    assert driver.config(13, 4) == driver.config(0xFC, 4) == 0


def test_a_change_counts_the_generation_up_and_is_told() -> None:
    echo = Echo()
    driver = FakeDriver(echo)
    before = driver.read(reg.CONFIG_GENERATION)
    with echo.changing_config():
        echo.config.limit = 5
    assert driver.read(reg.CONFIG_GENERATION) == before + 1
    assert driver.interrupt_status == 0  # nobody is there to be told
    driver.start()
    with echo.changing_config():
        echo.config.limit = 6
    assert driver.config(8, 4) == 6
    assert driver.read(reg.CONFIG_GENERATION) == before + 2
    assert driver.acknowledge() == 2


def test_a_guests_write_goes_to_the_device_or_is_counted() -> None:
    echo = Echo()
    driver = FakeDriver(echo)
    driver.write(reg.CONFIG + 12, 0x7F, 1)
    driver.write(reg.CONFIG + 1, 0x1234, 2)
    assert echo.written == [(12, b"\x7f"), (1, b"\x34\x12")]
    driver.write(reg.CONFIG + 12, 0, 2)  # over its end
    assert echo.counters == {"config_write": 1}
    entropy = FakeDriver(Entropy())
    entropy.write(reg.CONFIG, 1)
    assert entropy.device.counters == {"config_write": 1}
    assert entropy.config(0, 4) == 0


# State


def test_a_device_is_saved_and_restored_and_goes_on() -> None:
    driver = FakeDriver(Echo()).start()
    assert driver.request([b"a"], [1]) == b"a"
    driver.mmio.quiesce()
    state = driver.mmio.state()
    echo = Echo()
    other = FakeDriver(echo, memory=driver.memory)
    other.mmio.restore(state)
    assert other.mmio.state() == state
    assert other.interrupt_status == 1
    assert other.board.lines[5].level
    assert echo.count == 1
    other.queues = driver.queues
    for queue in other.queues:
        queue.driver = other
    other._free = driver._free
    assert other.request([b"b"], [1]) is None  # until it resumes
    other.mmio.resume()
    other.board.timers[0].call()
    assert other.queues[0].used()[-1][2] == b"b"
    assert other.request([b"c"], [1]) == b"c"


def test_requests_in_flight_are_handled_again_after_a_restore_before_all_others() -> None:
    driver, _, queue = keeping(b"one", b"two", b"three")
    queue.add([b"four"], [4])
    state = driver.mmio.state()
    echo = Echo()
    other = FakeDriver(echo, memory=driver.memory)
    other.mmio.restore(state)
    other.mmio.resume()
    other.board.timers[0].call()
    assert echo.handled == [b"one", b"two", b"three", b"four"]
    assert [answer for _, _, answer in queue.used()] == [b"one", b"two", b"three", b"four"]


def test_quiesce_waits_for_what_is_in_flight() -> None:
    driver, keeper, queue = keeping(b"a")
    timer = threading.Timer(0.05, keeper.answer)
    timer.start()
    driver.mmio.quiesce()
    assert [answer for _, _, answer in queue.used()] == [b"a"]
    assert driver.request([b"b"], [1]) is None
    keeper.on_chain = keeper.echo
    driver.mmio.resume()
    driver.board.timers[0].call()
    assert [answer for _, _, answer in queue.used()][-1] == b"b"


def test_quiesce_says_when_it_has_waited_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "RESET_PATIENCE", 0.01)
    driver, keeper, queue = keeping(b"a")
    with pytest.raises(UsageError, match="still in flight"):
        driver.mmio.quiesce()
    keeper.answer()
    assert len(queue.used()) == 1


def test_what_the_driver_notifies_of_while_quiesce_waits_in_vain_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "RESET_PATIENCE", 0.01)
    driver, keeper, queue = keeping(b"a")

    def cancel() -> None:
        queue.add([b"b"], [1])
        queue.kick()
        assert len(keeper.kept) == 1

    monkeypatch.setattr(keeper, "cancel", cancel)
    with pytest.raises(UsageError, match="still in flight"):
        driver.mmio.quiesce()
    driver.board.timers[0].call()  # what the host input thread does
    assert len(keeper.kept) == 2


def test_a_device_that_is_restored_in_the_midst_of_a_reset_is_not_reset_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "RESET_PATIENCE", 0.01)
    driver, keeper, queue = keeping(b"a")
    state = driver.mmio.state()
    driver.write(reg.STATUS, 0)
    assert keeper.resetting
    (late,) = keeper.kept
    driver.mmio.restore(state)
    driver.mmio.resume()
    driver.board.timers[0].call()
    late.complete(0)  # of the time before
    assert driver.status & DRIVER_OK
    assert not keeper.waiting_for_chains
    keeper.answer(-1)
    assert [answer for _, _, answer in queue.used()] == [b"a"]


def test_a_state_of_another_device_or_memory_is_refused() -> None:
    state = FakeDriver(Echo()).start().mmio.state()
    with pytest.raises(UsageError, match="2 queues"):
        FakeDriver(Entropy()).mmio.restore(state)
    with pytest.raises(UsageError, match="not plugged in"):
        VirtioMmio(Echo()).restore(state)
    short = state | {"device": state["device"] | {"config": state["device"]["config"][:-1]}}
    with pytest.raises(UsageError, match="12 bytes of configuration"):
        FakeDriver(Echo()).mmio.restore(short)  # nor is memory behind those bytes shown to a guest
    state["device"]["queues"][0]["addresses"][0] = 1 << 40
    with pytest.raises(UsageError, match="not in this guest's memory"):
        FakeDriver(Echo()).mmio.restore(state)


# The entropy device (section 5.4)


def test_the_entropy_device_fills_what_it_is_given() -> None:
    driver = FakeDriver(Entropy()).start()
    first, second = driver.request([], [32, 32]), driver.request([], [64])
    assert first is not None
    assert second is not None
    assert len(first) == len(second) == 64
    assert first != second


def test_it_answers_a_giant_request_in_part() -> None:
    asked: list[int] = []

    def source(length: int) -> bytes:
        asked.append(length)
        return bytes(length)

    driver = FakeDriver(Entropy(source)).start()
    queue = driver.queues[0]
    queue.desc(0, 0x5_0000, 0xA_0000, 2)
    queue.make_available(0)
    queue.kick()
    assert asked == [0x1_0000]
    assert [length for _, length, _ in queue.used()] == [0x1_0000]


def test_it_counts_requests_with_something_to_read() -> None:
    driver = FakeDriver(Entropy(bytes)).start()
    assert driver.request([b"why"], [2]) == b"\0\0"
    assert driver.device.counters == {"readable_buffer": 1}
