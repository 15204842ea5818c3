"""Worker threads, the host input thread and a driver at the same time: nothing is lost, doubled, or left hanging."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import pytest

from kvmpy.virtio import Chain, Feature, Virtqueue
from kvmpy.virtio import mmio_registers as reg
from virtio_devices import Echo
from virtio_driver import FakeDriver, FakeQueue

ROUNDS = 150


class Worked(Echo):
    """Echoes in worker threads, now and then a little later."""

    features = frozenset({0, 3, Feature.IN_ORDER})

    def __init__(self, workers: int = 3) -> None:
        super().__init__()
        self.on_chain = lambda queue, chain: self.requests.put(chain)
        self.requests: SimpleQueue[Chain | None] = SimpleQueue()
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self.work, args=(number,)) for number in range(workers)]
        for thread in self.threads:
            thread.start()

    def work(self, seed: int) -> None:
        chance = random.Random(seed)
        while (chain := self.requests.get()) is not None:
            if not chance.randrange(8):
                time.sleep(0.001)
            try:
                if chance.randrange(2):
                    self.echo(chain.queue, chain)
                else:
                    with chain.queue.batch():
                        self.echo(chain.queue, chain)
            except BaseException as error:
                self.errors.append(error)

    def close(self) -> None:
        for _ in self.threads:
            self.requests.put(None)
        for thread in self.threads:
            thread.join()


@contextmanager
def worked(without: list[int]) -> Iterator[tuple[FakeDriver, Worked]]:
    device = Worked()
    driver = FakeDriver(device).start(without=without)
    try:
        yield driver, device
    finally:
        driver.mmio.close()
    assert device.errors == []


def wait_for(queue: FakeQueue, count: int) -> list[bytes]:
    """The next `count` answers."""
    answers: list[bytes] = []
    deadline = time.monotonic() + 20
    while len(answers) < count:
        assert time.monotonic() < deadline, f"{len(answers)} of {count} answers came"
        answers += [answer for _, _, answer in queue.used()]
        time.sleep(0)
    return answers


@pytest.mark.parametrize("in_order", [False, True])
def test_every_request_is_answered_once(in_order: bool) -> None:
    with worked([] if in_order else [Feature.IN_ORDER]) as (driver, _):
        queue = driver.queues[0]
        for number in range(ROUNDS):
            data = [bytes([number, at]) for at in range(8)]
            for one in data:
                queue.add([one], [2])
            queue.kick()
            answers = wait_for(queue, len(data))
            assert (answers if in_order else sorted(answers)) == data
        assert driver.device.queues[0].in_flight == 0


def test_resets_come_at_any_moment() -> None:
    chance = random.Random(1)
    with worked([]) as (driver, device):
        for number in range(ROUNDS):
            queue = driver.queues[0]
            for at in range(chance.randrange(1, 9)):
                queue.add([bytes([number, at])], [2])
            queue.kick()
            if chance.randrange(2):
                driver.write(reg.QUEUE_SEL, 0)
                driver.write(reg.QUEUE_RESET, 1)
            else:
                driver.write(reg.STATUS, 0)
                assert driver.status == 0
            # The driver has its buffers back: nobody may use them, or the rings, from here on.
            assert not device.queues[0].in_flight
            before = driver.memory.read(0, 0x10_0000)
            if not number % 16:
                time.sleep(0.003)
                assert driver.memory.read(0, 0x10_0000) == before
            driver.start()
        assert driver.request([b"end"], [3]) is None
        assert wait_for(driver.queues[0], 1) == [b"end"]
        assert device.counters["slow_reset"] == 0


def test_it_is_quiesced_and_resumed_under_way() -> None:
    with worked([Feature.IN_ORDER]) as (driver, device):
        queue = driver.queues[0]
        for number in range(ROUNDS):
            for at in range(6):
                queue.add([bytes([number, at])], [2])
            queue.kick()
            driver.mmio.quiesce()
            assert device.queues[0].in_flight == 0
            state = driver.mmio.state()
            assert state["device"]["queues"][0]["in_flight"] == []
            driver.mmio.resume()
            driver.board.timers[0].call()
            assert len(wait_for(queue, 6)) == 6


def test_notifications_come_from_several_threads() -> None:
    # As with ioeventfd and `process_later` in one thread and exits in others.
    with worked([Feature.IN_ORDER]) as (driver, device):
        queue = driver.queues[0]
        stop = threading.Event()

        def notify() -> None:
            while not stop.is_set():
                device.notify(0)

        threads = [threading.Thread(target=notify) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for number in range(ROUNDS // 3):  # the threads leave little time for anybody else
                data = [bytes([number, at]) for at in range(8)]
                for one in data:
                    queue.add([one], [2])
                assert sorted(wait_for(queue, len(data))) == data
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_a_handler_is_never_at_work_twice_at_a_time() -> None:
    inside = threading.Lock()

    class Alone(Echo):
        overlaps = 0

        def handle(self, queue: Virtqueue, chain: Chain) -> None:
            if not inside.acquire(blocking=False):
                self.overlaps += 1
                return
            time.sleep(0.001)
            inside.release()
            super().handle(queue, chain)

    device = Alone()
    driver = FakeDriver(device).start()
    queue = driver.queues[0]
    for _ in range(16):
        queue.add([b"a"], [1])
    threads = [threading.Thread(target=device.notify, args=(0,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert device.overlaps == 0
    assert len(queue.used()) == 16
