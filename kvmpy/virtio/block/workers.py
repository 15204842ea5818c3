"""Threads that do what may wait for a disk, so that neither a vCPU nor the host input thread does."""

from __future__ import annotations

import threading
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from time import perf_counter

from kvmpy.virtio.chain import Chain

__all__ = ["Request", "Workers"]

_TOGETHER = 16
_SOON = 200e-6
"""So many quick requests, or so many seconds of them, are answered together: fewer interrupts."""

_WAITED = 500e-6
_BYTES_A_SECOND = 1e9
"""A transfer that took longer than these seconds, and than a copy takes, has waited for a disk."""


class Request:
    """What is to be done, for a chain or by itself. `action()` does it; `slow`: it is known to wait for a disk."""

    __slots__ = ("action", "chain", "length", "slow", "status")

    def __init__(self, chain: Chain | None, action: Callable[[], None], length: int, slow: bool) -> None:
        self.chain = chain
        self.action = action
        self.length = length
        self.slow = slow
        self.status = 0


class Workers:
    """At most `most` threads, started as they are needed, that `perform` requests and `answer` those that are done.

    How many work at once. Threads in Python help each other only while they wait in the kernel. So one thread does
    what is quick, such as writes into the host's page cache, one request after the other, and others join it when a
    request is known to wait for a disk, or when transfers have lately done so.
    """

    def __init__(
        self, name: str, most: int, perform: Callable[[Request], None], answer: Callable[[list[Request]], None]
    ) -> None:
        self._name, self._most = name, most
        self._perform, self._answer = perform, answer
        self._lock = allocate_lock()
        self._waiting: deque[Request] = deque()
        self._calls: SimpleQueue[bool] = SimpleQueue()  # True: a thread is to work; False: to end
        self._working = 0
        self._threads: list[threading.Thread] = []
        self._waits = False
        self._closed = False

    def submit(self, requests: Iterable[Request]) -> None:
        """Have them done."""
        with self._lock:
            self._waiting.extend(requests)
            if not self._working:
                self._call()

    def _call(self) -> None:
        """Let one more thread work. With the lock."""
        if self._closed:
            return
        self._working += 1
        self._calls.put(True)
        if len(self._threads) < self._working:
            thread = threading.Thread(target=self._run, name=f"{self._name} {len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self) -> None:
        while self._calls.get():
            self._work()

    def _work(self) -> None:
        done: list[Request] = []
        spent = 0.0
        while True:
            with self._lock:
                request = self._waiting.popleft() if self._waiting else None
                if request is None:
                    if not done:
                        self._working -= 1
                        return
                elif (request.slow or self._waits) and self._waiting and self._working < self._most:
                    self._call()
            if request is not None:
                start = perf_counter()
                self._perform(request)
                took = perf_counter() - start
                done.append(request)
                spent += took
                if not request.slow:
                    self._waits = took > _WAITED + request.length / _BYTES_A_SECOND
            if request is None or request.slow or spent > _SOON or len(done) >= _TOGETHER:
                self._answer(done)
                done, spent = [], 0.0

    def close(self) -> None:
        """End the threads, when they have done what was submitted."""
        with self._lock:
            threads, self._closed = self._threads, True
            for _ in threads:
                self._calls.put(False)
        for thread in threads:
            thread.join()
