"""Getting a thread out of KVM_RUN without luck: one signal, and timers that send it.

Signal mask and timers are the thread's, made once and lent to the vCPUs that it runs, so that VMs that come and go do
not pay for them. No Python-level signal handler, which would run late and only in the main thread, is involved.

A signal can arrive at the worst moment, between the last look at the requests and KVM_RUN. There are two ways:

* **Blocked**, as a rule. The signal is blocked in every thread that runs a vCPU, and KVM_SET_SIGNAL_MASK opens it
  inside KVM_RUN only. So it stays pending, ends KVM_RUN at once, and is swept up afterwards: none is lost, whoever
  sends it. But KVM then changes the thread's signal mask twice for each KVM_RUN, which costs 0.2 us and more.
* **Unblocked**, see `Unblocked`, for loops of many exits. A kick does not need the signal to stay pending: it stores
  `immediate_exit` in kvm_run before (KVM API, chapter 5), at which KVM_RUN comes back at once. Only the tick of a timer
  can be lost. That is no matter where the next one will do as well; whoever waits for a certain one, a deadline, stays
  with the first way.
"""

import ctypes
import os
from _thread import _local, get_ident, get_native_id  # threading itself costs 3 ms of `import kvmpy`

from kvmpy.errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal  # the same functions without the enums that signal makes of numbers: another 4 ms

__all__ = [
    "HEARTBEAT",
    "KICK_SIGNAL",
    "NOTHING",
    "SENT",
    "TICKED",
    "KickTimer",
    "PreparedThread",
    "SignalMask",
    "Unblocked",
    "borrow_timer",
    "drain",
    "give_back",
    "mask_in_guest",
    "prepare_thread",
    "send",
]

KICK_SIGNAL = signal.SIGRTMIN + 5
"""A real-time signal that nothing else is known to use (glibc takes the first two, debuggers none of this range)."""

HEARTBEAT = 0.05
"""Seconds. So often KVM_RUN comes back in the main thread, because only there does Python handle Ctrl-C."""

_SI_TIMER = -2  # siginfo.si_code of a POSIX timer (<bits/siginfo-consts.h>)
_SIGEV_THREAD_ID = 4
_SYS_TGKILL = 234  # x86-64
_CLOCK_MONOTONIC = 1

_LONGEST = 1e9
"""Seconds, 30 years: time_t has no infinity."""

_libc = ctypes.CDLL(None, use_errno=True)
_this_thread = _local()
_process = os.getpid()


def _start_anew() -> None:
    """In a child of fork: its thread has another id than the one that it is a copy of, and none of its timers."""
    global _this_thread, _process
    _process = os.getpid()  # first: the timers of the parent are dropped with the next line
    _this_thread = _local()


os.register_at_fork(after_in_child=_start_anew)


class SignalMask(ctypes.Structure):
    """struct kvm_signal_mask with the kernel's 64-bit signal set (KVM API, section 4.21)."""

    _fields_ = [("len", ctypes.c_uint32), ("sigset", ctypes.c_uint8 * 8)]


class _Sigevent(ctypes.Structure):
    """struct sigevent (<bits/types/sigevent_t.h>), for SIGEV_THREAD_ID."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("rest", ctypes.c_byte * 44),
    ]


class _Itimerspec(ctypes.Structure):
    """struct itimerspec: interval and first expiry, each in seconds and nanoseconds."""

    _fields_ = [
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    ]


_STOP = ctypes.byref(_Itimerspec())
_SPARE_TIMERS = 4
"""How many a thread keeps. They end with it."""


_JUST_THIS = (KICK_SIGNAL,)


class PreparedThread:
    """A thread that runs vCPUs. Unlike its ids, Python's `ident` and Linux's `tid`, no other thread ever is it."""

    __slots__ = ("ident", "is_main", "needs_heartbeat", "tid", "unblocked")

    def __init__(self) -> None:
        self.ident, self.tid = get_ident(), get_native_id()
        self.is_main = self.tid == _process
        """Whether it is the thread in which Python handles signals: Linux numbers it like the process."""
        self.needs_heartbeat = self.is_main
        self.unblocked = False
        """Whether the kick signal is delivered wherever the thread is, to no effect but that KVM_RUN comes back."""

    # All are called by this thread.

    def start_heartbeat(self) -> None:
        """Have every KVM_RUN of this thread come back at the next heartbeat.

        The timer beats on for good, which costs nothing: outside KVM_RUN its signal stays pending, and stops it.
        """
        timer = KickTimer()
        timer.arm(HEARTBEAT, HEARTBEAT)
        _this_thread.heart = timer
        self.needs_heartbeat = False

    # `finally`: an exception of a signal handler can break in behind the system call.

    def block(self) -> None:
        """Have the kick signal stay pending outside KVM_RUN: the rule."""
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, _JUST_THIS)
        finally:
            self.unblocked = False

    def unblock(self) -> None:
        """The contrary."""
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _JUST_THIS)
        finally:
            self.unblocked = True


class Unblocked:
    """A context: the calling thread takes the kick signal anywhere, and its vCPUs need no mask in KVM_RUN.

    Nothing changes unless `wanted`, nor when somebody else has a handler for the signal, who would be called then.
    """

    __slots__ = ("_thread", "_wanted")

    def __init__(self, wanted: bool) -> None:
        self._thread = prepare_thread()
        self._wanted = wanted and not self._thread.unblocked  # a run in a handler of a run changes nothing

    def __enter__(self) -> None:
        if self._wanted:
            self._wanted = _handler_is_ours()
            if self._wanted:
                self._thread.unblock()

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            self._thread.block()


def prepare_thread() -> PreparedThread:
    """Block the kick signal in the calling thread, once, and answer which thread it is."""
    thread: PreparedThread | None = getattr(_this_thread, "prepared", None)
    if thread is None:
        thread = PreparedThread()
        thread.block()
        _survive_unblocking()
        _this_thread.timers = []
        _this_thread.mask = None
        _this_thread.prepared = thread
    return thread


_DOES_NOTHING = ctypes.cast(_libc.abs, ctypes.c_void_p)
"""A handler for the kick signal: C's abs() takes an int, as every signal handler does, and has no effect."""


