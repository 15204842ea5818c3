"""Where a guest is to stop: breakpoints and watchpoints of a machine, in debug registers, in memory, and by page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.debug.breakpoint import Breakpoint, Condition, Handler, Point, Watchpoint
from kvmpy.debug.program_counter import linear_pc
from kvmpy.debug.software_breakpoints import SoftwareBreakpoints
from kvmpy.debug.source_place import is_source_line, source_line_address
from kvmpy.debug.vcpu_debugging import VcpuDebugging
from kvmpy.debug.watched_memory import WatchedMemory
from kvmpy.errors import UsageError
from kvmpy.machine.guest_debug import DebugRegister

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine

__all__ = ["Points"]


class Points:
    """Sets and removes points, and tells which are at an address. Mixed into `Debugger`."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.points: list[Point] = []
        self._software = SoftwareBreakpoints(machine.memory)
        self._watched = WatchedMemory(machine, self._watched_access)
        self._vcpus = {runner.vcpu: VcpuDebugging(runner) for runner in machine.runners}

    def _watched_access(self, point: Watchpoint) -> None:
        """The guest is in the midst of an access to a watched page."""
        raise NotImplementedError

    def breakpoint(
        self, where: int | str, handler: Handler | None = None, *, condition: Condition | None = None,
        hardware: bool | None = None, temporary: bool = False,
    ) -> Breakpoint:  # fmt: skip
        """Stop before the instruction at a virtual address, at a symbol of the loaded image, or at "main.c:12".

        Without a `handler` the run ends (End.BREAKPOINT); the next one goes on. `hardware=None` takes a debug register
        while one is free, else patches guest memory, for which the address must be mapped now. In real mode an address
        is linear: 16 x segment + offset. Raises UsageError when neither can be.
        """
        self._check_at_rest()
        address, name = self._resolve(where)
        if hardware is None:
            hardware = all(vcpu.debug.free for vcpu in self._vcpus.values())
        point = Breakpoint(address, name, handler, condition, self._remove, hardware=hardware, temporary=temporary)
        if hardware:
            self._add_register(point, DebugRegister(address))
        else:
            physical = self._translate(self.machine.vcpus[0], address)
            self._software.insert(self.machine.vcpus[0], physical)
            point.physical = physical
            self.software_changed()
        self.points.append(point)
        for vcpu in self._vcpus.values():  # one at which the guest stands after a stop counts from the next time on
            if vcpu.stopped_at == address and linear_pc(vcpu.vcpu) == address:
                vcpu.passed = address
        return point

    def watchpoint(
        self, where: int | str, length: int = 1, handler: Handler | None = None, *, access: str = "write",
        condition: Condition | None = None, hardware: bool | None = None,
    ) -> Watchpoint:  # fmt: skip
        """Stop after the guest writes (`access="access"`: reads or writes) any of `length` bytes.

        `hardware=None` takes a debug register where this host's KVM reports those and one fits and is free, else takes
        the page from the guest: then the address must be mapped now, and each access of the guest to that page costs an
        exit; writes by devices of the host are not seen. Raises UsageError for what cannot be watched.
        """
        from kvmpy.debug.host_support import watches_data

        self._check_at_rest()
        if access not in ("write", "access"):
            raise UsageError(f'a watchpoint watches "write" or "access", not {access!r}')
        if length < 1:
            raise UsageError(f"a watchpoint watches at least one byte, not {length}")
        address, name = self._resolve(where)
        if hardware is None:
            fits = length in (1, 2, 4, 8) and not address % length
            hardware = fits and watches_data() and all(vcpu.debug.free for vcpu in self._vcpus.values())
        point = Watchpoint(
            address, length, access, name, handler, condition, self._remove, hardware=hardware
        )  # fmt: skip
        if hardware:
            self._add_register(point, DebugRegister(address, access, length))
        else:
            point.physical = self._pieces(self.machine.vcpus[0], address, length)
            self._watched.add(point)
        self.points.append(point)
        return point

    def _add_register(self, point: Point, register: DebugRegister) -> None:
        for vcpu in self._vcpus.values():
            vcpu.debug.add(register)
            vcpu.registers[register] = point
            vcpu.apply()

    def _remove(self, point: Point) -> None:
        self._check_at_rest()
        point.active = False
        self.points.remove(point)
        for vcpu in self._vcpus.values():
            for register in [register for register, owner in vcpu.registers.items() if owner is point]:
                vcpu.debug.remove(register)
                del vcpu.registers[register]
        if isinstance(point, Breakpoint) and not point.hardware:
            self._software.remove(point.physical)
        if isinstance(point, Watchpoint) and not point.hardware:
            self._watched.remove(point)
        self.software_changed()

    @property
    def software(self) -> SoftwareBreakpoints:
        """The breakpoints in memory, for others who set some of their own; then comes `software_changed`."""
        return self._software

    def software_changed(self) -> None:
        """Have every vCPU come out at breakpoints in memory as long as there are any. While no vCPU runs."""
        for vcpu in self._vcpus.values():
            vcpu.debug.software = bool(self._software)
            vcpu.apply()

    def _resolve(self, where: int | str) -> tuple[int, str]:
        if isinstance(where, str):
            if is_source_line(where):
                return source_line_address(self.machine, where), where
            return self.machine.symbols.address_of(where), where
        if not isinstance(where, int) or not 0 <= where < 1 << 64:
            raise UsageError(f"a place in the guest is an address of 64 bits or the name of a symbol, not {where!r}")
        return where, ""

    def _translate(self, vcpu: Vcpu, address: int) -> int:
        walk = vcpu.walk(address)
        if walk.physical is None:
            raise UsageError(f"{address:#x} is not mapped now, so memory there cannot be changed or watched:\n{walk}")
        return walk.physical

    def _pieces(self, vcpu: Vcpu, address: int, length: int) -> tuple[tuple[int, int], ...]:
        pieces = []
        while length:
            part = min(length, 0x1000 - address % 0x1000)
            pieces.append((self._translate(vcpu, address), part))
            address, length = address + part, length - part
        return tuple(pieces)

    def _check_at_rest(self) -> None:
        for vcpu in self._vcpus:
            vcpu.check_idle()  # raises when another thread is in the guest with it

    # Memory without the patches

    def read_memory(self, vcpu: Vcpu, address: int, length: int) -> bytes:
        """`length` bytes at a virtual address, software breakpoints hidden. GuestMemoryError or UsageError outside."""
        data = bytearray()
        for physical, part in self._pieces(vcpu, address, length):
            piece = bytearray(self.machine.memory.read(physical, part))
            self._software.hide(physical, piece)
            data += piece
        return bytes(data)

    def write_memory(self, vcpu: Vcpu, address: int, data: bytes) -> None:
        """Write at a virtual address, whether or not the guest may; software breakpoints stay."""
        for physical, part in self._pieces(vcpu, address, len(data)):
            self._software.overwrite(physical, data[:part])
            data = data[part:]

    # What is where

    def _patched(self, vcpu: Vcpu, pc: int) -> int | None:
        """Where, guest-physical, the instruction at `pc` is replaced, or None."""
        if not self._software:
            return None
        physical = vcpu.walk(pc).physical
        return physical if physical is not None and physical in self._software else None

    def _breakpoints_at(self, vcpu: Vcpu, pc: int) -> list[Breakpoint]:
        """Those of a debug register by their virtual address, those in memory by their physical one."""
        physical = self._patched(vcpu, pc)
        return [
            point
            for point in self.points
            if isinstance(point, Breakpoint)
            and (point.address == pc if point.hardware else physical is not None and point.physical == physical)
        ]
