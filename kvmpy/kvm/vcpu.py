"""A virtual processor: its registers, KVM_RUN, and the exits it comes back with (KVM API, chapters 4 and 5)."""

import ctypes
import errno
import time
from threading import current_thread, get_ident, main_thread

from kvmpy._exit import Exit
from kvmpy.abi.ioctls import IOCTLS, KVM_RUN, Ioctl
from kvmpy.errors import KvmError, UsageError, VcpuBusyError
from kvmpy.exits import FailEntry, Interrupted
from kvmpy.kvm import kick
from kvmpy.kvm.descriptor import raw_ioctl
from kvmpy.kvm.exit_decoder import MEMORY_FAULT, decode
from kvmpy.kvm.live_registers import LiveRegisters, LiveSystemRegisters
from kvmpy.kvm.register_sync import RegisterSync
from kvmpy.kvm.run_page import EXIT_REASON, IMMEDIATE_EXIT, NO_EXIT, REGS, SREGS, SYNC_SREGS, RunPage
from kvmpy.kvm.vcpu_state import VcpuState
from kvmpy.x86.registers import CpuState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmpy.kvm.vm import Vm
    from kvmpy.x86.entry_rules import Violation

__all__ = ["Vcpu"]

HEARTBEAT = 0.05
"""Seconds. So often KVM_RUN comes back in the main thread, because only there does Python handle Ctrl-C."""

_SOON = 1e-6
"""Seconds: as short as a timer gets without being disarmed."""

_UNSEEN_BY_REGISTERS = frozenset(("KVM_SET_CPUID", "KVM_SET_CPUID2", "KVM_SET_SIGNAL_MASK", "KVM_ENABLE_CAP"))
"""Ioctls that may go ahead of dirty registers; CPUID must: it decides which CR4 bits KVM_SET_SREGS takes."""


