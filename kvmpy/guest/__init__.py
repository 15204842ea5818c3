"""What guest programs are made of and with: C headers to include, and the GNU tools that build them.

Headers are below `include_folder()`; a program says `#include <kvmpy/ktap.h>`. `kvmpy.guest.toolchain` assembles and
compiles.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["include_folder"]


def include_folder() -> Path:
    """Where the headers are, for the compiler's option -I."""
    from pathlib import Path

    return Path(__file__).parent / "include"
