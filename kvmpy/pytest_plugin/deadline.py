"""How long the guests of one test may run."""

from __future__ import annotations

import time

import pytest

__all__ = ["Deadline"]


class Deadline:
    """The end of the time that the guests of a test have: `seconds` after the first run began. May be infinite."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end: float | None = None

    def shorten(self, timeout: float | None) -> tuple[float | None, bool]:
        """A run begins that would have `timeout`: the one that it gets, and whether that is the deadline.

        Fails the test when the time is over.
        """
        __tracebackhide__ = True
        now = time.monotonic()
        if self._end is None:
            self._end = now + self.seconds
        left = self._end - now
        if left <= 0:
            self.fail()
        if timeout is not None and not timeout > left:  # which NaN is not: the machine refuses it
            return timeout, False
        return (None, False) if left == float("inf") else (left, True)

    def fail(self) -> None:
        """Fail the test because its guests have used up their time."""
        __tracebackhide__ = True
        pytest.fail(
            f"timeout: the guest still ran when the {self.seconds:g} s were over that the guests of this test have "
            "(@pytest.mark.kvm(deadline=...), ini option kvm_deadline)"
        )
