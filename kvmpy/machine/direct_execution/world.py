"""Two worlds for one vCPU: the guest's own context, and ours in which ring 0 of the guest runs in ring 3.

See `kvmpy.machine.direct_execution`. Ours has page tables, GDT, IDT, TSS and a stack in memory that the guest does not
know. The guest's registers stand in the frame that the last exception left there, and in `DirectWorld`; interrupts that
come are delivered through the guest's IDT, or wait.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections import Counter
from typing import TYPE_CHECKING

from kvmpy.errors import KvmpyError
from kvmpy.kvm.run_page import NO_EXIT, REGS, SYNC_REGS, SYNC_SREGS
from kvmpy.machine.direct_execution.context import (
    AC,
    BASE,
    CR2,
    CR2_CELL,
    CR3,
    CR4,
    CR8,
    CS,
    DIRTY,
    FLAGS,
    FRAME,
    FS_BASE,
    GDT,
    GDTR,
    GS_BASE,
    IDT,
    IDTR,
    IF,
    INTERRUPTS,
    IOPL,
    JOBS,
    KEPT,
    KERNEL_GS,
    KERNEL_GS_BASE,
    NO_INTERRUPTS,
    PAGE,
    PENDING,
    RAX,
    RCX,
    RDX,
    RETURN,
    RF,
    RFLAGS,
    RIP,
    RSP,
    SAVED,
    SELECTOR_CELLS,
    SELECTORS,
    SIZE,
    SREGS_AT,
    SREGS_END,
    SS,
    TR,
    TSS,
)  # fmt: skip
from kvmpy.machine.direct_execution.memory import DirectMemory, Refused
from kvmpy.machine.direct_execution.ring_0 import (
    CLEAR_CODE,
    CODE_0,
    CODE_3,
    DATA_0,
    DATA_3,
    HLT_CODE,
    IRETQ_CODE,
    TASK,
    TSS_LIMIT,
    write_ring_0,
)

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["AREA", "DirectFailed", "DirectWorld"]

AREA = 0xF_F000_0000
"""Where the memory is, in guest-physical addresses: within the 36 bits that every processor with long mode has, above
RAM and what else a guest finds."""
_LOCAL_APIC = 0xFEE0_0000
"""The address of a message to the one that there is."""
_OURS_END = BASE + (RETURN + 1) * PAGE
_HIGHEST = 15
_CLAC = b"\x0f\x01\xca"
_UMIP, _SMEP_SMAP, _FSGSBASE = 0x800, 3 << 20, 1 << 16
_SEGMENT = struct.Struct("=QIH9Bx")
_TABLE = struct.Struct("=QH6x")
_FIVE = struct.Struct("<5Q")
_EXIT_IO = 2
_SAVED = (RAX, RCX, RDX)
_RSI, _REGS_END = REGS // 8 + 4, REGS + 144


class DirectFailed(KvmpyError):
    """Our own code in the guest did not do what it should."""


class DirectWorld:
    """The context, and the ways in and out. It is a `kvmpy.machine.direct_execution.context.DirectContext`."""

    def __init__(self, runner: VcpuRunner) -> None:
        self.runner = runner
        self.vcpu: Vcpu = runner.vcpu
        self.vcpu.vm.add_ram(AREA, size=SIZE, name="direct execution")
        self.memory = DirectMemory(self.vcpu.vm.memory, AREA)
        self.memory.zap = self._zap
        self._bytes, self.cells = self.memory.bytes, self.memory.cells
        write_ring_0(self._bytes)
        self._guest = bytearray(SREGS_END)
        """The guest's struct kvm_sregs."""
        self._held: list[int] = []
        """Vectors of interrupts that wait for IF, and that the local APIC has done with."""
        self._masked = False
        """Whether interrupts of the local APIC wait for IF."""
        self._postponed = self._kicked = self._inside = False
        self._kernel_gs_base = 0
        self._statistics = self.vcpu.statistics()
        self.vcpu.attach(self._statistics)
        self._left_at = -1
        """How many instructions KVM had emulated when the guest left; -1 after what may have changed anything."""
        self.halted = self.going_out = self.arrived = self._hopeless = False
        self.counts: Counter[str] = Counter()

    # The guest's registers, see DirectContext

    @property
    def flags(self) -> int:
        """IF and AC of the guest, at their places in RFLAGS."""
        return int(self.cells[FLAGS])

    @flags.setter
    def flags(self, value: int) -> None:
        self.cells[FLAGS] = value

    def inner(self, rflags: int) -> int:
        """The guest's RFLAGS, from those with which it runs."""
        return rflags & ~(IF | AC | IOPL | RF) | self.cells[FLAGS]

    @staticmethod
    def _outer(rflags: int) -> int:
        """RFLAGS with which code of ring 0 runs in ring 3."""
        return rflags & ~(AC | RF | IOPL) | IF | 2

    def selector(self, place: int) -> int:
        """The selector of a segment register of the guest."""
        return int.from_bytes(self._guest[place + 12 : place + 14], "little")

    def system(self, place: int) -> int:
        """A field of struct kvm_sregs."""
        return int.from_bytes(self._guest[place : place + 8], "little")

    def set_system(self, place: int, value: int) -> None:
        """Change one; it reaches the vCPU when the guest goes back to KVM's emulator."""
        self._guest[place : place + 8] = value.to_bytes(8, "little")
        if place == CR2:
            self.cells[CR2_CELL] = value

    def changed_system(self) -> None:
        """Have KVM take the system registers in the run page; but not the bits of interrupts, which may be old ones."""
        page = self.vcpu.page
        page.u8[SREGS_AT + INTERRUPTS : SREGS_AT + SREGS_END] = NO_INTERRUPTS
        page.u64[DIRTY] |= SYNC_SREGS

    # In and out

    def _enter(self) -> None:
        """From the guest's own context into ours. The vCPU then stands before an IRETQ to the guest's RIP.

        If the guest is `halted`, it stands behind a HLT of ours.
        """
        vcpu = self.vcpu
        sync = vcpu._sync
        sync.need_regs()
        sync.need_sregs()
        page = vcpu.page
        u64 = page.u64
        guest = self._guest
        guest[:] = page.u8[SREGS_AT : SREGS_AT + SREGS_END]
        rflags = u64[RFLAGS]
        self.flags = rflags & (IF | AC)
        _FIVE.pack_into(self._bytes, 8 * FRAME, u64[RIP], CODE_3, self._outer(rflags), u64[RSP], DATA_3)
        self._show_selectors()
        ours = bytearray(guest)
        _SEGMENT.pack_into(ours, CS, 0, 0xFFFF_FFFF, CODE_0, 11, 1, 0, 0, 1, 1, 1, 0, 0)
        _SEGMENT.pack_into(ours, SS, 0, 0xFFFF_FFFF, DATA_0, 3, 1, 0, 1, 1, 0, 1, 0, 0)
        _SEGMENT.pack_into(ours, TR, BASE + TSS * PAGE, TSS_LIMIT, TASK, 11, 1, 0, 0, 0, 0, 0, 0, 0)
        _TABLE.pack_into(ours, GDTR, BASE + GDT * PAGE, 127)
        _TABLE.pack_into(ours, IDTR, BASE + IDT * PAGE, 4095)
        struct.pack_into("<QQ", ours, CR3, self.memory.cr3, self.system(CR4) & ~_SMEP_SMAP | _UMIP)
        regs = bytearray(page.u8[REGS:_REGS_END])
        struct.pack_into("<Q", regs, 48, 8 * FRAME + BASE)
        struct.pack_into("<2Q", regs, 128, *((HLT_CODE + 2, IF | 2) if self.halted else (IRETQ_CODE, 2)))
        sync.put(bytes(regs), bytes(ours))
        self._inside = True
        self.counts["entered"] += 1
        self.memory.use_gs_base_instructions(bool(self.system(CR4) & _FSGSBASE))

    def _show_selectors(self) -> None:
        """Give stand-ins the selectors, CR2, and what SWAPGS swaps."""
        places = [self.selector(place) for place in SELECTORS]
        struct.pack_into("<6I", self._bytes, 8 * SELECTOR_CELLS, *places)
        self.cells[CR2_CELL] = self.system(CR2)
        self.cells[KERNEL_GS] = self._kernel_gs_base = self.vcpu.get_msr(KERNEL_GS_BASE)

    def _leave(self) -> None:
        """Back into the guest's own context, at the instruction that comes next."""
        vcpu = self.vcpu
        page = vcpu.page
        u64 = page.u64
        rip, rsp, rflags = u64[RIP], u64[RSP], u64[RFLAGS]
        if BASE <= rip < _OURS_END:
            if u64[RSP] == BASE + 8 * FRAME - 16:  # the handler of #GP had just begun
                u64[RAX] = self.cells[FRAME - 2]
            rip, _, rflags, rsp, _ = _FIVE.unpack_from(self._bytes, 8 * FRAME)
        rip, rsp, rflags = self._settled(rip, rsp, rflags)
        regs = bytearray(page.u8[REGS:_REGS_END])
        struct.pack_into("<Q", regs, 48, rsp)
        struct.pack_into("<2Q", regs, 128, rip, self.inner(rflags))
        sregs = bytearray(self._guest)
        for base in (FS_BASE, GS_BASE):
            sregs[base : base + 8] = page.u8[SREGS_AT + base : SREGS_AT + base + 8]
        sregs[INTERRUPTS:] = NO_INTERRUPTS
        vcpu._sync.put(bytes(regs), bytes(sregs))
        self._masked = self._inside = False
        # KVM shall deliver what waits: the guest may be emulated for long. Without its local APIC it waits on.
        self._held = [vector for vector in self._held if not vcpu.vm.signal_msi(_LOCAL_APIC, vector)]
        self.cells[PENDING] = len(self._held)
        if self.cells[KERNEL_GS] != self._kernel_gs_base:
            vcpu.set_msr(KERNEL_GS_BASE, self.cells[KERNEL_GS])

    def _emulated(self) -> int:
        """How many instructions KVM has emulated for the vCPU, or -1 where it does not say."""
        return self._statistics.counter("insn_emulation")

    def _settled(self, rip: int, rsp: int, rflags: int) -> tuple[int, int, int]:
        """Where the guest would be, if it is in a stand-in for some of its instructions."""
        stand_ins = self.memory.stand_ins
        if not stand_ins.contains(rip):
            code = self.memory.code_of(rip)
            at = None if code is None else code.detours.get(rip & 0xFFF)
            return rip if at is None else rip & ~0xFFF | at, rsp, rflags
        here, following, state = stand_ins.place(rip)
        u64 = self.vcpu.page.u64
        if state.gs:
            u64[(SREGS_AT + GS_BASE) // 8] = u64[RCX]
            self.changed_system()
        for name in state.saved:
            index = "acd".index(name)
            u64[_SAVED[index]] = self.cells[SAVED + index]
            u64[DIRTY] |= SYNC_REGS
        rsp += state.popped
        if state.returning:
            rip, _, rflags, rsp, _ = _FIVE.unpack(self.memory.read_linear(rsp, 40))
            return rip, rsp, rflags & KEPT | IF | 2
        return following if state.done else here, rsp, rflags

    def _settle(self) -> bool:
        """The same for the frame of an exception or an interrupt. True: the guest's instruction had happened."""
        cells = self.cells
        stand_ins, rip = self.memory.stand_ins, cells[FRAME]
        if not stand_ins.contains(rip):
            cells[FRAME] = self._settled(rip, 0, 0)[0]
            return False
        done = stand_ins.place(rip).state.done
        cells[FRAME], cells[FRAME + 3], cells[FRAME + 2] = self._settled(rip, cells[FRAME + 3], cells[FRAME + 2])
        return done

    def _moved(self, rip: int) -> int:
        """Where an instruction is done that a jump to a stand-in is in the place of; for all others, where it is."""
        code = self.memory.code_of(rip)
        return rip if code is None else code.moved.get(rip & 0xFFF, rip)

    def _hold(self, vector: int) -> None:
        """An interrupt has to wait for IF.

        KVM has taken it from the local APIC already. kvm_pvm ends an interrupt when it delivers it, and knows nothing
        of it any more, as of one of the PIC. Where it is in service, as the manual wants it, it goes back, and the task
        priority keeps it there: the guest may end the handling of another one meanwhile, and its EOI must not be for
        this one.
        """
        lapic = self.vcpu.get_lapic()
        registers = memoryview(lapic).cast("B")
        at = 0x100 + (vector >> 5) * 0x10 + (vector >> 3 & 3)  # ISR; IRR is 0x100 behind it
        bit = 1 << (vector & 7)
        if registers[at] & bit:
            registers[at] &= ~bit & 0xFF
            registers[at + 0x100] |= bit
            self.vcpu.set_lapic(lapic)
            self._set_priority(_HIGHEST)
            for again in self.runner.control.edges:  # what a device raised between the two ioctls is lost
                again()
        else:
            self._held.append(vector)
        self.cells[PENDING] = 1

    def _set_priority(self, priority: int) -> None:
        """CR8, the task priority of the local APIC."""
        page = self.vcpu.page
        self._masked = priority == _HIGHEST
        page.u64[(SREGS_AT + CR8) // 8] = priority
        self.changed_system()

    def _enter_guest(self) -> int:
        """KVM_RUN: 0, or an errno."""
        vcpu = self.vcpu
        vcpu.page.u32[2] = NO_EXIT
        return ctypes.get_errno() if vcpu.enter(*vcpu.entry) < 0 else 0

    def _zap(self, entries: list[int]) -> None:
        """Have the processor clear entries of our tables, between two instructions of the guest."""
        self.counts["zapped"] += len(entries)
        vcpu = self.vcpu
        page = vcpu.page
        u64 = page.u64
        struct.pack_into(f"<{len(entries)}Q", self._bytes, JOBS * PAGE, *entries)
        saved = bytes(page.u8[REGS:_REGS_END])
        u64[_RSI], u64[RCX], u64[RIP], u64[RFLAGS] = BASE + JOBS * PAGE, len(entries), CLEAR_CODE, 2
        u64[DIRTY] |= SYNC_REGS
        while (number := self._enter_guest()) == errno.EINTR:
            self._postpone_kick()
        if number or page.u32[2] != _EXIT_IO:
            raise DirectFailed(f"clearing entries of page tables: errno {number}, exit {page.u32[2]}, {u64[RIP]:#x}")
        page.u32[2] = NO_EXIT
        page.u8[REGS:_REGS_END] = saved
        u64[DIRTY] |= SYNC_REGS

    def _postpone_kick(self) -> None:
        """EINTR came at a bad time: go on now, and have it come again by `_come_again`."""
        self._postponed = True
        self._kicked = self.vcpu.take_kick() or self._kicked

    def _come_again(self) -> None:
        """An EINTR that was put off."""
        self._postponed = False
        if self._kicked:
            self._kicked = False
            self.vcpu.kick()
        else:
            self.vcpu.page.immediate_exit = True

    def _stand(self, rip: int, rflags: int) -> None:
        """Have the vCPU go on in our own code, with the guest's frame on top of the stack."""
        u64 = self.vcpu.page.u64
        u64[RIP], u64[RFLAGS], u64[RSP] = rip, rflags, BASE + 8 * FRAME
        u64[DIRTY] |= SYNC_REGS

    # Events

    def deliver(self, vector: int, error: int | None = None) -> bool:
        """An interrupt or exception through the guest's IDT. False: that is left to KVM."""
        cells = self.cells
        base, limit = _TABLE.unpack_from(self._guest, IDTR)
        try:
            if 16 * vector + 15 > limit:
                return False
            gate = self.memory.read_linear(base + 16 * vector, 16)
            low, selector, ist, kind, middle, high, _ = struct.unpack("<HHBBHII", gate)
            if ist & 7 or kind & 0x9F not in (0x8E, 0x8F) or selector != self.selector(CS):
                return False
            rip, rflags, rsp = cells[FRAME], cells[FRAME + 2], cells[FRAME + 3]
            frame = b"" if error is None else error.to_bytes(8, "little")
            top = (rsp & ~15) - 40 - len(frame)
            frame += _FIVE.pack(rip, selector, self.inner(rflags), rsp, self.selector(SS))
            self.memory.write_linear(top, frame)
        except Refused:
            return False
        handler = low | middle << 16 | high << 32
        if kind & 0xF == 0xE:
            self.flags &= ~IF
        try:  # most handlers begin with CLAC: do it at once
            if self.memory.read_linear(handler, 3) == _CLAC:
                self.flags &= ~AC
                handler = self._moved(handler + 3)
        except Refused:
            pass
        cells[FRAME], cells[FRAME + 3] = handler, top
        cells[FRAME + 2] = self._outer(rflags & ~0x4000)
        return True

    def _deliver_held(self) -> bool:
        """The interrupts that wait, if the guest has them on now. False: that is left to KVM."""
        if not self.cells[PENDING] or not self.flags & IF:
            return True
        if self._masked:
            self._set_priority(self.system(CR8))
        if self._held:
            self.halted = False
            if not self.deliver(self._held[-1]):
                return False
            self._held.pop()
        self.cells[PENDING] = len(self._held)
        return True
