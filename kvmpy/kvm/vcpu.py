"""A virtual processor: its registers, KVM_RUN, and the exits it comes back with (KVM API, chapters 4 and 5)."""

import ctypes
import errno
import time
from _thread import get_ident

from kvmpy._exit import Answered, Exit
from kvmpy.abi.ioctls import IOCTLS, KVM_RUN, Ioctl
from kvmpy.errors import KvmError
from kvmpy.exits import FailEntry, Interrupted
from kvmpy.kvm.descriptor import raw_ioctl
from kvmpy.kvm.exit_decoder import IO, MEMORY_FAULT, MMIO, decode
from kvmpy.kvm.kick import HEARTBEAT, prepare_thread
from kvmpy.kvm.register_sync import RegisterSync
from kvmpy.kvm.run_page import (
    EXIT_REASON,
    IMMEDIATE_EXIT,
    IO_DIRECTION,
    MMIO_IS_WRITE,
    NO_EXIT,
    NOT_FROM_THE_GUEST,
    SYNC_SREGS,
    ClosedRunPage,
    RunPage,
)
from kvmpy.kvm.vcpu_thread import SOON, VcpuThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Protocol

    from kvmpy.kvm.kick import PreparedThread
    from kvmpy.kvm.vm import Vm
    from kvmpy.x86.entry_rules import Violation

    class Attachment(Protocol):
        def close(self) -> None: ...


__all__ = ["Vcpu"]

_REASON = EXIT_REASON // 4
_ANSWERED = (3, 29, 30)  # KVM_EXIT_HYPERCALL, X86_RDMSR, X86_WRMSR

_UNSEEN_BY_REGISTERS = frozenset(
    (
        "KVM_SET_CPUID", "KVM_SET_CPUID2", "KVM_GET_CPUID2", "KVM_SET_SIGNAL_MASK", "KVM_ENABLE_CAP",
        "KVM_GET_XSAVE", "KVM_GET_XSAVE2", "KVM_SET_XSAVE", "KVM_GET_XCRS",
    )
)  # fmt: skip
"""Ioctls that may go ahead of dirty registers, and change none of them; CPUID must: it decides which CR4 bits
KVM_SET_SREGS takes."""

_CHANGE_REGISTERS = frozenset(("KVM_RUN", "KVM_INTERRUPT", "KVM_GET_MP_STATE"))
"""Ioctls besides KVM_SET_* that change registers: the last two queue an interrupt, or act on a pending INIT or SIPI."""


