"""Several vCPUs, one device: one access at a time."""

from threading import RLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Handler = Callable[..., Any]

__all__ = ["as_it_is", "one_at_a_time"]


def as_it_is(handler: "Handler") -> "Handler":
    """The handler itself: a single vCPU's needs no lock."""
    return handler


def one_at_a_time() -> "Callable[[Handler], Handler]":
    """A function that wraps handlers so that only one of all those it has wrapped is at work."""
    lock = RLock()  # a handler may access another device

    def guard(handler: "Handler") -> "Handler":
        def locked(*arguments: "Any") -> "Any":
            with lock:
                return handler(*arguments)

        locked.__qualname__ = getattr(handler, "__qualname__", repr(handler))
        return locked

    return guard
