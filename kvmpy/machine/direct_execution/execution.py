"""One vCPU whose ring 0 runs in ring 3: going on until somebody else is wanted, and what comes to our handlers."""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import TYPE_CHECKING

from kvmpy.kvm.run_page import NO_EXIT
from kvmpy.machine.direct_execution.context import (
    AC,
    CR2,
    CR3,
    CR4,
    CS,
    FRAME,
    IF,
    INTERRUPTS,
    PAGE,
    RFLAGS,
    RIP,
    RSP,
    SREGS_AT,
    SREGS_END,
    TF,
)  # fmt: skip
from kvmpy.machine.direct_execution.guest_tables import GuestTables, Refused
from kvmpy.machine.direct_execution.instructions import PrivilegedInstructions
from kvmpy.machine.direct_execution.pace import DirectPace
from kvmpy.machine.direct_execution.ports import take_queued, undo_access
from kvmpy.machine.direct_execution.ring_0 import HLT_CODE, IRETQ_CODE, STUB_CODE
from kvmpy.machine.direct_execution.world import DirectWorld

if TYPE_CHECKING:
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["DirectExecution"]

_BP, _UD, _GP, _PF = 3, 6, 13, 14
_INT3 = 0xCC
_AT_ONCE = 8
_WAY_OUT = 2
"""Instructions that KVM emulates between an IRETQ or SYSRET to ring 3 and the next entry of ring 0."""
_SMAP = 1 << 21
_EXIT_IO, _EXIT_DEBUG = 2, 4
_RUNNABLE, _HALTED = 0, 3  # KVM_MP_STATE_*


