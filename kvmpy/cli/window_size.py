"""The size of the window that the terminal is in, and its changes while a guest runs."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmpy.devices.device import Board

__all__ = ["following_window", "window_size"]


def window_size() -> tuple[int, int] | None:
    """(columns, rows) when standard input and output are a terminal that knows them."""
    if not (os.isatty(0) and os.isatty(1)):
        return None
    size = os.get_terminal_size(1)
    return (size.columns, size.lines) if size.columns and size.lines else None


@contextlib.contextmanager
def following_window(board: Board, changed: Callable[[int, int], object]) -> Iterator[None]:
    """Within this context `changed(columns, rows)` is called, in the host input thread, whenever the window has
    another size. In the main thread only."""
    from kvmpy.devices.host_input import InputStream

    known = window_size()
    if known is None:
        yield
        return

    def look(_: bytes) -> None:
        nonlocal known
        size = window_size()
        if size is not None and size != known:
            known = size
            changed(*size)

    # The main thread may be in the guest for long before it runs Python's handlers; the descriptor is written at once.
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    source = InputStream(read_end, look)
    handler = signal.signal(signal.SIGWINCH, lambda number, frame: None)
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    board.listen(source)
    try:
        yield
    finally:
        board.forget(source)
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGWINCH, handler)
        os.close(read_end)
        os.close(write_end)
