"""The real-mode entry: setup code, its heap, and the command line in one segment.

Linux/x86 boot protocol, "Memory Layout of The Real-Mode Code" and "Sample Boot Configuration".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy._value import frozen
from kvmpy.boot.image import LoadedRange
from kvmpy.boot.linux.setup_header import LoadFlags
from kvmpy.boot.placement import ram_views
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.boot.linux.bzimage import BzImage
    from kvmpy.boot.linux.setup_header import SetupHeader
    from kvmpy.memory import GuestMemory

__all__ = ["RealModeSegment"]

COMMAND_LINE_MAGIC = 0xA33F


@frozen
class RealModeSegment:
    """Where the real-mode code is (`base`), and in its segment the end of the heap and of the command line."""

    base: int
    heap_end: int
    end: int

    @classmethod
    def of(cls, image: BzImage) -> RealModeSegment:
        """The document's two layouts: a whole segment, or the one at 0x90000 for a zImage or a protocol before 2.02."""
        if image.loaded_high and image.header.version >= 0x202:
            return cls(0x8_0000, 0xE000, 0x1_0000)
        return cls(0x9_0000, 0x9800, 0xA000)

    @property
    def range(self) -> LoadedRange:
        """All of it."""
        return LoadedRange(self.base, self.end, "real-mode code")

    def fill_header(self, header: SetupHeader, command_line: bytes) -> None:
        """Say in `header` where heap and command line are. Raises ImageError for a line that is too long."""
        room = self.end - self.heap_end
        if len(command_line) > room:
            raise ImageError(
                f"a command line of {len(command_line) - 1} bytes is too long for the real-mode entry, which has room "
                f"for {room - 1}", header.image,
            )  # fmt: skip
        header["heap_end_ptr"] = self.heap_end - 0x200
        if "heap_end_ptr" in header:
            header["loadflags"] |= LoadFlags.CAN_USE_HEAP
        header["cmd_line_ptr"] = self.base + self.heap_end
        if header.version < 0x202:
            header["setup_move_size"] = self.heap_end + len(command_line)

    def write(self, memory: GuestMemory, image: BzImage, header: SetupHeader, command_line: bytes) -> None:
        """Copy the real-mode code, put `header` in its place, and the command line. Raises ImageError without RAM."""
        name = image.source.name
        ram_views(memory, self.base, self.end, name, "the real-mode code with heap and command line")
        image.source.copy_to(memory, self.base, 0, image.setup_size, "the real-mode code")
        memory.write(self.base + header.base, header.data)
        memory.write(self.base + self.heap_end, command_line)
        if header.version < 0x202:
            memory.write_u16(self.base + 0x20, COMMAND_LINE_MAGIC)
            memory.write_u16(self.base + 0x22, self.heap_end)
