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
    loop.forget_old_handlers()
    take_queued = loop.take_queued
    loop.take_queued = _observed_queue(loop, observer)
    entered = left = clock()
    try:
        if u32[2] in NOT_FROM_THE_GUEST:
            loop.forget_items()
        elif _handle(loop, observer, entered, left):
            return
        while True:
            entered = clock()
            answer = enter(*entry)
            left = clock()
            if answer < 0:
                number = ctypes.get_errno()
                if queue and u32[first] != u32[last]:
                    loop.take_queued()
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
                loop.take_queued()
                left = clock()
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
        if u32[2] not in NOT_FROM_THE_GUEST:
            note(id, entered, left, clock(), _what(loop), error)
        raise
    finally:
        loop.take_queued = take_queued


def _handle(loop: RunLoop, observer: "Observer", entered: int, left: int) -> bool:
    """Handle the exit that the run page holds the general way, and tell of it. True: leave the loop."""
    page = loop.vcpu.page
    reason = page.exit_reason
    if reason in (IO, MMIO):
        what = _what(loop)
        leave = loop.handle()
        value = _transferred(loop)
    else:
        leave = loop.handle()
        what = loop.recent[-1][1]
        value = _answered(loop, reason)
    observer.note(loop.vcpu.id, entered, left, perf_counter_ns(), what, value)
    return leave


def _what(loop: RunLoop) -> "What":
    """What the exit in the run page is about."""
    page = loop.vcpu.page
    reason = page.exit_reason
    if reason == IO:
        # direction u8 @32 (1: out), size u8 @33, port u16 @34
        return "port", "write" if page.u8[32] else "read", page.u16[17], page.u8[33]
    if reason == MMIO:
        # phys_addr u64 @32, len u32 @48, is_write u8 @52
        return "mmio", "write" if page.u8[52] else "read", page.u64[4], page.u32[12]
    return decode(page)


def _transferred(loop: RunLoop) -> "int | bytes":
    """The data of the access in the run page: a number, or the bytes of a string."""
    page = loop.vcpu.page
    if page.u64[4] is None:
        return 0
    return b""


def _answered(loop: RunLoop, reason: int) -> int | None:
    """What the guest gets for the exit in the run page; None where that is a #GP, or nothing."""
    page = loop.vcpu.page
    if reason in (_RDMSR, _WRMSR):
        return None if page.u8[32] else page.u64[6]
    return page.u64[11] if reason == _HYPERCALL else None


def _observed_queue(loop: RunLoop, observer: "Observer") -> "Any":
    """In place of `RunLoop.take_queued`: the same, and tell of each write."""

    def write(port: bool, address: int, size: int, value: int) -> None:
        began = perf_counter_ns()
        loop.queued_write(port, address, size, value)
        what = ("port" if port else "mmio", "write", address, size, True)
        observer.note(loop.vcpu.id, began, began, perf_counter_ns(), what, value)

    def take() -> None:
        if loop.queue is not None:
            loop.queue.take(write)

    return loop.guard(take)