class Vcpu(VcpuThread):
    """One virtual processor of a `Vm`; made by `Vm.create_vcpu`.

    `regs` and `sregs` are its registers; `run()` enters the guest and answers with the next exit; `exits()` does so
    for ever. The rest of its state (FPU, MSRs, events, local APIC ...) has get and set methods named like the ioctls.

    A vCPU belongs to one thread at a time. While a thread runs it, every use from another one but `kick()` raises
    VcpuBusyError at once, because the kernel would block it until the guest exits.
    """

    kind = "vcpu"
    backlog: "tuple[Exit, ...]" = ()
    """Exits that settle() met and that nobody has had yet."""
    last_exit: Exit | None = None
    _answerable = 0  # which entry gave the last exit that KVM waits for an answer to
    _attachments: "tuple[Attachment, ...]" = ()  # what else maps this vCPU's file descriptor, closed with it

    def __init__(self, fd: int, vm: "Vm", id: int, page_size: int, *, sync_regs: bool) -> None:
        self.id = id
        super().__init__(fd)
        try:
            self.page = RunPage(fd, page_size)
        except BaseException:
            super().close()
            raise
        self._vm = vm
        self._sync = RegisterSync(
            self.page, synced=sync_regs, check=self._check_access, transfer=self._transfer, pending=self._pending
        )
        # KVM_RUN and its arguments, built once: `vcpu.enter(*vcpu.entry)` is the whole cost of an entry.
        self.enter: Callable[[int, int, int], int] = raw_ioctl if sync_regs else self._enter_unsynced
        # Plain ints: ctypes makes an object of each c_int and c_ulong that it is given, 70 ns for the three.
        self.entry = (fd, KVM_RUN, 0)

    def close(self) -> None:
        """Close the vCPU; its registers and unanswered exits are dead afterwards.

        Raises VcpuBusyError while another thread runs it.
        """
        if self._fd < 0:
            return
        if self._owner and not self._forked:
            self.check_idle()
        super().close()
        # What refers to the mapping, or in a circle to this object, goes now and not with the next garbage collection.
        for attachment in self._attachments:
            attachment.close()
        self._attachments = ()
        self._drop_registers()
        closed = ClosedRunPage(self.id)
        self._sync.close(closed)
        self.enter, self.entry = raw_ioctl, (-1, KVM_RUN, 0)
        self.page.drop()
        self.page = closed  # type: ignore[assignment]
        self._vm = None

    def __repr__(self) -> str:
        return f"<Vcpu {self.id} {'closed' if self.closed else f'fd {self._fd}'}>"

    def attach(self, attachment: "Attachment") -> None:
        """Have something closed with the vCPU, because it maps the vCPU's file descriptor."""
        self._check_usable()
        self._attachments = (*self._attachments, attachment)

    # Running

    def run(self, timeout: float | None = None) -> Exit:
        """Enter the guest and answer with the next exit.

        EINTR is an `Interrupted` exit: after `kick()`, after a signal to this thread, or when `timeout` seconds are
        over (`timed_out`). A signal handler that wants to end the run for sure calls `kick()`, or raises: what it
        raises, KeyboardInterrupt too, surfaces between exits, and an exit that has already happened comes with the next
        call. Raises KvmError when KVM_RUN fails, EntryRefusedError when the registers that were set break KVM's rules,
        VcpuBusyError when another thread runs this vCPU.
        """
        here = prepare_thread()
        if here.unblocked:
            return self._run_in_handler(here, timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            self._claim(here)
            page = self.page
            reasons = page.u32
            event: Exit | None = None
            if self.backlog:
                event = self.last_exit = self.backlog[0]
                self.backlog = self.backlog[1:]
                self._owner = {}
                return event
            if reasons[_REASON] in NOT_FROM_THE_GUEST:
                if self._kicked:  # perhaps an exception broke in while the kick was being taken
                    page.u8[IMMEDIATE_EXIT] = 1
                if here.needs_heartbeat:
                    here.start_heartbeat()
                if timeout is not None:
                    self._arm_for_run(here, timeout)
                page.runs[0] += 1
                reasons[_REASON] = NO_EXIT
                while self.enter(*self.entry) < 0:
                    event = self._after_error(ctypes.get_errno(), deadline)
                    reasons[_REASON] = NO_EXIT
                    if event is not None:
                        break
            if event is None:
                event = self.last_exit = decode(page)
                self._answerable = page.runs[0] if isinstance(event, Answered) else 0
        except BaseException:
            if 0 in self._owner and self._owner[0] == here.ident:
                self._owner = {}
            raise
        # From here to the caller nothing is called: CPython lets a signal handler break in only at calls and loops, so
        # an exit that counts as delivered has reached the caller's variable.
        reasons[_REASON] = NO_EXIT
        self._owner = {}
        return event

    def _run_in_handler(self, thread: "PreparedThread", timeout: float | None) -> Exit:
        """`run` in a thread that has the kick signal unblocked: called by a device's handler, in a machine's run."""
        event: Exit | None = None
        try:
            thread.block()
            event = self.run(timeout)
            thread.unblock()
        except BaseException:
            thread.unblock()
            if event is not None:  # an exception broke in behind it
                self.backlog = (event, *self.backlog)
            raise
        return event

    def exits(self, timeout: float | None = None) -> "Iterator[Exit]":
        """Run the guest for ever, one exit after the other; `timeout` seconds for each. Leave the loop to stop."""
        while True:
            yield self.run(timeout)

    def settle(self, handle: "Callable[[Exit], object] | None" = None) -> None:
        """Complete what the last exit left pending, without running the guest on (KVM API, chapter 5, immediate_exit).

        After an `in` or an MMIO read the instruction completes only when KVM_RUN is entered again, and a wide access
        comes as several exits. Call this, having answered the last exit, before registers are read or saved.
        `handle` gets each further exit (and one that has happened but was never delivered) and answers it. Without it
        reads give all ones, and all exits but reads come again from the next `run()`.
        """
        nested = self._owner.get(0) == get_ident()  # called by a handler in the midst of a run
        self.claim()
        try:
            page = self.page
            if page.u32[_REASON] in NOT_FROM_THE_GUEST:
                page.u32[_REASON] = NO_EXIT
            while True:
                if page.u32[_REASON] == NO_EXIT:
                    page.u8[IMMEDIATE_EXIT] = 1
                    page.runs[0] += 1
                    if self.enter(*self.entry) < 0:
                        number = ctypes.get_errno()
                        self._sync.completed()
                        page.u8[IMMEDIATE_EXIT] = self._kicked
                        page.u32[_REASON] = NO_EXIT
                        if number not in (errno.EINTR, errno.EAGAIN):
                            raise self._run_error(number)
                        return
                event = self.last_exit = decode(page)
                self._answerable = page.runs[0] if isinstance(event, Answered) else 0
                if handle is not None:
                    handle(event)
                elif not isinstance(event, Answered):
                    self.backlog = (*self.backlog, event)
                page.u32[_REASON] = NO_EXIT
        finally:
            if not nested:
                self.release()

    def _after_error(self, number: int, deadline: float | None) -> Exit | None:
        """KVM_RUN came back with an errno: the exit that this is, or None to enter again."""
        if number == errno.EINTR:
            foreign = self._interruption()
            left = HEARTBEAT if deadline is None else deadline - time.monotonic()
            if 0 < left < HEARTBEAT and prepare_thread().is_main:
                self.arm(max(left, SOON), HEARTBEAT)  # the next tick shall be the deadline
            by_kick, by_timeout = Interrupted(), Interrupted(True)
            # Nothing is called from here on: see the end of run().
            kicked = self._kicked or foreign
            self._kicked = False
            if kicked:
                return by_kick
            return by_timeout if left <= 0 else None
        if number == errno.EAGAIN:  # a processor that waited for INIT or SIPI got one: KVM asks to be entered again
            return None
        return self.failed_run(number)

    def failed_run(self, number: int) -> Exit:
        """KVM_RUN failed with an errno that is no interruption: raise the error, unless KVM describes it as an exit."""
        if self.page.exit_reason == MEMORY_FAULT:  # the one reason that comes with an errno (KVM API, 7.35)
            return decode(self.page)
        raise self._run_error(number)

    def _pending(self) -> bool:
        """Whether KVM waits to complete a read, an MSR access or a hypercall (KVM API, chapter 5)."""
        page = self.page
        reason = page.u32[_REASON]
        if reason == NO_EXIT:
            return self._answerable == page.runs[0] != 0
        if reason == IO:
            return not page.u8[IO_DIRECTION]
        return reason in _ANSWERED or (reason == MMIO and not page.u8[MMIO_IS_WRITE])

    def _run_error(self, number: int) -> KvmError:
        self.page.u32[_REASON] = NO_EXIT
        if number == errno.EINVAL and self._sync.dirty & SYNC_SREGS:
            from kvmpy.kvm.entry_refusal import refused_sregs

            self._sync.restore_refused()
            return refused_sregs(self, "KVM_SET_SREGS (by KVM_RUN)", number)
        return self._error(IOCTLS["KVM_RUN"], number)

    def explain_entry_failure(self, failure: FailEntry) -> "list[Violation]":
        """The rules behind a `FailEntry` exit: those of the processor's maker that the present registers break.

        An empty list means that the cause lies in a field that only KVM writes.
        """
        from kvmpy.kvm.entry_refusal import explain_entry_failure

        return explain_entry_failure(self, failure)

    # Ioctls

    def _check_access(self) -> None:
        self._check_usable()
        if self._owner:
            self.check_idle()

    def _transfer(self, request: int, address: int) -> None:
        """A register ioctl of the sync area."""
        if raw_ioctl(self._fd, request, ctypes.c_void_p(address)) < 0:
            number = ctypes.get_errno()
            entry = next(entry for entry in IOCTLS.values() if entry.number == request)
            if number == errno.EINVAL and entry.name == "KVM_SET_SREGS":
                from kvmpy.kvm.entry_refusal import refused_sregs

                raise refused_sregs(self, entry.name, number)
            raise self._error(entry, number)

    def _call(self, entry: Ioctl, argument: "Any" = 0) -> int:
        self._check_access()
        if self._sync.dirty and entry.name not in _UNSEEN_BY_REGISTERS:
            self._sync.flush()
        answer = super()._call(entry, argument)
        if ("_SET_" in entry.name and entry.name not in _UNSEEN_BY_REGISTERS) or entry.name in _CHANGE_REGISTERS:
            self._sync.invalidate()
        return answer

    def prepared(self, name: str, argument: "Any" = None) -> "Callable[[], int]":
        """As `Descriptor.prepared`; what the ioctl means for the registers is looked up once, too."""
        entry, checked = self._checked(name, argument)
        if name not in _UNSEEN_BY_REGISTERS:
            return lambda: self._call(entry, checked)
        number = entry.number

        def call() -> int:
            self._check_access()
            answer: int = raw_ioctl(self._fd, number, checked)
            if answer < 0:
                raise self._error(entry, ctypes.get_errno())
            return answer

        return call

    def _enter_unsynced(self, fd: int, request: int, zero: int) -> int:
        """KVM_RUN on a kernel without KVM_CAP_SYNC_REGS: registers go in before and are stale afterwards."""
        self._sync.flush()
        answer: int = raw_ioctl(fd, request, zero)
        number = ctypes.get_errno()
        self._sync.invalidate()
        ctypes.set_errno(number)
        return answer

    def _has_capability(self, capability: int) -> int:
        return self.vm.check_extension(capability)