class Vcpu(VcpuState):
    """One virtual processor of a `Vm`; made by `Vm.create_vcpu`.

    `regs` and `sregs` are its registers; `run()` enters the guest and answers with the next exit; `exits()` does so
    for ever. The rest of its state (FPU, MSRs, events, local APIC ...) has get and set methods named like the ioctls.

    A vCPU belongs to one thread at a time. While a thread runs it, every use from another one but `kick()` raises
    VcpuBusyError at once, because the kernel would block it until the guest exits.
    """

    kind = "vcpu"

    def __init__(self, fd: int, vm: "Vm", id: int, page_size: int, *, sync_regs: bool) -> None:
        super().__init__(fd)
        self.vm = vm
        self.id = id
        self.page = RunPage(fd, page_size)
        self._owner: dict[int, int] = {}  # {0: thread}: setdefault and pop are atomic, which is all the lock it takes
        self._tid = 0  # native id of the thread that signals reach
        self._timer: kick.KickTimer | None = None
        self._heartbeat = False
        self._kicked = False
        self.last_exit: Exit | None = None
        self._sync = RegisterSync(self.page, synced=sync_regs, check=self._check_access, transfer=self._transfer)
        area = self._sync.area
        self._regs = LiveRegisters(self._sync, area[REGS:SREGS])
        self._sregs = LiveSystemRegisters(self._sync, area[SREGS : SREGS + 312])
        # KVM_RUN and its arguments, built once: `vcpu.enter(*vcpu.entry)` is the whole cost of an entry.
        self.enter: Callable[[ctypes.c_int, ctypes.c_ulong, ctypes.c_long], int] = (
            raw_ioctl if sync_regs else self._enter_unsynced
        )
        self.entry = (self._ioctl_fd, ctypes.c_ulong(KVM_RUN), ctypes.c_long(0))

    def close(self) -> None:
        """Close the vCPU. Views of its registers are dead afterwards."""
        if self._timer is not None:
            self._timer.delete()
            self._timer = None
        if not self.closed:
            self.page.drop()
        super().close()

    def __repr__(self) -> str:
        return f"<Vcpu {self.id} {'closed' if self.closed else f'fd {self._fd}'}>"

    # Registers

    @property
    def regs(self) -> LiveRegisters:
        """General registers, RIP and RFLAGS, live. Changes reach the vCPU with the next run."""
        self._check_access()
        return self._regs

    @property
    def sregs(self) -> LiveSystemRegisters:
        """Segments, descriptor tables, control registers, EFER, APIC base, live."""
        self._check_access()
        return self._sregs

    def cpu_state(self) -> CpuState:
        """A plain copy of `regs` and `sregs`: what the entry rules and the modes of `kvmpy.x86` work on."""
        return CpuState(self._regs.copy(), self._sregs.copy())

    def set_cpu_state(self, state: CpuState) -> None:
        """Take over all registers of `state`. On a processor other than the first, it is also made runnable."""
        self._sregs.assign(state.sregs)
        self._regs.assign(state.regs)
        self._make_runnable()

    def set_real_mode(self, entry: int = 0, **place: int) -> None:
        """Start in real mode; parameters as `kvmpy.x86.modes.real_mode` (`entry`, or `segment=` and `offset=`)."""
        from kvmpy.x86.modes import real_mode

        self.set_cpu_state(real_mode(entry, **place))

    def set_protected_mode(self, entry: int, *, bits: int = 32, stack: int | None = None, ring: int = 0) -> None:
        """Start in flat protected mode without paging, `bits` 32 or 16; see `kvmpy.x86.modes.protected_mode`."""
        from kvmpy.x86.modes import protected_mode

        self.set_cpu_state(protected_mode(entry, bits=bits, stack=stack, ring=ring))

    def set_long_mode(
        self, entry: int, *, cr3: int | None = None, tables: int | None = None, stack: int | None = None, ring: int = 0
    ) -> None:
        """Start in 64-bit mode, in ring 0 or 3.

        With `cr3`, the guest's own page tables are used, see `kvmpy.x86.modes.long_mode`. With `tables`, a
        guest-physical scratch address, a GDT, a TSS and page tables that map all RAM one to one are written there, see
        `kvmpy.x86.long_mode.prepare`.
        """
        if (cr3 is None) == (tables is None):
            raise UsageError("set_long_mode needs cr3=, page tables of your own, or tables=, where to build some")
        if cr3 is not None:
            from kvmpy.x86.modes import long_mode

            self.set_cpu_state(long_mode(entry, cr3, stack=stack, ring=ring))
        else:
            from kvmpy.x86.long_mode import prepare

            self.set_cpu_state(prepare(self.vm.memory, entry=entry, tables=tables or 0, stack=stack, ring=ring))

    def _make_runnable(self) -> None:
        # With an in-kernel irqchip every processor but the first waits for INIT and SIPI (KVM API, section 4.38).
        if self.id and self.vm.irqchip:
            from kvmpy.abi.flags import KVM_MP_STATE_RUNNABLE

            self.set_mp_state(KVM_MP_STATE_RUNNABLE)

    # Running

    def run(self, timeout: float | None = None) -> Exit:
        """Enter the guest and answer with the next exit.

        EINTR is an `Interrupted` exit: after `kick()`, after a signal, or when `timeout` seconds are over
        (`timed_out`). A KeyboardInterrupt surfaces between exits: one that has already happened comes with the next
        call, and `last_exit` keeps the last one. Raises KvmError when KVM_RUN fails, EntryRefusedError when the
        registers that were set break KVM's rules, VcpuBusyError when another thread runs this vCPU.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.claim()
        try:
            page = self.page
            if page.u32[EXIT_REASON // 4] == NO_EXIT:
                self._arm(timeout)
                page.runs[0] += 1
            while page.u32[EXIT_REASON // 4] == NO_EXIT:
                if self.enter(*self.entry) < 0:
                    interruption = self._after_error(ctypes.get_errno(), deadline)
                    page.u32[EXIT_REASON // 4] = NO_EXIT
                    if interruption is not None:
                        return interruption
            event = self.last_exit = decode(page)
            page.u32[EXIT_REASON // 4] = NO_EXIT  # delivered
            return event
        finally:
            self.release()

    def exits(self, timeout: float | None = None) -> "Iterator[Exit]":
        """Run the guest for ever, one exit after the other; `timeout` seconds for each. Leave the loop to stop."""
        while True:
            yield self.run(timeout)

    def kick(self) -> None:
        """Bring the vCPU out of the guest, from any thread: its present or next run answers with `Interrupted`."""
        self._check_usable()
        self._kicked = True
        self.page.u8[IMMEDIATE_EXIT] = 1
        if self._owner:
            kick.send(self._tid)

    def settle(self, handle: "Callable[[Exit], object] | None" = None) -> None:
        """Complete what the last exit left pending, without running the guest on (KVM API, chapter 5, immediate_exit).

        After an `in` or an MMIO read the instruction completes only when KVM_RUN is entered again, and a wide access
        comes as several exits. Call this, having answered the last exit, before registers are read or saved.
        `handle` gets each further exit; without it, reads give all ones.
        """
        self.claim()
        try:
            page = self.page
            while page.runs[0]:
                page.u8[IMMEDIATE_EXIT] = 1
                page.runs[0] += 1
                if self.enter(*self.entry) < 0:
                    number = ctypes.get_errno()
                    page.u8[IMMEDIATE_EXIT] = self._kicked
                    page.u32[EXIT_REASON // 4] = NO_EXIT
                    if number not in (errno.EINTR, errno.EAGAIN):
                        raise self._run_error(number)
                    return
                event = self.last_exit = decode(page)
                page.u32[EXIT_REASON // 4] = NO_EXIT
                if handle is not None:
                    handle(event)
        finally:
            self.release()

    # The protocol of a run, shared with the run loop of a Machine

    def claim(self) -> None:
        """Make the calling thread the one that runs this vCPU. Raises VcpuBusyError when there is another."""
        thread = get_ident()
        if self._owner.setdefault(0, thread) != thread:
            raise VcpuBusyError(f"{self!r} is being run by another thread; stop or pause it first, or use kick()")
        self._check_usable()
        tid = kick.prepare_thread()
        if tid != self._tid:
            self._adopt(tid)
        self._sync.before_run()

    def release(self) -> None:
        """Let other threads use the vCPU again."""
        self._owner.pop(0, None)

    def _adopt(self, tid: int) -> None:
        """The first run in this thread: direct the signals here."""
        mask = kick.mask_in_guest()
        self._call(IOCTLS["KVM_SET_SIGNAL_MASK"], ctypes.addressof(mask))
        if self._timer is not None:
            self._timer.delete()
        self._timer = kick.KickTimer()
        self._tid = tid
        self._heartbeat = False

    def arm(self, first: float, interval: float) -> None:
        """Have KVM_RUN interrupted in `first` seconds, then every `interval` seconds."""
        if self._timer is not None:
            self._timer.arm(first, interval)
            self._heartbeat = interval == HEARTBEAT

    def _arm(self, timeout: float | None) -> None:
        """Set the timer for a run: the timeout, and in the main thread the heartbeat, which then goes on."""
        if current_thread() is main_thread():
            if timeout is not None and timeout < HEARTBEAT:
                self.arm(max(timeout, _SOON), HEARTBEAT)
            elif not self._heartbeat:
                self.arm(HEARTBEAT, HEARTBEAT)
        elif timeout is not None:
            self.arm(max(timeout, _SOON), 0)

    def _after_error(self, number: int, deadline: float | None) -> Exit | None:
        """KVM_RUN came back with an errno: the exit that this is, or None to enter again."""
        if number == errno.EINTR:
            kicked = self.take_kick()
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if left < HEARTBEAT and not kicked:
                self.arm(max(left, _SOON), HEARTBEAT)  # the next tick shall be the deadline
            return Interrupted(left <= 0) if kicked or left <= 0 else None
        if number == errno.EAGAIN:  # a processor that waited for INIT or SIPI got one: KVM asks to be entered again
            return None
        return self.failed_run(number)

    def failed_run(self, number: int) -> Exit:
        """KVM_RUN failed with an errno that is no interruption: raise the error, unless KVM describes it as an exit."""
        if self.page.exit_reason == MEMORY_FAULT:  # the one reason that comes with an errno (KVM API, 7.35)
            return decode(self.page)
        raise self._run_error(number)

    def take_kick(self) -> bool:
        """After EINTR: forget kicks and pending signals. False when it was only the timer that ticked."""
        self.page.u8[IMMEDIATE_EXIT] = 0  # before the request is read: a kick from now on stays visible
        kicked, self._kicked = self._kicked, False
        ticked = kick.drain()
        return kicked or not ticked

    def _run_error(self, number: int) -> KvmError:
        self.page.u32[EXIT_REASON // 4] = NO_EXIT
        if number == errno.EINVAL and self._sync.dirty & SYNC_SREGS:
            return self._refused("KVM_SET_SREGS (by KVM_RUN)", number)
        return self._error(IOCTLS["KVM_RUN"], number)

    def _refused(self, name: str, number: int) -> KvmError:
        from kvmpy.errors import EntryRefusedError
        from kvmpy.kvm.advice import advice_for
        from kvmpy.x86.entry_rules import violations

        broken = violations(self.cpu_state())
        if broken:
            return EntryRefusedError(name, number, broken)
        return KvmError(name, number, advice_for("KVM_SET_SREGS", number))

    def explain_entry_failure(self, failure: FailEntry) -> "list[Violation]":
        """The VM-entry rules that the present registers break, after a `FailEntry` exit."""
        from kvmpy.x86.entry_rules import violations

        return violations(self.cpu_state())

    # Ioctls

    def _check_access(self) -> None:
        owner = self._owner.get(0)
        if owner is not None and owner != get_ident():
            raise VcpuBusyError(f"{self!r} is being run by another thread; stop or pause it first, or use kick()")
        self._check_usable()

    def _transfer(self, request: int, address: int) -> None:
        """A register ioctl of the sync area."""
        if raw_ioctl(self._ioctl_fd, ctypes.c_ulong(request), ctypes.c_void_p(address)) < 0:
            number = ctypes.get_errno()
            entry = next(entry for entry in IOCTLS.values() if entry.number == request)
            if number == errno.EINVAL and entry.name == "KVM_SET_SREGS":
                raise self._refused(entry.name, number)
            raise self._error(entry, number)

    def _call(self, entry: Ioctl, argument: int) -> int:
        self._check_access()
        if self._sync.dirty and entry.name not in _UNSEEN_BY_REGISTERS:
            self._sync.flush()
        answer = super()._call(entry, argument)
        if entry.name not in _UNSEEN_BY_REGISTERS and ("_SET_" in entry.name or entry.name == "KVM_RUN"):
            self._sync.invalidate()
        return answer

    def _enter_unsynced(self, fd: ctypes.c_int, request: ctypes.c_ulong, zero: ctypes.c_long) -> int:
        """KVM_RUN on a kernel without KVM_CAP_SYNC_REGS: registers go in before and are stale afterwards."""
        self._sync.flush()
        answer: int = raw_ioctl(fd, request, zero)
        number = ctypes.get_errno()
        self._sync.invalidate()
        ctypes.set_errno(number)
        return answer

    def _has_capability(self, capability: int) -> int:
        return self.vm.check_extension(capability)
