"""When a guest's ring 0 runs directly, and when KVM's emulator is the quicker one."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvmpy.machine.direct_execution.pace import EXIT_COST, DirectPace

TICK = 0.05


class Guest:
    """Time and exits pass as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.exits = 100.0, 0
        monkeypatch.setattr("kvmpy.machine.direct_execution.pace.time.monotonic", lambda: self.now)
        self.pace = DirectPace(0)

    def tick(self, each: float) -> bool:
        """A tick in which an exit comes every `each` seconds; answers how the guest goes on."""
        self.now += TICK
        self.exits += int(TICK / each)
        assert self.pace.is_due()
        self.pace.choose(self.exits)
        return self.pace.direct


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Guest:
    return Guest(monkeypatch)


def test_a_guest_that_computes_runs_directly_from_the_first_tick_on(guest: Guest) -> None:
    assert [guest.tick(each=1e-3) for _ in range(100)] == [True] * 100


def test_a_guest_that_does_nothing_but_exits_stays_emulated(guest: Guest) -> None:
    assert [guest.tick(each=10e-6) for _ in range(100)] == [False] * 100


def test_one_that_begins_to_compute_runs_directly_from_the_next_tick_on(guest: Guest) -> None:
    guest.tick(each=10e-6)
    assert guest.tick(each=100e-6)


def test_one_that_keeps_coming_out_is_measured_again_ever_more_seldom(guest: Guest) -> None:
    guest.tick(each=1.0)
    chosen = [guest.tick(each=EXIT_COST if guest.pace.direct else 200e-6) for _ in range(2000)]
    emulated = [number for number, direct in enumerate(chosen) if not direct]
    seconds = [(later - earlier) * TICK for earlier, later in pairwise(emulated)]
    assert seconds[:3] == pytest.approx([2, 4, 8], abs=3 * TICK)
    assert seconds[-1] == pytest.approx(8, abs=3 * TICK)
    assert len(emulated) < 40


def test_one_that_is_measured_to_do_little_is_emulated_from_then_on(guest: Guest) -> None:
    guest.tick(each=1.0)
    chosen = [guest.tick(each=EXIT_COST if guest.pace.direct else 10e-6) for _ in range(200)]
    assert chosen[-100:] == [False] * 100


def test_too_short_a_time_says_nothing(guest: Guest) -> None:
    guest.now += 0.004
    assert not guest.pace.is_due()
