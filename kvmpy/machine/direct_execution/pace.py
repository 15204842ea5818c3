"""Which way of running ring 0 is quicker now: KVM's emulator, or directly (`kvmpy.machine.direct_execution`).

The emulator takes a microsecond for an instruction, but comes out to a device in 10; what runs directly takes 35 for
that, because ring 3 is left through a fault. So a guest that does little but access devices is better off emulated, and
how little cannot be seen from inside. The emulator's own pace tells it: more than 35 microseconds from one exit to the
next, and the guest does enough in between. It is measured while the guest is emulated, and when a guest that runs
directly keeps coming out, it is emulated for one tick from time to time to measure it again.
"""

from __future__ import annotations

import time

__all__ = ["DirectPace"]

EXIT_COST = 35e-6
"""Seconds of an exit from direct execution (measured)."""
_SHORTEST = 5e-3
"""A measurement over a shorter time says nothing."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
"""Seconds between two measurements of a guest that runs directly and keeps coming out."""


class DirectPace:
    """For one vCPU, whose guest has been emulated so far with `exits` exits.

    `direct` is what was chosen last. When it `is_due`, `choose` looks at what has happened since.
    """

    def __init__(self, exits: int) -> None:
        self.direct = False
        self._since = time.monotonic()
        self._exits = exits
        self._pause = _FIRST_PAUSE
        self._next = 0.0

    def is_due(self) -> bool:
        """Whether enough time has passed to measure anything."""
        return time.monotonic() - self._since >= _SHORTEST

    def choose(self, exits: int) -> None:
        """Choose anew. `exits` counts all of them, of both ways."""
        now = time.monotonic()
        each = (now - self._since) / max(1, exits - self._exits)
        self._since, self._exits = now, exits
        if not self.direct:
            self.direct = each > EXIT_COST
            self._pause = min(2 * self._pause, _LONGEST_PAUSE) if self.direct else _FIRST_PAUSE
            self._next = now + self._pause
        elif each < 2 * EXIT_COST and now >= self._next:
            self.direct = False  # until the next tick, to measure
