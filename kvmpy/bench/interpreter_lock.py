"""The cost of an exit while another Python thread computes: each return from KVM_RUN waits for the interpreter lock.

The guest runs for a set time and its exits are counted, because there are two regimes that alternate: the machine has
the lock and loses it after an interval, or gets it back for one exit at a time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmpy.bench import guests
from kvmpy.bench.exit_cost import Register
from kvmpy.bench.rows import Row, alternate
from kvmpy.bench.session import Session
from kvmpy.boot import FirmwareImage
from kvmpy.machine import Machine

__all__ = ["measure"]

SECONDS = 0.25
FEWEST_ROUNDS = 5
SHORT_INTERVAL = 100e-6
"""Seconds, for sys.setswitchinterval; Python's default is 5 ms."""
_FOR_EVER = 0xFFFF_FFFF


def measure(session: Session) -> list[Row]:
    """A port write with a busy thread beside the machine, with both switch intervals, and without a thread."""
    rom, seconds = session.firmware("port write", _FOR_EVER), SECONDS * session.scale

    def beside_a_thread(interval: float) -> float:
        with _busy_thread(interval):
            return _exit_cost(rom, seconds)

    default = sys.getswitchinterval()
    taken = alternate(
        min(session.rounds, FEWEST_ROUNDS),
        {
            "default": lambda: beside_a_thread(default),
            "short": lambda: beside_a_thread(SHORT_INTERVAL),
            "alone": lambda: _exit_cost(rom, seconds),
        },
    )
    name = "port write beside a thread that computes"
    quiet = {"no such thread": taken["alone"]}
    return [
        Row.of(f"{name}, switch interval {default * 1e3:g} ms", "us", {"kvmpy": taken["default"], **quiet}),
        Row.of(f"{name}, switch interval {SHORT_INTERVAL * 1e6:g} us", "us", {"kvmpy": taken["short"], **quiet}),
    ]


def _exit_cost(rom: Path, seconds: float) -> float:
    """Microseconds for each exit of a guest that runs for `seconds`."""
    register = Register()
    with Machine() as machine:
        machine.map_ports(guests.DEVICE_PORT, 4, write=register.write, name="register")
        machine.load(FirmwareImage(rom))
        start = time.perf_counter_ns()
        machine.run(timeout=seconds)
        took = time.perf_counter_ns() - start
        return took / 1e3 / max(machine.statistics().count("port", guests.DEVICE_PORT), 1)


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