class DirectExecution(DirectWorld):
    """One vCPU's. `run` goes on with the guest as long as it can; call it between exits, when the guest is in ring 0.

    `counts` says how often what happened.
    """

    def __init__(self, runner: VcpuRunner) -> None:
        super().__init__(runner)
        self._instructions = PrivilegedInstructions(self)
        self._tables = GuestTables(self.vcpu.vm.memory)
        self._pace = DirectPace(self._exits())

    def is_quicker(self) -> bool:
        """Whether the guest is better off here than with KVM's emulator, as far as can be told now."""
        pace = self._pace
        if pace.is_due():
            pace.choose(self._exits())
        return pace.direct

    def _exits(self) -> int:
        loop = self.runner.loop
        accesses = sum(loop.counts().values()) - loop.without_exit
        return accesses + sum(loop.other_exits.values()) + sum(self.counts.values())

    def run(self) -> bool:
        """Run on. True: KVM_RUN was interrupted, and somebody shall look why."""
        vcpu = self.vcpu
        page = vcpu.page
        vcpu._sync.need_sregs()
        state = vcpu.get_mp_state()
        if not self._is_possible() or state not in (_RUNNABLE, _HALTED) or self._is_raising():
            return False
        self.halted = state == _HALTED
        if self.halted:
            if not page.u64[RFLAGS] & IF:
                return False
            vcpu.set_mp_state(_RUNNABLE)  # it comes to a HLT of ours again; until then our own code may have to run
        allowed = _WAY_OUT if self.going_out else 0
        self.going_out = self._hopeless = False
        self._enter()
        try:
            self._look_at_memory(allowed)
            waited = self.halted
            if not self._deliver_held():
                self._leave()
                return False
            if waited and not self.halted:
                self._stand(IRETQ_CODE, 2)
            return self._go_on()
        except BaseException:  # of a device, or Ctrl-C: the guest comes to the same instruction again
            if self._inside:
                undo_access(vcpu, self.memory)
                self._leave()
            raise

    def _look_at_memory(self, allowed: int) -> None:
        """What is mapped may have changed since the guest left, by code of ring 0 that KVM emulated, or by the host.

        `allowed` instructions change nothing.
        """
        left_at, self._left_at = self._left_at, -1
        if self.memory.has_other_regions():
            self.memory.look_at_regions()
            self._tables.look_at_regions()
            left_at = -1
        cr3 = self.system(CR3)
        if left_at < 0 or self._emulated() - left_at > allowed:
            self.counts["looked at all"] += 1
            self.memory.revalidate(cr3)
        elif cr3 != self.memory.guest_cr3:
            self.memory.revalidate(cr3, code=False)

    def forget(self) -> None:
        """The host may have changed guest memory: trust nothing that was seen of it."""
        self._left_at = -1

    def _go_on(self) -> bool:
        loop, vcpu = self.runner.loop, self.vcpu
        page = vcpu.page
        u64, u32 = page.u64, page.u32
        enter, entry = vcpu.enter, vcpu.entry
        ports, note = loop.port_accesses, loop.recent.append
        queue = loop.queue is not None
        first = 0 if loop.queue is None else loop.queue.head
        last = first + 1
        handle, stubs = self._handle, STUB_CODE >> 12
        on_its_way = False
        loop.forget_old_handlers()
        while True:
            if self._postponed and not on_its_way:
                self._come_again()
            failed = enter(*entry) < 0
            if queue and u32[first] != u32[last]:
                number = ctypes.get_errno()
                take_queued(loop)
                ctypes.set_errno(number)
            if failed:
                number = ctypes.get_errno()
                if number != errno.EINTR:
                    self._leave()
                    if number != errno.EAGAIN:
                        vcpu.failed_run(number)
                    return False
                if self._on_its_way():
                    # An event must not reach the guest's own tables: have it come to ours first.
                    self._postpone_kick()
                    on_its_way = True
                    continue
                self._interrupted()
                self._leave()
                self._left_at = self._emulated()
                u32[2] = NO_EXIT
                return True
            on_its_way = False
            rip = u64[RIP]
            if u32[2] == _EXIT_IO:
                if rip >> 12 != stubs:  # the guest's own
                    access = ports.get(u64[4])
                    if access is None:
                        loop.handle()
                        continue
                    call, offset, size, data, index, write, place, count = access
                    if write:
                        value = data[index]
                        call(offset, size, value)
                    else:
                        data[index] = value = call(offset, size)
                    u32[2] = NO_EXIT
                    access[7] = count + 1
                    note((place, value))
                    continue
                u32[2] = NO_EXIT
                if self.halted:  # the interrupt came in ring 0, on top of the guest's frame
                    self.halted = False
                    self._stand(IRETQ_CODE, 2)
                if handle(rip - STUB_CODE >> 4):
                    if self.halted:
                        self._stand(HLT_CODE, 2)
                    continue
                if self._step():
                    continue
                return False
            self.counts[f"exit {u32[2]}"] += 1
            self._leave()
            u32[2] = NO_EXIT
            return False

    def _is_possible(self) -> bool:
        """Whether the guest is in 64-bit code of ring 0, with paging."""
        page = self.vcpu.page
        u8 = page.u8
        dpl, is_64_bit = u8[SREGS_AT + CS + 16], u8[SREGS_AT + CS + 19]
        if dpl or not is_64_bit or page.u64[RFLAGS] & TF:
            return False
        if any(u8[SREGS_AT + INTERRUPTS : SREGS_AT + SREGS_END]):
            self.vcpu._sync.need_sregs()  # these may be bits of interrupts that were delivered long ago
            if any(u8[SREGS_AT + INTERRUPTS : SREGS_AT + SREGS_END]):
                return False
        return True

    def _is_raising(self) -> bool:
        """Whether the guest is to get an exception next, or what INT n raises: that is to reach its own tables."""
        vcpu = self.vcpu
        events = vcpu.get_events()
        exception, interrupt = events.exception, events.interrupt
        if exception.injected or exception.pending or (interrupt.injected and interrupt.soft):
            return True
        if exception.nr != _BP:
            return False
        u64 = vcpu.page.u64  # KVM tells that a breakpoint was the last exception, but not whether it is still to come
        self._tables.guest_cr3 = u64[(SREGS_AT + CR3) // 8]
        try:
            before = self._tables.read_linear(u64[RIP] - 2, 2)
            return before[1] == _INT3 or before == b"\xcd\3"
        except Refused:
            return True

    def _on_its_way(self) -> bool:
        """Whether KVM has an event that the guest is to get next."""
        events = self.vcpu.get_events()
        if events.exception.injected or events.exception.pending or events.interrupt.injected:
            return True
        last = self.vcpu.page.u64[RIP] - 1  # KVM does not tell of a breakpoint
        code = self.memory.code_of(last)
        return code is not None and code.original[last & 0xFFF] == _INT3 and last & 0xFFF in code.starts

    def _interrupted(self) -> None:
        """EINTR may come in a stub: before its OUT an exception is not handled yet."""
        rip = self.vcpu.page.u64[RIP]
        if STUB_CODE <= rip < STUB_CODE + PAGE and not rip & 15:
            vector = rip - STUB_CODE >> 4
            if vector >= 32:
                self._hold(vector)
            elif vector == _BP:
                self.cells[FRAME] -= 1

    def _handle(self, vector: int) -> bool:
        """What came to our IDT. False: a step of KVM's emulator shall do it, or the guest go on there."""
        self.going_out = self._hopeless = False
        if vector == _PF:
            return self._page_fault()
        stood_in = self.memory.stand_ins.contains(self.cells[FRAME])
        if stood_in or vector >= 32:
            done = self._settle()
            if done and vector == _GP:  # STI, and an interrupt waits
                return self._deliver_held()
        if vector >= 32:
            self.counts["interrupts"] += 1
            if self.flags & IF and self.deliver(vector):
                return True
            self._hold(vector)
            return not self.flags & IF
        if vector == _BP:
            self.counts["INT3"] += 1
            if self.deliver(_BP):
                return True
            self.cells[FRAME] -= 1
            return False
        return vector in (_GP, _UD) and self._instruction(stood_in)

    def _page_fault(self) -> bool:
        cells = self.cells
        error = cells[FRAME - 1]
        linear = self.vcpu.page.u64[(SREGS_AT + CR2) // 8]
        self.counts["#PF"] += 1
        may_touch_user = bool(self.flags & AC) or not self.system(CR4) & _SMAP
        if error & 2 and self.memory.stand_ins.contains(cells[FRAME]):
            self._settle()  # where it is may go, with the page of code that is written to
        try:
            self.memory.touch(linear, bool(error & 2), bool(error & 16), cells[FRAME], may_touch_user)
        except Refused as refused:
            self.counts[f"refused: {refused}" if refused.present is None else "#PF for the guest"] += 1
            self._hopeless = bool(error & 16)
            self._settle()
            if refused.present is None:
                return False
            self.set_system(CR2, linear)
            return self.deliver(_PF, error & 0x1A | refused.present)
        return True

    def _instruction(self, stood_in: bool) -> bool:
        """An instruction that ring 3 may not execute, or that its stand-in did not care for."""
        memory, cells = self.memory, self.cells
        rip = cells[FRAME]
        code = memory.code_of(rip)
        if code is None:
            return False
        offset = rip & 0xFFF
        if not stood_in and offset in code.moved:  # somebody jumped into the midst of what a stand-in does
            cells[FRAME] = code.moved[offset]
            self.counts["moved"] += 1
            return True
        if not code.begins(offset):  # in what was left out: have it looked through from here
            memory.forget_code(memory.walk(rip)[0])
            return True
        instructions = self._instructions
        if not instructions.perform(code, offset):
            self.counts["step " + code.original[offset : offset + 3].hex()] += 1
            return False
        self.counts["instructions"] += 1
        if self.arrived:
            self.arrived = False
        elif not self.halted:
            for _ in range(_AT_ONCE):  # those that follow, if they would fault too
                following = cells[FRAME]
                offset = following & 0xFFF
                if following >> 12 != rip >> 12 or offset > PAGE - 16 or not instructions.is_likely(code, offset):
                    break
                if not code.begins(offset) or not instructions.perform(code, offset):
                    break
                self.counts["at once"] += 1
        if not self._deliver_held():
            return False
        cells[FRAME] = self._moved(cells[FRAME])
        return True

    def _step(self) -> bool:
        """One instruction by KVM's emulator, in the guest's own context. True: inside again."""
        runner, vcpu = self.runner, self.vcpu
        page = vcpu.page
        u32 = page.u32
        if self._inside:
            self._leave()
        if self.going_out:
            self._left_at = self._emulated()
        if self.going_out or self._hopeless:
            return False
        before = page.u64[RIP]
        self.counts["steps"] += 1
        debug = runner.debug
        debug.step(self)
        debug.apply()
        leaving = False
        try:
            while True:
                number = self._enter_guest()
                if number or u32[2] == _EXIT_DEBUG:
                    u32[2] = NO_EXIT
                    break
                leaving = runner.loop.handle()
                if leaving:
                    break
                debug.apply()
        finally:
            debug.run(self)
            debug.apply()
        if number == errno.EINTR:
            page.immediate_exit = True  # come back at once, for who handles this
        if number or leaving or not self._is_possible() or self._is_raising():
            return False
        if not 0 <= page.u64[RIP] - before <= 15:
            self._clear_trap_flag(before)
        self._enter()
        self.memory.revalidate(self.system(CR3), code=False)
        if self.memory.written is not None:
            self.memory.forget_code(self.memory.written)
            self.memory.written = None
        return True

    def _clear_trap_flag(self, rip: int) -> None:
        """Where an exception was delivered in the step: its frame must not show what made it one."""
        rsp = self.vcpu.page.u64[RSP]
        try:
            frame = struct.unpack("<4Q", self.memory.read_linear(rsp, 32))
            for at in (0, 1):
                if frame[at] == rip and frame[at + 2] & TF:
                    self.memory.write_linear(rsp + 8 * at + 16, (frame[at + 2] & ~TF).to_bytes(8, "little"))
        except Refused:
            return
