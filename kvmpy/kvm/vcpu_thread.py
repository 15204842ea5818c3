"""The thread that runs a vCPU: which one it is, and how it is brought out of the guest by kicks and ticks.

A vCPU belongs to the thread that has claimed it. With the claim the vCPU is tuned to how that thread takes the kick
signal (see `kvmpy.kvm.kick`). Where the signal is blocked, as a rule, KVM opens it inside KVM_RUN: what is pending then
says who interrupted. In a thread that has it unblocked, which the run loop of a `Machine` does for its time, KVM has
nothing to open, so KVM_RUN is cheaper, nothing is ever pending, and only `kick()` leaves a trace.
"""

import ctypes
from _thread import get_ident

from kvmpy.abi.ioctls import IOCTLS
from kvmpy.errors import VcpuBusyError
from kvmpy.kvm import kick
from kvmpy.kvm.descriptor import raw_ioctl
from kvmpy.kvm.kick import HEARTBEAT, prepare_thread
from kvmpy.kvm.run_page import IMMEDIATE_EXIT
from kvmpy.kvm.vcpu_registers import VcpuRegisters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.kvm.kick import KickTimer, PreparedThread

__all__ = ["SOON", "VcpuThread"]

SOON = 1e-6
"""Seconds: as short as a timer gets without being disarmed."""

_SET_SIGNAL_MASK = IOCTLS["KVM_SET_SIGNAL_MASK"]


class VcpuThread(VcpuRegisters):
    """Claims, kicks and ticks. Mixed into `Vcpu`."""

    _thread: "PreparedThread | None" = None  # which signals reach
    _masked: "PreparedThread | None" = None  # for which KVM has a signal mask
    _timer: "KickTimer | None" = None  # of _thread
    _kicked = False

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._owner: dict[int, int] = {}  # {0: thread}: setdefault is atomic, which is all the lock it takes

    def close(self) -> None:
        """Close the vCPU and give its timer back."""
        super().close()
        if self._timer is not None:
            self.arm(0, 0)
            kick.give_back(self._timer)
            self._timer = None

    # Claims

    def check_idle(self) -> None:
        """Raise VcpuBusyError when another thread runs this vCPU."""
        owner = self._owner.get(0)
        if owner is not None and owner != get_ident():
            raise VcpuBusyError(f"{self!r} is being run by another thread; stop or pause it first, or use kick()")

    def claim(self) -> None:
        """Make the calling thread the one that runs this vCPU. Raises VcpuBusyError when there is another."""
        self._claim(prepare_thread())

    def _claim(self, here: "PreparedThread") -> None:
        self._check_usable()
        while self._owner.setdefault(0, here.ident) != here.ident:
            self.check_idle()  # if that does not raise, it was released a moment ago
        if here is not self._thread:
            self._adopt(here)
        if self._masked is not (None if here.unblocked else here):
            self._set_mask(here)
        self._sync.before_run()

    def release(self) -> None:
        """Let other threads use the vCPU again. Nothing happens in a thread that has not claimed it."""
        if self._owner.get(0) == get_ident():
            self._owner = {}

    def _adopt(self, thread: "PreparedThread") -> None:
        """The first run in this thread: direct the signals here."""
        if self._timer is not None:
            self._timer.delete()
            self._timer = None
        self._thread = thread

    def _set_mask(self, thread: "PreparedThread") -> None:
        """Have KVM let the kick signal through inside KVM_RUN; in a thread that has it unblocked, leave its mask."""
        # Should an exception break in, a mask that nobody needs does no harm, but one that is missing would.
        self._masked = None
        argument = 0 if thread.unblocked else ctypes.byref(kick.mask_in_guest())
        if raw_ioctl(self._fd, _SET_SIGNAL_MASK.number, argument) < 0:
            raise self._error(_SET_SIGNAL_MASK, ctypes.get_errno())
        if not thread.unblocked:
            self._masked = thread

    # Kicks

    def kick(self) -> None:
        """Bring the vCPU out of the guest, from any thread: its present or next run answers with `Interrupted`."""
        self._check_usable()
        self._kicked = True
        self.page.u8[IMMEDIATE_EXIT] = 1
        owner, thread = self._owner.get(0), self._thread
        # Nobody needs a signal who runs this very line, or has just claimed the vCPU and is not yet known here.
        if thread is not None and owner == thread.ident != get_ident():
            kick.send(thread.tid)

    def take_kick(self) -> bool:
        """After EINTR: forget kicks and pending signals. False when it was only the timer that ticked.

        In a thread that has the kick signal unblocked: False when nobody has called `kick()`.
        """
        foreign = self._interruption()
        kicked = self._kicked
        self._kicked = False
        return kicked or foreign

    def _interruption(self) -> bool:
        """After EINTR: sweep the signals, and let registers go that were held back. True: it was a foreign signal."""
        completed = self._sync.completed()
        self.page.u8[IMMEDIATE_EXIT] = 0  # before the request is read: a kick from now on stays visible
        if self._masked is None:
            return False
        found = kick.drain()
        return found == kick.SENT or (found == kick.NOTHING and not completed)

    # Ticks

    def arm(self, first: float, interval: float) -> None:
        """Have KVM_RUN interrupted in `first` seconds, then every `interval` seconds (`first` 0: not any more).

        Called by the thread that has claimed the vCPU. Where it has the kick signal unblocked, a tick that comes
        outside KVM_RUN is lost.
        """
        # A signal that the timer has already sent stays pending and would end the next KVM_RUN; what is more, since
        # Linux 6.13 sigtimedwait does not find it any more once the timer is set anew. So: stop, sweep, start.
        timer = self._timer
        if timer is not None and timer.armed:
            timer.arm(0)
            if kick.drain() is kick.SENT:
                self._kicked = True
                self.page.u8[IMMEDIATE_EXIT] = 1
            timer.armed = False  # not before: an exception may break in anywhere here
        if first:
            if timer is None:
                timer = self._timer = kick.borrow_timer()
            timer.arm(first, interval)

    def _arm_for_run(self, thread: "PreparedThread", timeout: float) -> None:
        """Set the timer to the timeout of one exit, unless the main thread's heartbeat will do until it is near."""
        if not (thread.is_main and timeout >= HEARTBEAT):
            self.arm(max(timeout, SOON), HEARTBEAT)
