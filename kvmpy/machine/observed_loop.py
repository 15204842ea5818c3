"""The run loop with somebody who is told of every exit: `RunLoop.run` again, with a clock and an observer in it.

It is a loop of its own so that the other one stays free of both. A runner takes this one while it has an observer.
"""

import ctypes
import errno
from time import perf_counter_ns

from kvmpy.errors import HandlerResultError
from kvmpy.exits import Interrupted
from kvmpy.kvm.exit_decoder import MEMORY_FAULT, decode
from kvmpy.kvm.run_page import NO_EXIT, NOT_FROM_THE_GUEST
from kvmpy.machine.run_loop import IO, MMIO, RunLoop, handler_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from kvmpy._exit import Exit
    from kvmpy.kvm.run_page import RunPage

    What = tuple[Any, ...] | Exit

    class Observer(Protocol):
        """Who is told of every exit, in the thread of the vCPU and after it was handled."""

        def note(self, vcpu: int, entered: int, left: int, handled: int, what: What, value: Any, /) -> None:
            """vCPU `vcpu` was in the guest from `entered` to `left`, and the exit was handled by `handled`.

            The times are `perf_counter_ns()`. `what` is ("port" or "mmio", "read" or "write", address, size), with a
            fifth item True for a write that KVM had queued and that was no exit, or the exit itself. `value` is the
            number read or written, the bytes of a string, the answer to an MSR access (None: a #GP) or a hypercall, or
            the exception that the handler raised: then the exit stays pending and comes again.
            """


__all__ = ["run_observed"]

_HYPERCALL, _RDMSR, _WRMSR = 3, 29, 30
_INTERRUPTED = Interrupted()


def run_observed(loop: RunLoop, observer: "Observer") -> None:
    """Run as `RunLoop.run` does, which see, and tell `observer` of every exit."""
    vcpu = loop.vcpu
    enter, entry, id = vcpu.enter, vcpu.entry, vcpu.id
    u32, u64 = vcpu.page.u32, vcpu.page.u64
    ports, memory = loop.port_accesses, loop.memory_accesses
    io, mmio, no_exit = IO, MMIO, NO_EXIT
    recent, note, clock = loop.recent.append, observer.note, perf_counter_ns
    queue = loop.queue is not None
    first = 0 if loop.queue is None else loop.queue.head
    last = first + 1
    queued = _QueuedWrites(loop, observer)
    take_queued, loop.take_queued = loop.take_queued, loop.guard(queued.take)
    entered = left = clock()
    try:
        loop.forget_old_handlers()
        if u32[2] in NOT_FROM_THE_GUEST:
            loop.items_done = 0
        elif _handle(loop, observer, entered, left):
            return
        while True:
            entered = clock()
            answer = enter(*entry)
            left = clock()
            if answer < 0:
                number = ctypes.get_errno()
                if queue and u32[first] != u32[last]:
                    entered, left = queued.take_after(entered, left)
                leave = loop.attend(number)
                if number == errno.EINTR:
                    note(id, entered, left, clock(), _INTERRUPTED, None)
                elif u32[2] == MEMORY_FAULT:
                    note(id, entered, left, clock(), decode(vcpu.page), None)
                u32[2] = no_exit
                if leave:
                    return
                loop.forget_old_handlers()
                continue
            if queue and u32[first] != u32[last]:
                entered, left = queued.take_after(entered, left)
            reason = u32[2]
            try:
                if reason == io:
                    access = ports[u64[4]]
                elif reason == mmio:
                    access = memory[u64[6]][u64[4]]
                else:
                    access = None
            except KeyError:
                access = None
            if access is None:
                if _handle(loop, observer, entered, left):
                    return
                continue
            call, offset, size, data, index, write, place, count = access
            if write:
                value = data[index]
                call(offset, size, value)
            else:
                value = call(offset, size)
                try:
                    data[index] = value
                except (TypeError, ValueError):
                    raise HandlerResultError(handler_name(call), value, size) from None
            u32[2] = no_exit
            access[7] = count + 1
            recent((place, value))
            note(id, entered, left, clock(), place, value)
    except BaseException as error:
        if u32[2] not in NOT_FROM_THE_GUEST and not queued.failed:
            note(id, entered, left, clock(), _what(vcpu.page), error)
        raise
    finally:
        loop.take_queued = take_queued


def _handle(loop: RunLoop, observer: "Observer", entered: int, left: int) -> bool:
    """Handle the exit that the run page holds the general way, and tell of it. True: leave the loop."""
    page = loop.vcpu.page
    reason = page.exit_reason
    value: int | bytes | None
    if reason in (IO, MMIO):
        what = _what(page)
        start, size, count = _data(page)
        leave = loop.handle()
        data = page.u8[start : start + size * count].tobytes()
        value = int.from_bytes(data, "little") if count == 1 else data
    else:
        leave = loop.handle()
        what = loop.recent[-1][1]
        value = None
        if reason == _HYPERCALL:
            value = page.u64[11]
        elif reason in (_RDMSR, _WRMSR) and not page.u8[32]:
            value = page.u64[6]
    observer.note(loop.vcpu.id, entered, left, perf_counter_ns(), what, value)
    return leave


def _what(page: "RunPage") -> "What":
    """What the exit in the run page is about; for the offsets see `kvmpy.kvm.exit_decoder`."""
    if page.exit_reason == IO:
        return "port", "write" if page.u8[32] else "read", page.u16[17], page.u8[33]
    if page.exit_reason == MMIO:
        return "mmio", "write" if page.u8[52] else "read", page.u64[4], page.u32[12]
    return decode(page)


def _data(page: "RunPage") -> tuple[int, int, int]:
    """Where the data of an access is, the size of an item, and how many there are."""
    if page.exit_reason == IO:
        return page.u64[5], page.u8[33], page.u32[9]
    return 40, page.u32[12], 1


class _QueuedWrites:
    """Takes what KVM has queued, in place of the loop's own `take_queued`, and tells of each write."""

    def __init__(self, loop: RunLoop, observer: "Observer") -> None:
        self._loop = loop
        self._note = observer.note
        self._entered = self._left = 0
        self.failed = False
        """Whether a handler of the writes that were taken last raised."""

    def take_after(self, entered: int, left: int) -> tuple[int, int]:
        """Handle what was written in the guest from `entered` to `left`; answers when that was done, twice.

        The time in the guest is counted to the first write, and none is left for the exit that follows.
        """
        self._entered, self._left = entered, left
        self._loop.take_queued()
        entered, left = self._entered, self._left  # the same as before when another vCPU took the writes meanwhile
        self._left = 0
        return entered, left

    def take(self) -> None:
        """Handle what is queued."""
        if self._loop.queue is not None:
            self._loop.queue.take(self._write)

    def _write(self, port: bool, address: int, size: int, value: int) -> None:
        what = ("port" if port else "mmio", "write", address, size, True)
        left = self._left or perf_counter_ns()
        entered = self._entered if self._left else left
        self.failed = True
        try:
            self._loop.queued_write(port, address, size, value)
        except BaseException as error:
            self._note(self._loop.vcpu.id, entered, left, perf_counter_ns(), what, error)
            raise
        self.failed = False
        handled = perf_counter_ns()
        if self._left:
            self._entered = self._left = handled
        self._note(self._loop.vcpu.id, entered, left, handled, what, value)
