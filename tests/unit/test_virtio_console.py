"""The console device, as a driver sees it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from kvmpy.errors import UsageError
from kvmpy.virtio import VirtioConsole
from kvmpy.virtio.console.device import ConsoleEvent, ConsoleFeature
from virtio_driver import FakeDriver

RECEIVE, TRANSMIT, TO_DRIVER, FROM_DRIVER = range(4)
_CONTROL = struct.Struct("<IHH")


class ConsoleDriver(FakeDriver):
    """A driver that knows ports, and keeps buffers for control messages available."""

    device: VirtioConsole

    def tell(self, number: int, event: ConsoleEvent, value: int) -> None:
        self.request([_CONTROL.pack(number, event, value)], queue=FROM_DRIVER)

    def told(self, buffers: int = 12) -> list[tuple[int, ConsoleEvent, int, bytes]]:
        """The control messages that have come, as (port, event, value, more)."""
        queue = self.queues[TO_DRIVER]
        for _ in range(buffers):
            queue.add(into=[32])
        queue.kick()
        messages = [data for _, _, data in queue.used()]
        return [
            (number, ConsoleEvent(event), value, data[_CONTROL.size :])
            for data in messages
            for number, event, value in [_CONTROL.unpack_from(data)]
        ]


def started(**options: object) -> ConsoleDriver:
    driver = ConsoleDriver(VirtioConsole(**options))  # type: ignore[arg-type]
    driver.start()
    return driver


def with_channels(*names: str) -> ConsoleDriver:
    """A console whose driver knows all ports."""
    driver = started(channels=names)
    driver.tell(0, ConsoleEvent.DEVICE_READY, 1)
    for number in range(len(names) + 1):
        driver.tell(number, ConsoleEvent.PORT_READY, 1)
    driver.told(16)
    return driver


# One terminal


def test_what_the_guest_writes_is_kept_passed_on_and_found() -> None:
    passed: list[bytes] = []
    driver = started(sink=passed.append)
    console = driver.device
    assert driver.request([b"Hello, ", b"w\xc3\xb6rld\n# "], queue=TRANSMIT) == b""
    assert (console.output, console.text) == (b"Hello, w\xc3\xb6rld\n# ", "Hello, wörld\n# ")
    assert passed == [b"Hello, w\xc3\xb6rld\n# "]
    assert console.expect("# ", timeout=0)
    console.connect_sink(None)
    driver.request([b"more"], queue=TRANSMIT)
    assert len(passed) == 1


def test_lines_are_told_one_by_one() -> None:
    lines: list[bytes] = []
    driver = started()
    driver.device.ports[0].on_line(lines.append)
    for data in (b"a", b"b\nc\rd\n", b"", b"e", b"\n\nf"):
        driver.request([data], queue=TRANSMIT)
    assert lines == [b"ab\n", b"c\rd\n", b"e\n", b"\n"]


def test_giant_output_is_cut_and_others_have_their_turn() -> None:
    taken = 0

    def sink(data: bytes) -> None:
        nonlocal taken
        taken += len(data)

    driver = started(sink=sink)
    queue = driver.queues[TRANSMIT]
    page = driver.place(bytes(0x1_0000))
    table = b"".join(struct.pack("<QIHH", page, 0x1_0000, at < 1023, at + 1) for at in range(1024))  # 64 MiB
    queue.desc(0, driver.place(table, 16), len(table), 4)
    for _ in range(8):
        queue.make_available(0)
    queue.kick()
    assert (len(queue.used()), taken) == (1, 16 << 20)
    assert driver.device.counters == {"giant_output": 1}
    for number in range(2, 10):
        driver.board.timers[0].call()  # what the host input thread does
        assert taken == min(number, 8) * 16 << 20


def test_what_is_sent_waits_for_buffers_and_fills_them() -> None:
    driver = started()
    driver.device.send("hällo")
    assert driver.device.ports[0].unread == 6
    assert driver.request(into=[2, 2]) == b"h\xc3\xa4l"
    assert driver.request(into=[100]) == b"lo"
    queue = driver.queues[RECEIVE]
    queue.add(into=[10])
    queue.kick()
    assert queue.used() == []
    driver.device.send(b"x")
    assert [data for _, _, data in queue.used()] == [b"x"]
    assert driver.device.ports[0].unread == 0


def test_a_buffer_without_room_is_given_back() -> None:
    driver = started()
    driver.device.send(b"x")
    assert driver.request([b"readable"]) == b""
    assert driver.device.counters["no_room"] == 1
    assert driver.request(into=[1]) == b"x"


def test_input_comes_from_a_descriptor() -> None:
    driver = started()
    read_end, write_end = os.pipe()
    try:
        driver.device.connect_input(read_end)
        (source,) = driver.board.inputs
        os.write(write_end, b"typed")
        assert source.ready()
        assert driver.request(into=[8]) == b"typed"
        driver.device.connect_input(None)
        assert driver.board.inputs == []
    finally:
        os.close(read_end)
        os.close(write_end)


def test_the_size_is_in_the_configuration_and_changes() -> None:
    driver = started(size=(132, 43))
    assert (driver.config(0, 2), driver.config(2, 2), driver.config(4, 4)) == (132, 43, 1)
    driver.acknowledge()
    driver.device.resize(100, 30)
    assert (driver.config(0, 2), driver.config(2, 2)) == (100, 30)
    assert driver.acknowledge() == 2  # configuration change
    for size in ((0, 25), (80, 1 << 16)):
        with pytest.raises(UsageError):
            driver.device.resize(*size)


def test_a_driver_is_told_of_the_size_in_its_first_pauses() -> None:
    driver = ConsoleDriver(VirtioConsole())
    (reminder,) = (timer for timer in driver.board.timers if timer.call == driver.device._remind)
    assert reminder.deadline is None
    driver.start()
    for _ in range(6):
        assert reminder.deadline is not None
        assert driver.acknowledge() == 0
        reminder.call()
        reminder.stop()
        assert driver.acknowledge() == 2  # configuration change
        driver.request([b"more"], queue=TRANSMIT)
        driver.acknowledge()
    assert reminder.deadline is None
    driver.start()
    assert reminder.deadline is not None


def test_a_driver_that_knows_no_sizes_is_told_of_none() -> None:
    driver = ConsoleDriver(VirtioConsole())
    driver.start(without=(ConsoleFeature.SIZE,))
    driver.request([b"text"], queue=TRANSMIT)
    assert all(timer.deadline is None for timer in driver.board.timers if timer.call == driver.device._remind)


def test_a_driver_that_knows_ports_gets_the_size_as_a_message_only() -> None:
    driver = ConsoleDriver(VirtioConsole(channels=("agent",)))
    driver.start()
    driver.request([b"text"], queue=TRANSMIT)
    assert all(timer.deadline is None for timer in driver.board.timers if timer.call == driver.device._remind)


def test_an_emergency_character_needs_no_set_up() -> None:
    driver = ConsoleDriver(VirtioConsole())
    for character in b"oops":
        driver.write(0x100 + 8, character)
    assert driver.device.text == "oops"
    driver.write(0x100, 7, size=2)
    assert driver.device.counters["config_write"] == 1
    assert driver.config(0, 2) == 80


def test_one_terminal_offers_no_ports() -> None:
    assert not started().device.has_feature(ConsoleFeature.MULTIPORT)
    assert len(started().device.queues) == 2


# Channels


def test_ports_are_added_named_and_opened() -> None:
    driver = started(channels=("agent", "log"), size=(100, 30))
    assert driver.config(4, 4) == 3
    assert driver.told() == []
    driver.tell(0, ConsoleEvent.DEVICE_READY, 1)
    assert driver.told(1) == [(number, ConsoleEvent.DEVICE_ADD, 1, b"") for number in range(3)]
    driver.tell(0, ConsoleEvent.PORT_READY, 1)
    driver.tell(2, ConsoleEvent.PORT_READY, 1)
    assert driver.told(1) == [
        (0, ConsoleEvent.CONSOLE_PORT, 1, b""),
        (0, ConsoleEvent.RESIZE, 0, struct.pack("<HH", 100, 30)),
        (0, ConsoleEvent.PORT_OPEN, 1, b""),
        (2, ConsoleEvent.PORT_NAME, 1, b"log"),
        (2, ConsoleEvent.PORT_OPEN, 1, b""),
    ]
    driver.device.resize(90, 20)
    assert driver.told(1) == [(0, ConsoleEvent.RESIZE, 0, struct.pack("<HH", 90, 20))]


def test_resize_messages_can_have_the_order_that_linux_had_until_2025() -> None:
    driver = started(channels=("agent",), size=(100, 30), rows_first=True)
    driver.tell(0, ConsoleEvent.PORT_READY, 1)
    assert (0, ConsoleEvent.RESIZE, 0, struct.pack("<HH", 30, 100)) in driver.told()


def test_a_channel_has_queues_of_its_own_and_waits_until_it_is_open() -> None:
    driver = with_channels("agent", "log")
    log = driver.device.channel("log")
    opened: list[bool] = []
    log.on_open = opened.append
    driver.request([b"to log"], queue=7)
    driver.request([b"to agent"], queue=5)
    driver.request([b"to terminal"], queue=1)
    assert [port.output for port in driver.device.ports] == [b"to terminal", b"to agent", b"to log"]
    log.send(b"for log")
    queue = driver.queues[6]
    queue.add(into=[16])
    queue.kick()
    assert queue.used() == []
    driver.tell(2, ConsoleEvent.PORT_OPEN, 1)
    assert [data for _, _, data in queue.used()] == [b"for log"]
    driver.tell(2, ConsoleEvent.PORT_OPEN, 0)
    assert opened == [True, False]


def test_channels_are_found_by_name() -> None:
    console = VirtioConsole(channels=("agent",))
    assert console.channel("agent").name == "agent"
    with pytest.raises(UsageError, match="agent"):
        console.channel("log")


@pytest.mark.parametrize("channels", [("a", "a"), ("",), tuple(map(str, range(31)))])
def test_impossible_channels_are_refused(channels: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        VirtioConsole(channels=channels)


@pytest.mark.parametrize(
    ("message", "counted"),
    [
        (b"\0" * 7, "short_control_message"),
        (_CONTROL.pack(2, ConsoleEvent.PORT_OPEN, 1), "unknown_port"),
        (_CONTROL.pack(1, 99, 1), "unknown_event"),
        (_CONTROL.pack(1, ConsoleEvent.CONSOLE_PORT, 1), "unknown_event"),
    ],
)
def test_bad_control_messages_are_counted(message: bytes, counted: str) -> None:
    driver = with_channels("agent")
    driver.request([message], queue=FROM_DRIVER)
    assert driver.device.counters == {counted: 1}


def test_a_driver_that_takes_no_messages_is_told_no_more_at_last() -> None:
    driver = started(channels=("agent",))
    for _ in range(600):
        driver.tell(0, ConsoleEvent.DEVICE_READY, 1)
    assert driver.device.counters["message_lost"] == 1200 - 1024
    assert len(driver.told(2)) == 2


def test_a_message_that_has_no_room_is_cut() -> None:
    driver = started(channels=("agent",))
    driver.tell(0, ConsoleEvent.DEVICE_READY, 1)
    assert driver.request(into=[4], queue=TO_DRIVER) == b"\0\0\0\0"
    assert driver.device.counters["message_cut"] == 1


# Life


@pytest.mark.parametrize("make", [started, lambda: with_channels("agent")], ids=["terminal", "channels"])
def test_a_restored_console_goes_on(make: Callable[[], ConsoleDriver]) -> None:
    driver = make()
    first = driver.device
    first.resize(99, 9)
    first.send(b"unread")
    if len(first.ports) > 1:
        driver.tell(1, ConsoleEvent.PORT_OPEN, 1)
        driver.tell(0, ConsoleEvent.PORT_OPEN, 1)
        first.resize(98, 8)
    first.quiesce()
    second = VirtioConsole(channels=[port.name for port in first.ports[1:]])
    heir = ConsoleDriver(second, memory=driver.memory)
    second.restore(first.state())
    heir.queues, heir._free = driver.queues, driver._free
    for queue in heir.queues:
        queue.driver = heir
    second.resume()
    assert second.state() == first.state()
    reminded = any(timer.deadline is not None for timer in heir.board.timers if timer.call == second._remind)
    assert reminded == (len(first.ports) == 1)  # it may not have seen the size yet
    assert heir.request(into=[16]) == b"unread"
    assert heir.request([b"new"], queue=TRANSMIT) == b""
    assert second.text == "new"
    if len(first.ports) > 1:
        assert heir.told(4) == [
            (0, ConsoleEvent.RESIZE, 0, struct.pack("<HH", 99, 9)),
            (0, ConsoleEvent.RESIZE, 0, struct.pack("<HH", 98, 8)),
        ]


def test_a_state_of_another_console_is_refused() -> None:
    driver = with_channels("a", "b")
    state = driver.device.state()
    state["device"]["ports"] = state["device"]["ports"][:1]
    with pytest.raises(UsageError, match="ports"):
        driver.device.restore(state)


def test_a_reset_keeps_what_was_sent() -> None:
    driver = with_channels("agent")
    driver.tell(1, ConsoleEvent.PORT_OPEN, 1)
    driver.device.channel("agent").send(b"later")
    driver.start()
    assert not driver.device.channel("agent").guest_open
    for event in (ConsoleEvent.PORT_READY, ConsoleEvent.PORT_OPEN):
        driver.tell(1, event, 1)
    assert driver.request(into=[9], queue=4) == b"later"


def test_closing_tells_who_waits() -> None:
    from kvmpy.devices import ExpectTimeout

    driver = started()
    driver.device.close()
    with pytest.raises(ExpectTimeout, match="closed"):
        driver.device.expect("never", timeout=5)