def _survive_unblocking() -> None:
    """Give the signal a handler that does nothing: should somebody unblock it, the default would kill the process.

    Python's own signal.signal would do only in the main thread. A handler that somebody has set already is left alone.
    """
    _libc.signal.restype = ctypes.c_void_p
    previous = _libc.signal(KICK_SIGNAL, _DOES_NOTHING)
    if previous not in (None, 0, _DOES_NOTHING.value):
        _libc.signal(KICK_SIGNAL, ctypes.c_void_p(previous))


def _handler_is_ours() -> bool:
    """Whether the signal still has the handler that does nothing."""
    action = (ctypes.c_void_p * 32)()  # struct sigaction, 152 bytes, which begins with the handler
    _libc.sigaction(KICK_SIGNAL, None, action)
    return bool(action[0] == _DOES_NOTHING.value)


def mask_in_guest() -> SignalMask:
    """What KVM_SET_SIGNAL_MASK gets: the calling thread's own mask, with the kick signal let through."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    last: tuple[set[int], SignalMask] | None = _this_thread.mask
    if last is not None and last[0] == blocked:
        return last[1]
    bits = 0
    for number in blocked:
        if number != KICK_SIGNAL:
            bits |= 1 << (number - 1)
    mask = SignalMask(8, (ctypes.c_uint8 * 8)(*bits.to_bytes(8, "little")))
    _this_thread.mask = blocked, mask
    return mask


def send(tid: int) -> None:
    """Signal one thread of this process. One that is gone, or that is not in KVM_RUN, takes no harm."""
    # tgkill rather than pthread_kill, whose argument is a pointer that dangles once the thread has ended.
    _libc.syscall(ctypes.c_long(_SYS_TGKILL), _process, tid, int(KICK_SIGNAL))


NOTHING, TICKED, SENT = range(3)


def drain() -> int:
    """Consume the pending kick signals of this thread: NOTHING was pending, only timers TICKED, or one was SENT."""
    found = NOTHING
    while (info := signal.sigtimedwait((KICK_SIGNAL,), 0)) is not None:
        if info.si_code != _SI_TIMER:
            found = SENT
        elif found == NOTHING:
            found = TICKED
    return found


def borrow_timer() -> "KickTimer":
    """A timer for a vCPU that the calling thread runs, stopped: one that it has to spare, or a new one."""
    prepare_thread()
    timers: list[KickTimer] = _this_thread.timers
    while timers:
        timer = timers.pop()
        if not timer.deleted:  # as the garbage collector does with one whose vCPU was forgotten, even if that closes
            return timer
    return KickTimer()


def give_back(timer: "KickTimer") -> None:
    """Keep a timer that is stopped and swept for the next vCPU of the calling thread; that of another thread goes."""
    if timer.thread is getattr(_this_thread, "prepared", None) and len(_this_thread.timers) < _SPARE_TIMERS:
        _this_thread.timers.append(timer)
    else:
        timer.delete()


class KickTimer:
    """A POSIX timer that sends the kick signal to the thread that creates it (timer_create(2), SIGEV_THREAD_ID)."""

    __slots__ = ("_pid", "_spec", "_timer", "_times", "armed", "thread")
    _free = _libc.timer_delete  # at hand even when the module's names are gone, at the end of the process

    def __init__(self) -> None:
        self._pid = _process
        self.thread = prepare_thread()
        self.armed = False
        """Whether it may be running, or may have sent a signal since the thread was last swept: see Vcpu.arm."""
        self._times, self._spec = (0.0, 0.0), _Itimerspec()
        event = _Sigevent(signo=int(KICK_SIGNAL), notify=_SIGEV_THREAD_ID, thread=self.thread.tid)
        self._timer: ctypes.c_void_p | None = ctypes.c_void_p()
        if _libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            self._timer = None
            raise KvmError(
                "timer_create", ctypes.get_errno(), "a vCPU needs a timer for timeouts; see RLIMIT_SIGPENDING"
            )

    def arm(self, first: float, interval: float = 0.0) -> None:
        """Send the signal in `first` seconds and then every `interval` seconds (0: only once). `first` 0 disarms."""
        if self._timer is None or self._pid != _process:  # a child has no timers, or others with the same ids
            return
        if not first:
            _libc.timer_settime(self._timer, 0, _STOP, None)
            return
        self.armed = True
        if self._times != (first, interval):
            first_ns, interval_ns = max(round(min(first, _LONGEST) * 1e9), 1), round(interval * 1e9)
            spec = _Itimerspec(*divmod(interval_ns, 10**9), *divmod(first_ns, 10**9))
            self._times, self._spec = (first, interval), spec
        _libc.timer_settime(self._timer, 0, ctypes.byref(self._spec), None)

    @property
    def deleted(self) -> bool:
        """Whether it is gone for good."""
        return self._timer is None

    def delete(self) -> None:
        """Free the timer."""
        timer, self._timer = self._timer, None
        if timer is not None and self._pid == _process:
            self._free(timer)

    def __del__(self) -> None:
        self.delete()
