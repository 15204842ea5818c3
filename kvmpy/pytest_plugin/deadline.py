"""How long the guests of one test may run."""

from __future__ import annotations

import time

import pytest

__all__ = ["Deadline"]


class Deadline:
    """The end of the time that guests of a test have, `seconds` from now on. May be infinite."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; not less than 0."""
        return max(0.0, self._end - time.monotonic())

    def shorten(self, timeout: float | None) -> tuple[float | None, bool]:
        """The timeout for a run that would have `timeout`, and whether its end is the deadline and no end of its own.

        Fails the test when the time is over.
        """
        __tracebackhide__ = True
        left = self.left
        if not left:
            self.fail()
        if timeout is not None and timeout <= left:
            return timeout, False
        return (None, False) if left == float("inf") else (left, True)

    def fail(self) -> None:
        """Fail the test because its guests have used up their time."""
        __tracebackhide__ = True
        pytest.fail(
            f"timeout: the guest still ran when the {self.seconds:g} s were over that the guests of this test have "
            "(@pytest.mark.kvm(deadline=...), ini option kvm_deadline)"
        )
