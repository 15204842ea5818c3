"""How the guest is told to go on: the packets vCont, c, s and their kin (gdb manual, E.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvmpy.debug.gdb.wire import ALL_THREADS, ANY_THREAD, Malformed, number, thread_id

__all__ = ["Resumption", "from_vcont"]


@dataclass(slots=True)
class Resumption:
    """Which threads go on, and which one executes an instruction only: or many, as long as pc is in `range`."""

    running: tuple[int, ...]
    stepping: int | None = None
    range: tuple[int, int] | None = None
    interrupted: bool = False
    """Whether gdb has asked for an end of it (Ctrl-C)."""

    def goes_on(self, pc: int) -> bool:
        """Whether a step that led to `pc` is followed by another one."""
        return self.range is not None and not self.interrupted and self.range[0] <= pc < self.range[1]


def from_vcont(text: bytes, threads: Sequence[int], current: int) -> Resumption:
    """What `;action[:thread];...` means: for each thread the first action that names it, or that names none.

    Signals are left out: a machine has none. Of several threads to step, `current` or the first one steps and the
    others stand, since gdb has no use for more. Raises Malformed for what is no action or no thread.
    """
    actions: dict[int, tuple[str, tuple[int, int] | None]] = {}
    for part in text.removeprefix(b";").split(b";"):
        action, colon, name = part.partition(b":")
        what = _action(action)
        for thread in _named(thread_id(name) if colon else ALL_THREADS, threads):
            actions.setdefault(thread, what)
    steps = [thread for thread, (kind, _) in actions.items() if kind == "step"]
    stepping = current if current in steps else steps[0] if steps else None
    running = tuple(thread for thread, (kind, _) in actions.items() if kind == "continue")
    if stepping is None:
        return Resumption(running)
    return Resumption(running, stepping, actions[stepping][1])


def _action(text: bytes) -> tuple[str, tuple[int, int] | None]:
    letter, rest = text[:1], text[1:]
    if letter in (b"c", b"s") and not rest:
        return ("continue" if letter == b"c" else "step"), None
    if letter in (b"C", b"S"):
        number(rest)
        return ("continue" if letter == b"C" else "step"), None
    if letter == b"r":
        first, comma, last = rest.partition(b",")
        if comma:
            return "step", (number(first), number(last))
    raise Malformed(f"not an action: {text[:20]!r}")


def _named(thread: int, threads: Sequence[int]) -> Sequence[int]:
    if thread == ALL_THREADS:
        return threads
    if thread == ANY_THREAD:
        return threads[:1]
    if thread not in threads:
        raise Malformed(f"no thread {thread}")
    return (thread,)
