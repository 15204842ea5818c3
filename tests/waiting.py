"""Waiting for what another thread, process or guest does, and not for a time in which it should have been done."""

import time
from collections.abc import Callable


def wait_until(holds: Callable[[], object]) -> None:
    """Until `holds()`; the deadline of the test limits it."""
    while not holds():
        time.sleep(0.001)
