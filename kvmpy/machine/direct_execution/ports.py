"""IN and OUT of a guest whose ring 0 runs in ring 3: KVM comes out with them as they are, for all ports are free there.

`DirectExecution` gives them to devices as `RunLoop.run` does. Here is what is otherwise: the exits of our own code are
none for anybody else, and when a device raises an exception, the guest has to leave our context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.kvm.run_page import IO_DIRECTION, NO_EXIT, SYNC_REGS
from kvmpy.machine.direct_execution.context import DIRTY, RAX, RIP
from kvmpy.machine.direct_execution.ring_0 import STUB_CODE

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu
    from kvmpy.machine.direct_execution.memory import DirectMemory
    from kvmpy.machine.run_loop import RunLoop

__all__ = ["take_queued", "undo_access"]

_EXIT_IO = 2


def take_queued(loop: RunLoop) -> None:
    """Give queued writes to their devices: they came before whatever ended KVM_RUN."""
    page = loop.vcpu.page
    reason = page.u32[2]
    if reason == _EXIT_IO and page.u64[RIP] >> 12 == STUB_CODE >> 12:
        page.u32[2] = NO_EXIT
    loop.take_queued()
    page.u32[2] = reason


def undo_access(vcpu: Vcpu, memory: DirectMemory) -> None:
    """If the guest has just come out with IN or OUT: have it come to that again."""
    page = vcpu.page
    u64 = page.u64
    if page.u32[2] != _EXIT_IO:
        return
    rip, rax = u64[RIP], u64[RAX]
    page.u32[2] = NO_EXIT
    if page.u8[IO_DIRECTION]:  # OUT: RIP is behind it
        last = rip - 1
        code = memory.code_of(last)
        before = [] if code is None else [start for start in code.starts if start <= last & 0xFFF]
        rip = last & ~0xFFF | max(before, default=last & 0xFFF)
    else:  # KVM completes it, with whatever, and that is forgotten
        page.immediate_exit = True
        vcpu.enter(*vcpu.entry)
        page.u32[2] = NO_EXIT
    u64[RIP], u64[RAX] = rip, rax
    u64[DIRTY] |= SYNC_REGS
