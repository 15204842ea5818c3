"""Coverage by one-shot breakpoints: each is taken out when the guest reaches it for the first time.

So a guest soon runs as fast as without. The breakpoints are in memory, for every processor; the exit of one that is
reached is dealt with right where KVM_RUN came back, and nobody else sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from kvmpy.debug.coverage.translation import physical_address
from kvmpy.debug.host_support import breakpoint_byte
from kvmpy.debug.program_counter import linear_pc
from kvmpy.errors import GuestMemoryError, UsageError
from kvmpy.kvm.run_page import EXIT_REASON, NO_EXIT

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine

__all__ = ["OneShotBreakpoints", "Place"]

_REASON = EXIT_REASON // 4
_DEBUG, _INTERNAL_ERROR = 4, 17  # KVM_EXIT_*
_DETAIL = 32 // 4
"""Index in the run page of `debug.arch.exception` and of `internal.suberror`."""
_PC = 40 // 8
_FLAGS, _INSTRUCTION = 40 // 8, 49
"""Of an emulation failure: index of its flags, bit 0 of which says that the instruction is there; and where."""
_BP, _EMULATION = 3, 1
_CONTEXT = 15
"""Bytes by which a copy of the program's code is recognized."""


class Place(NamedTuple):
    """Where a breakpoint goes: linear and guest-physical address, and how wide the code is there."""

    address: int
    physical: int
    bits: int


class OneShotBreakpoints:
    """Breakpoints of one machine at `places`, from `begin` to `end`, while no vCPU runs both times.

    `read` gives the program's code by linear address. Raises UsageError where this host reports none.
    """

    def __init__(self, machine: Machine, places: Iterable[Place], read: Callable[[int, int], bytes]) -> None:
        self._memory = machine.memory
        self._runners = machine.runners
        self._debugger = machine.debugger
        self._waiting: dict[int, Place] = {place.physical: place for place in places}
        self._places = self._waiting.copy()
        self._bytes = {bits: breakpoint_byte(bits == 16) for bits in {place.bits for place in self._places.values()}}
        if None in self._bytes.values():
            raise UsageError('this host\'s KVM reports no breakpoints in memory; take method="steps"')
        self._code = {place.address: read(place.address, _CONTEXT) for place in self._places.values()}
        """The original code at each place."""
        self._copies: set[int] = set()
        """How far away the guest has put copies of the code, breakpoints included."""
        self._plain: list[tuple[Vcpu, Callable[[int, int, int], int]]] = []
        self.reached: set[int] = set()
        """The linear addresses of the breakpoints that were reached."""

    def begin(self) -> None:
        """Set them, and have KVM_RUN of all vCPUs go through here."""
        software, vcpu = self._debugger.software, self._runners[0].vcpu
        inserted = []
        try:
            for place in self._waiting.values():
                software.insert(vcpu, place.physical, real_mode=place.bits == 16)
                inserted.append(place.physical)
        except BaseException:
            for physical in inserted:
                software.remove(physical)
            raise
        self._debugger.software_changed()
        for runner in self._runners:
            self._plain.append((runner.vcpu, runner.vcpu.enter))
            runner.vcpu.enter = self._make_entry(runner.vcpu)

    def end(self) -> None:
        """Take out those that were not reached, and leave the vCPUs as they were."""
        for vcpu, enter in self._plain:
            if not vcpu.closed:
                vcpu.enter = enter
        self._plain.clear()
        for physical in self._waiting:
            self._debugger.software.remove(physical)
        self._waiting.clear()
        for distance in self._copies:
            for physical, place in self._places.items():
                self._mend(physical + distance, place)
        if not any(runner.vcpu.closed for runner in self._runners):
            self._debugger.software_changed()

    def _make_entry(self, vcpu: Vcpu) -> Callable[[int, int, int], int]:
        """What stands for the ioctl KVM_RUN: it comes back with the next exit that is not a breakpoint of ours."""
        enter, u32 = vcpu.enter, vcpu.page.u32
        reached = self._reached

        def entry(fd: int, request: int, zero: int) -> int:
            while True:
                answer = enter(fd, request, zero)
                if answer < 0 or (u32[_REASON] != _DEBUG and u32[_REASON] != _INTERNAL_ERROR) or not reached(vcpu):
                    return answer
                u32[_REASON] = NO_EXIT

        return entry

    def _reached(self, vcpu: Vcpu) -> bool:
        """Whether the exit is that of a breakpoint of ours, and of nobody else."""
        page = vcpu.page
        if page.u32[_REASON] == _DEBUG:
            if page.u32[_DETAIL] != _BP:
                return False
            pc, executed = page.u64[_PC], None
        else:
            if page.u32[_DETAIL] != _EMULATION or not page.u64[_FLAGS] & 1:
                return False
            pc, executed = linear_pc(vcpu), page.u8[_INSTRUCTION]
        physical = physical_address(vcpu, pc)
        if physical is None:
            return False
        place = self._places.get(physical)
        if place is None:
            return self._reached_copy(physical)
        software = self._debugger.software
        if self._waiting.pop(physical, None) is not None:  # in one step: another vCPU may be here at the same time
            self.reached.add(place.address)
            software.remove(physical)
            return physical not in software  # else the debugger has one here, too
        byte = self._bytes[place.bits]
        if physical in software or executed not in (None, byte):
            return False
        # Another vCPU was here first, and this one had fetched the instruction already; or it is the guest's own.
        return self._memory.read(physical, 1)[0] != byte

    # Code that the guest has copied, such as the start of its other processors

    def _reached_copy(self, physical: int) -> bool:
        """Put right a copy of the code, and note what it is a copy of. False: it is none."""
        if self._memory.region_at(physical) is None or self._memory.read(physical, 1)[0] not in self._bytes.values():
            return False  # an instruction that KVM cannot emulate, of which a guest may have many
        for distance in self._copies:
            place = self._places.get(physical - distance)
            if place is not None and self._mend(physical, place):
                self.reached.add(place.address)
                return True
        for place in self._places.values():
            if self._mend(physical, place):
                self._copies.add(physical - place.physical)
                self.reached.add(place.address)
                return True
        return False

    def _mend(self, physical: int, place: Place) -> bool:
        """Put back the byte of a breakpoint in what is a copy of the code at `place`. False: it is no copy."""
        code, byte = self._code[place.address], self._bytes[place.bits]
        try:
            there = self._memory.read(physical, len(code))
        except GuestMemoryError:
            return False
        if physical in self._places or not there or there[0] != byte or code[0] == byte:
            return False
        for offset in range(1, len(code)):
            if there[offset] != code[offset]:
                other = self._places.get(place.physical + offset)
                if other is None or there[offset] != self._bytes[other.bits]:
                    return False
        self._memory.write(physical, code[:1])
        return True
