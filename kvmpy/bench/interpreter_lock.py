"""The cost of an exit while another Python thread computes: each return from KVM_RUN waits for the interpreter lock."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmpy.bench.exit_cost import machine_markers
from kvmpy.bench.rows import Row, Sampler, alternate
from kvmpy.bench.session import Session

__all__ = ["measure"]

EXITS = 150
MORE_EXITS = 1500
"""With the short interval and without a thread: enough that the thread gets its turns."""
SHORT_INTERVAL = 100e-6
"""Seconds, for sys.setswitchinterval; Python's default is 5 ms."""


def measure(session: Session) -> list[Row]:
    """A port write with a busy thread beside the machine, with both switch intervals, and without a thread."""
    count, more = session.count(EXITS), session.count(MORE_EXITS)
    rom, longer_rom = session.firmware("port write", count), session.firmware("port write", more)

    def beside_a_thread(rom: Path, count: int, interval: float) -> Sampler:
        def sample() -> float:
            with _busy_thread(interval):
                return machine_markers(rom) / count

        return sample

    default = sys.getswitchinterval()
    samplers: dict[str, Sampler] = {
        "default": beside_a_thread(rom, count, default),
        "short": beside_a_thread(longer_rom, more, SHORT_INTERVAL),
        "alone": lambda: machine_markers(longer_rom) / more,
    }
    taken = alternate(session.rounds, samplers)
    name = "port write beside a thread that computes"
    quiet = {"no such thread": taken["alone"]}
    return [
        Row.of(f"{name}, switch interval {default * 1e3:g} ms", "us", {"kvmpy": taken["default"], **quiet}),
        Row.of(f"{name}, switch interval {SHORT_INTERVAL * 1e6:g} us", "us", {"kvmpy": taken["short"], **quiet}),
    ]


@contextmanager
def _busy_thread(interval: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    ends = threading.Event()

    def compute() -> None:
        number = 0
        while not ends.is_set():
            number += 1

    thread = threading.Thread(target=compute, daemon=True)
    sys.setswitchinterval(interval)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()
        sys.setswitchinterval(before)
