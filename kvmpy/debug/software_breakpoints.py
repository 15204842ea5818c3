"""Breakpoints in guest memory: the first byte of an instruction is replaced by one that comes out of the guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.debug.host_support import breakpoint_byte
from kvmpy.errors import UsageError
from kvmpy.x86.flags import Cr0

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu
    from kvmpy.memory import GuestMemory

__all__ = ["SoftwareBreakpoints"]


class _Patch:
    """One replaced byte, at a guest-physical address. Several breakpoints may share it."""

    __slots__ = ("byte", "in_guest", "original", "users")

    def __init__(self, original: int, byte: int) -> None:
        self.original = original
        self.byte = byte
        self.users = 0
        self.in_guest = False


class SoftwareBreakpoints:
    """The replaced bytes of one machine, by guest-physical address.

    Memory is changed through its buffer, so ROM can be patched too. Code that the guest loads over a breakpoint removes
    it: set it when the code is in place.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._patches: dict[int, _Patch] = {}

    def __bool__(self) -> bool:
        return bool(self._patches)

    def __contains__(self, physical: int) -> bool:
        return physical in self._patches

    def insert(self, vcpu: Vcpu, physical: int, *, real_mode: bool | None = None) -> None:
        """Replace the byte at guest-physical `physical`, for the mode that `vcpu` is in now, or the one that is given.

        Raises UsageError where this host's KVM has no instruction that comes out, GuestMemoryError outside memory.
        """
        patch = self._patches.get(physical)
        if patch is None:
            if real_mode is None:
                real_mode = not vcpu.sregs.cr0 & Cr0.PE
            byte = breakpoint_byte(real_mode)
            if byte is None:
                raise UsageError("this host's KVM reports no software breakpoints in this mode; use hardware=True")
            patch = self._patches[physical] = _Patch(self._memory.view(physical, 1)[0], byte)
            self._write(physical, patch, True)
        patch.users += 1

    def remove(self, physical: int) -> None:
        """Put the original byte back when nobody needs the patch any more."""
        patch = self._patches[physical]
        patch.users -= 1
        if not patch.users:
            del self._patches[physical]
            self._write(physical, patch, False)

    def lift(self, physical: int) -> None:
        """Put the original byte back for one instruction."""
        self._write(physical, self._patches[physical], False)

    def lower(self, physical: int) -> None:
        """Replace the byte again after `lift`, unless the breakpoint has gone since."""
        if (patch := self._patches.get(physical)) is not None:
            self._write(physical, patch, True)

    def hide(self, physical: int, data: bytearray) -> None:
        """Show in `data`, read at `physical`, what the guest's memory holds without the patches."""
        for address, patch in self._patches.items():
            if patch.in_guest and physical <= address < physical + len(data):
                data[address - physical] = patch.original

    def overwrite(self, physical: int, data: bytes) -> None:
        """A debugger writes `data` at `physical`: patches stay, over what is there now."""
        for address, patch in self._patches.items():
            if physical <= address < physical + len(data):
                patch.original = data[address - physical]
        self._memory.write(physical, data)
        for address, patch in self._patches.items():
            if patch.in_guest and physical <= address < physical + len(data):
                self._write(address, patch, True)

    def _write(self, physical: int, patch: _Patch, in_guest: bool) -> None:
        view = self._memory.view(physical, 1)
        if not in_guest and patch.in_guest and view[0] != patch.byte:
            patch.in_guest = False  # the guest has written here since: what it wrote stays
            return
        if in_guest and not patch.in_guest:
            patch.original = view[0]  # it may have changed itself meanwhile
        view[0] = patch.byte if in_guest else patch.original
        patch.in_guest = in_guest
