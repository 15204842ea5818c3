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
from kvmpy.kvm.run_page import IMMEDIATE_EXIT
from kvmpy.kvm.vcpu_registers import VcpuRegisters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.kvm.kick import KickTimer, PreparedThread
    from kvmpy.kvm.register_sync import RegisterSync

__all__ = ["HEARTBEAT", "SOON", "VcpuThread"]

HEARTBEAT = 0.05
"""Seconds. So often KVM_RUN comes back in the main thread, because only there does Python handle Ctrl-C."""

SOON = 1e-6
"""Seconds: as short as a timer gets without being disarmed."""


class VcpuThread(VcpuRegisters):
    """Claims, kicks and ticks. Mixed into `Vcpu`."""

    _sync: "RegisterSync"

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._owner: dict[int, int] = {}  # {0: thread}: setdefault is atomic, which is all the lock it takes
        self._thread: PreparedThread | None = None  # which signals reach
        self._masked: PreparedThread | None = None  # for which KVM has a signal mask
        self._timer: KickTimer | None = None
        self._heartbeat = False
        self._kicked = False

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
        self._check_usable()
        thread = get_ident()
        while self._owner.setdefault(0, thread) != thread:
            self.check_idle()  # if that does not raise, it was released a moment ago
        here = kick.prepare_thread()
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
        self._timer = kick.borrow_timer()
        self._thread = thread
        self._heartbeat = False

    def _set_mask(self, thread: "PreparedThread") -> None:
        """Have KVM let the kick signal through inside KVM_RUN; in a thread that has it unblocked, leave its mask."""
        # Should an exception break in, a mask that nobody needs does no harm, but one that is missing would.
        self._masked = None
        if thread.unblocked:
            self._call(IOCTLS["KVM_SET_SIGNAL_MASK"], 0)
        else:
            mask = kick.mask_in_guest()
            self._call(IOCTLS["KVM_SET_SIGNAL_MASK"], ctypes.addressof(mask))
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

        In a thread that has the kick signal unblocked, a tick that comes outside KVM_RUN is lost.
        """
        if (timer := self._timer) is None:
            return
        # A signal that the timer has already sent stays pending and would end the next KVM_RUN; what is more, since
        # Linux 6.13 sigtimedwait does not find it any more once the timer is set anew. So: stop, sweep, start.
        self._heartbeat = False
        if timer.armed:
            timer.arm(0)
            if kick.drain() is kick.SENT:
                self._kicked = True
                self.page.u8[IMMEDIATE_EXIT] = 1
            timer.armed = False  # not before: an exception may break in anywhere here
        if first:
            timer.arm(first, interval)
            self._heartbeat = interval == HEARTBEAT

    def _arm_for_run(self, timeout: float | None) -> None:
        """Set the timer for one exit: the timeout, and in the main thread the heartbeat, which then goes on."""
        if self._thread is not None and self._thread.is_main:
            if timeout is not None and timeout < HEARTBEAT:
                self.arm(max(timeout, SOON), HEARTBEAT)
            elif not self._heartbeat:
                self.arm(HEARTBEAT, HEARTBEAT)
        elif timeout is not None:
            self.arm(max(timeout, SOON), 0)
