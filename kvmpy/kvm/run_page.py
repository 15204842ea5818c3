"""`struct kvm_run`, which a vCPU shares with the kernel (KVM API, chapter 5), as memoryviews made once per vCPU."""

import mmap

from kvmpy.errors import ClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = [
    "EXIT_REASON",
    "IMMEDIATE_EXIT",
    "NOT_FROM_THE_GUEST",
    "NO_EXIT",
    "PIO_DATA",
    "SYNC_REGS",
    "SYNC_SREGS",
    "ClosedRunPage",
    "RunPage",
]

# Offsets in bytes into struct kvm_run; kvmpy.abi.structs.run has the whole layout, and a test compares the two.
IMMEDIATE_EXIT = 1
EXIT_REASON = 8
READY_FOR_INTERRUPT = 12
IF_FLAG = 13
FLAGS = 14
EXIT_DATA = 32
"""The union with one member per exit reason."""
IO_DIRECTION = 32
MMIO_IS_WRITE = 52
VALID_REGS = 288
DIRTY_REGS = 296
REGS = 304
SREGS = 448
PIO_DATA = 0x1000
"""Port data is at KVM_PIO_PAGE_OFFSET, one page after the start of the run structure."""

NO_EXIT = 0xFFFF_FFFF
"""Stored as exit_reason once an exit is handled: whatever else is there is an exit that nobody has handled yet.

KVM sets the reason on every successful KVM_RUN, so no exit is lost or handled twice even when an exception (Ctrl-C, a
handler's own) breaks in anywhere between KVM_RUN and the end of the handler.
"""

NOT_FROM_THE_GUEST = (NO_EXIT, 0, 10)
"""What exit_reason may hold when KVM_RUN came back with an errno: nothing, KVM_EXIT_UNKNOWN, KVM_EXIT_INTR.

Only an exception that broke in before the errno was seen leaves one of these behind; the guest is to be entered again.
"""

SYNC_REGS, SYNC_SREGS = 1, 2  # KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS


class RunPage:
    """The mapping of one vCPU's kvm_run.

    `u8`, `u16`, `u32` and `u64` are the whole mapping as items of that width: a field at byte offset o is u32[o // 4].
    `runs` is a cell that counts how often the vCPU was entered, by which an exit knows whether it is still the last.
    """

    __slots__ = ("_u16", "runs", "size", "u8", "u32", "u64")

    def __init__(self, fd: int, size: int) -> None:
        mapping = mmap.mmap(fd, size)  # shared and writable by default; unmapped with the last view of it
        self.size = size
        self.u8 = memoryview(mapping)
        self._u16: memoryview | None = None  # made when it is asked for
        self.u32 = self.u8.cast("I")
        self.u64 = self.u8.cast("Q")
        self.runs = [0]
        self.u32[EXIT_REASON // 4] = NO_EXIT

    @property
    def u16(self) -> memoryview:
        if self._u16 is None:
            self._u16 = self.u8.cast("H")
        return self._u16

    @property
    def exit_reason(self) -> int:
        """KVM_EXIT_*: why the last KVM_RUN came back. Meaningless when it came back with an error."""
        return self.u32[EXIT_REASON // 4]

    @property
    def immediate_exit(self) -> bool:
        """While set, KVM_RUN completes a pending operation and comes back with EINTR instead of entering the guest."""
        return self.u8[IMMEDIATE_EXIT] != 0

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self.u8[IMMEDIATE_EXIT] = value

    @property
    def request_interrupt_window(self) -> bool:
        """While set, KVM_RUN exits as soon as the guest can take an interrupt (VMs without an in-kernel irqchip)."""
        return self.u8[0] != 0

    @request_interrupt_window.setter
    def request_interrupt_window(self, value: bool) -> None:
        self.u8[0] = value

    @property
    def ready_for_interrupt_injection(self) -> bool:
        """Whether KVM_INTERRUPT would be delivered at once."""
        return self.u8[READY_FOR_INTERRUPT] != 0

    @property
    def if_flag(self) -> bool:
        """The guest's interrupt flag, RFLAGS.IF, at the last exit."""
        return self.u8[IF_FLAG] != 0

    @property
    def flags(self) -> int:
        """KVM_RUN_X86_*: bit 0 system management mode, bit 1 bus lock, bit 2 nested guest."""
        return self.u16[FLAGS // 2]

    def drop(self) -> None:
        """Let go of the mapping, which keeps the VM alive in the kernel, and of the chance to answer exits."""
        self.runs[0] += 1
        for view in (self.u64, self.u32, self._u16, self.u8):
            if view is not None:
                view.release()


class ClosedRunPage:
    """Stands in for the page of a closed vCPU, and for what was done with it: every use raises ClosedError."""

    __slots__ = ("_vcpu",)

    def __init__(self, vcpu: int) -> None:
        self._vcpu = vcpu

    def __call__(self, *_: object) -> "NoReturn":
        raise ClosedError(f"<Vcpu {self._vcpu} closed> was used after it was closed")

    __getattr__ = __call__
