"""What one sees and does at a prompt before a guest: the commands of `kvmpy shell`, and the values that they answer.

`GuestPrompt(machine)` has the commands as methods, for notebooks and scripts too. What they answer is a value that
reads well, as text and in a notebook. Nothing here prints.
"""

from __future__ import annotations

from kvmpy.debug.prompt.guest_prompt import GuestPrompt
from kvmpy.debug.prompt.hex_dump import HexDump
from kvmpy.debug.prompt.stopped import Stopped

__all__ = ["GuestPrompt", "HexDump", "Stopped"]
