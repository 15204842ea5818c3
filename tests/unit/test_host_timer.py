"""Timers of the host input thread: in order, replaced, stopped, and beside input."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from kvmpy.devices.host_input import InputStream
from kvmpy.machine.host_events import HostEvents
from kvmpy.machine.host_timer import TimerQueue

PATIENCE = 10


@pytest.fixture
def events() -> Iterator[HostEvents]:
    events = HostEvents()
    yield events
    events.close()


def host_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvmpy host input"]


def test_a_timer_calls_once_in_the_host_input_thread(events: HostEvents) -> None:
    called: list[str] = []
    rung = threading.Event()

    def call() -> None:
        called.append(threading.current_thread().name)
        rung.set()

    begin = time.monotonic()
    events.timer(call).start(begin + 0.02)
    assert rung.wait(PATIENCE)
    assert time.monotonic() >= begin + 0.02
    time.sleep(0.05)
    assert called == ["kvmpy host input"]


def test_a_timer_that_is_not_set_starts_no_thread(events: HostEvents) -> None:
    before = len(host_threads())
    timer = events.timer(lambda: None)
    timer.stop()
    assert len(host_threads()) == before
    timer.start(time.monotonic() + 1000)
    assert len(host_threads()) == before + 1


def test_timers_call_in_the_order_of_their_moments_though_set_in_another(events: HostEvents) -> None:
    called: list[int] = []
    rung = threading.Event()
    now = time.monotonic()
    late = events.timer(lambda: called.append(3))
    events.timer(rung.set).start(now + 0.15)
    events.timer(lambda: called.append(1)).start(now + 0.05)  # the thread sleeps until then
    late.start(now + 0.12)
    events.timer(lambda: called.append(0)).start(now + 0.01)  # and has to be woken for this
    events.timer(lambda: called.append(2)).start(now + 0.08)
    assert rung.wait(PATIENCE)
    assert called == [0, 1, 2, 3]


def test_a_timer_set_again_keeps_the_last_moment_only(events: HostEvents) -> None:
    called: list[float] = []
    rung = threading.Event()

    def call() -> None:
        called.append(time.monotonic())
        rung.set()

    timer = events.timer(call)
    last = time.monotonic() + 0.4
    timer.start(time.monotonic() + 0.2)
    timer.start(time.monotonic() + 1000)
    timer.start(last)
    assert rung.wait(PATIENCE)
    assert len(called) == 1
    assert called[0] >= last


def test_a_timer_that_is_stopped_does_not_call(events: HostEvents) -> None:
    called: list[int] = []
    rung = threading.Event()
    timer = events.timer(lambda: called.append(1))
    timer.start(time.monotonic() + 0.2)
    timer.stop()
    events.timer(rung.set).start(time.monotonic() + 0.25)
    assert rung.wait(PATIENCE)
    assert not called


def test_a_timer_may_set_itself_again(events: HostEvents) -> None:
    rung = threading.Event()
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        if count == 5:
            rung.set()
        else:
            timer.start(time.monotonic())

    timer = events.timer(call)
    timer.start(time.monotonic())
    assert rung.wait(PATIENCE)
    assert count == 5


def test_a_timer_whose_call_fails_is_kept_as_an_error_and_others_go_on(events: HostEvents) -> None:
    rung = threading.Event()
    failing = events.timer(lambda: 1 // 0)
    failing.start(time.monotonic())
    events.timer(rung.set).start(time.monotonic() + 0.02)
    assert rung.wait(PATIENCE)
    ((source, error),) = events.errors
    assert source is failing
    assert isinstance(error, ZeroDivisionError)


def test_input_comes_while_timers_wait(events: HostEvents) -> None:
    reader, writer = os.pipe()
    came = threading.Event()
    try:
        events.timer(lambda: None).start(time.monotonic() + 1000)
        events.add(InputStream(reader, lambda data: came.set()))
        os.write(writer, b"x")
        assert came.wait(PATIENCE)
    finally:
        events.close()
        os.close(reader)
        os.close(writer)


def test_after_the_end_timers_neither_call_nor_fail() -> None:
    events = HostEvents()
    called: list[int] = []
    timer = events.timer(lambda: called.append(1))
    timer.start(time.monotonic() + 0.2)
    events.close()
    timer.start(time.monotonic())
    timer.stop()
    time.sleep(0.25)
    assert not called


def test_setting_a_timer_often_leaves_nothing_behind_and_wakes_only_when_it_must() -> None:
    wakes: list[int] = []
    queue = TimerQueue(lambda: wakes.append(1))
    events = HostEvents()
    timer = events.timer(lambda: None)
    for _ in range(1000):
        queue.set(timer, time.monotonic() + 1000)
        queue.pause()
    assert not wakes[1:]
    queue.set(timer, time.monotonic())
    assert len(queue.take_due()) == 1
    assert queue.pause() is None
