"""Threads that answer messages, each as it comes: a device whose requests may wait long leaves them to these."""

from __future__ import annotations

import threading
from _thread import allocate_lock
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

__all__ = ["MessageWorkers"]

T = TypeVar("T")


class MessageWorkers(Generic[T]):
    """At most `most` threads, each started when all others have something to do; `answer(message)` does the work.

    One message that waits for ever keeps one thread, and the others go on.
    """

    def __init__(self, name: str, most: int, answer: Callable[[T], object]) -> None:
        self._name, self._most, self._answer = name, most, answer
        self._lock = allocate_lock()
        self._messages: SimpleQueue[T | None] = SimpleQueue()  # None: end
        self._unfinished = 0
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, message: T) -> None:
        """Have it answered. After `close` it is not."""
        with self._lock:
            if self._closed:
                return
            self._unfinished += 1
            self._messages.put(message)
            if len(self._threads) < min(self._unfinished, self._most):
                thread = threading.Thread(target=self._run, name=f"{self._name} {len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _run(self) -> None:
        while (message := self._messages.get()) is not None:
            try:
                self._answer(message)
            finally:
                with self._lock:
                    self._unfinished -= 1

    def close(self) -> None:
        """End the threads, when they have answered what was submitted."""
        with self._lock:
            self._closed = True
            threads = self._threads
            for _ in threads:
                self._messages.put(None)
        for thread in threads:
            thread.join()
