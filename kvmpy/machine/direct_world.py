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
from kvmpy.machine.direct_context import (
    AC,
    CR3,
    CR4,
    CR8,
    CS,
    DIRTY,
    FLAGS,
    FRAME,
    GDT,
    GDTR,
    IDT,
    IDTR,
    IF,
    INTERRUPTS,
    IOPL,
    JOBS,
    KERNEL_GS_BASE,
    NO_INTERRUPTS,
    PAGE,
    PENDING,
    RCX,
    RETURN,
    RF,
    RFLAGS,
    RIP,
    RSP,
    SREGS_AT,
    SREGS_END,
    SS,
    STACK,
    STUBS,
    TR,
    TSS,
)  # fmt: skip
from kvmpy.machine.direct_memory import BASE, SIZE, DirectMemory, Refused

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["AREA", "HLT_CODE", "IRETQ_CODE", "STUB_CODE", "DirectFailed", "DirectWorld"]

AREA = 0xE000_0000
"""Where the memory is, in guest-physical addresses: below the controllers of a PC, above its RAM."""
STUB_CODE, IRETQ_CODE = BASE + STUBS * PAGE, BASE + RETURN * PAGE
HLT_CODE = IRETQ_CODE + 64
_PORT = 0xE7
_TOP, _OURS_END = BASE + (STACK + 1) * PAGE, BASE + (RETURN + 1) * PAGE
_CODE0, _DATA0, _DATA3, _CODE3, _TR = 0x10, 0x18, 0x28, 0x30, 0x40
_ERROR_CODES = frozenset((8, 10, 11, 12, 13, 14, 17, 21))
_HIGHEST = 15
_CLAC = b"\x0f\x01\xca"
_UMIP = 0x800
_SEGMENT = struct.Struct("=QIH9Bx")
_TABLE = struct.Struct("=QH6x")
_FIVE = struct.Struct("<5Q")
_EXIT_IO = 2
_RSI, _REGS_END = REGS // 8 + 4, REGS + 144


class DirectFailed(KvmpyError):
    """Our own code in the guest did not do what it should."""


class DirectWorld:
    """The context, and the ways in and out. It is a `kvmpy.machine.direct_context.DirectContext`."""

    def __init__(self, runner: VcpuRunner) -> None:
        self.runner = runner
        self.vcpu: Vcpu = runner.vcpu
        self.vcpu.vm.add_ram(AREA, size=SIZE, name="direct execution")
        self.memory = DirectMemory(self.vcpu.vm.memory, AREA)
        self.memory.zap = self._zap
        self._bytes, self.cells = self.memory.bytes, self.memory.cells
        self._fill()
        self._guest = bytearray(SREGS_END)
        """The guest's struct kvm_sregs."""
        self._held: list[int] = []
        """Vectors of interrupts of the PIC that wait for IF."""
        self._masked = False
        """Whether interrupts of the local APIC wait for IF."""
        self._postponed = self._kicked = self._inside = False
        self.kernel_gs_base: int | None = None
        self._statistics = self.vcpu.statistics()
        self.vcpu.attach(self._statistics)
        self._left_at = -1
        """How many instructions KVM had emulated when the guest left; -1 after what may have changed anything."""
        self.halted = self.going_out = self.arrived = self._hopeless = False
        self.counts: Counter[str] = Counter()

    def _fill(self) -> None:
        """Descriptor tables, and the code of ring 0 that brings exceptions out: an OUT, and back an IRETQ."""
        data, tss = self._bytes, BASE + TSS * PAGE
        gdt = [0] * 16
        gdt[_CODE0 >> 3], gdt[_DATA0 >> 3] = 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
        gdt[_CODE3 >> 3], gdt[_DATA3 >> 3] = 0x00AF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF
        gdt[_TR >> 3] = 0x0000_8B00_0000_0067 | (tss & 0xFF_FFFF) << 16 | (tss >> 24 & 0xFF) << 56
        gdt[(_TR >> 3) + 1] = tss >> 32
        struct.pack_into("<16Q", data, GDT * PAGE, *gdt)
        for vector in range(256):
            stub = STUB_CODE + 16 * vector
            gate = (stub & 0xFFFF, _CODE0, 0, 0xEE, stub >> 16 & 0xFFFF, stub >> 32, 0)
            struct.pack_into("<HHBBHII", data, IDT * PAGE + 16 * vector, *gate)
            drop_error_code = b"\x48\x83\xc4\x08" if vector in _ERROR_CODES else b""
            code = bytes((0xE6, _PORT)) + drop_error_code + b"\x48\xcf"
            at = STUBS * PAGE + 16 * vector
            data[at : at + len(code)] = code
        struct.pack_into("<IQQQ", data, TSS * PAGE, 0, _TOP, _TOP, _TOP)
        struct.pack_into("<H", data, TSS * PAGE + 0x66, 0x68)  # no I/O bitmap
        # iretq; 16 bytes on: lodsq; mov qword [rax], 0; dec rcx; jnz; mov rax, cr3; mov cr3, rax; out
        clear = bytes.fromhex("48ad 48c70000000000 48ffc9 75f2 0f20d8 0f22d8") + bytes((0xE6, _PORT))
        data[RETURN * PAGE : RETURN * PAGE + 2] = b"\x48\xcf"
        data[HLT_CODE - BASE : HLT_CODE - BASE + 4] = b"\xfb\xf4\xeb\xfc"  # sti; hlt; jmp back
        data[RETURN * PAGE + 16 : RETURN * PAGE + 16 + len(clear)] = clear

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
        _FIVE.pack_into(self._bytes, 8 * FRAME, u64[RIP], _CODE3 | 3, self._outer(rflags), u64[RSP], _DATA3 | 3)
        self.memory.stand_ins.selector = self.selector(CS)
        ours = bytearray(guest)
        _SEGMENT.pack_into(ours, CS, 0, 0xFFFF_FFFF, _CODE0, 11, 1, 0, 0, 1, 1, 1, 0, 0)
        _SEGMENT.pack_into(ours, SS, 0, 0xFFFF_FFFF, _DATA0, 3, 1, 0, 1, 1, 0, 1, 0, 0)
        _SEGMENT.pack_into(ours, TR, BASE + TSS * PAGE, 0x67, _TR, 11, 1, 0, 0, 0, 0, 0, 0, 0)
        _TABLE.pack_into(ours, GDTR, BASE + GDT * PAGE, 127)
        _TABLE.pack_into(ours, IDTR, BASE + IDT * PAGE, 4095)
        struct.pack_into("<QQ", ours, CR3, self.memory.cr3, self.system(CR4) | _UMIP)
        regs = bytearray(page.u8[REGS:_REGS_END])
        struct.pack_into("<Q", regs, 48, 8 * FRAME + BASE)
        struct.pack_into("<2Q", regs, 128, *((HLT_CODE + 2, IF | 2) if self.halted else (IRETQ_CODE, 2)))
        sync.put(bytes(regs), bytes(ours))
        self._inside = True
        self.counts["entered"] += 1
        self.memory.apply_selectors()

    def _leave(self) -> None:
        """Back into the guest's own context, at the instruction that comes next."""
        vcpu = self.vcpu
        page = vcpu.page
        u64 = page.u64
        rip, rsp, rflags = u64[RIP], u64[RSP], u64[RFLAGS]
        if BASE <= rip < _OURS_END:
            rip, _, rflags, rsp, _ = _FIVE.unpack_from(self._bytes, 8 * FRAME)
        rip, rsp, rflags = self._settled(rip, rsp, rflags)
        regs = bytearray(page.u8[REGS:_REGS_END])
        struct.pack_into("<Q", regs, 48, rsp)
        struct.pack_into("<2Q", regs, 128, rip, self.inner(rflags))
        sregs = bytearray(self._guest)
        sregs[INTERRUPTS:] = NO_INTERRUPTS
        vcpu._sync.put(bytes(regs), bytes(sregs))
        self._masked = self._inside = False
        self.cells[PENDING] = len(self._held)
        if self.kernel_gs_base is not None:
            vcpu.set_msr(KERNEL_GS_BASE, self.kernel_gs_base)
            self.kernel_gs_base = None

    def _emulated(self) -> int:
        """How many instructions KVM has emulated for the vCPU, or -1 where it does not say."""
        return self._statistics.counter("insn_emulation")

    def _settled(self, rip: int, rsp: int, rflags: int) -> tuple[int, int, int]:
        """Where the guest would be, if it is in a stand-in for one of its instructions."""
        stand_ins = self.memory.stand_ins
        if not stand_ins.base <= rip < stand_ins.end:
            return rip, rsp, rflags
        rip, rsp, rflags, enabled = stand_ins.settle(rip, rsp, rflags, self.memory.read_linear)
        if enabled:
            self.flags |= IF
        return rip, rsp, rflags

    def _settle(self) -> None:
        """The same for the frame of an exception or an interrupt."""
        cells = self.cells
        cells[FRAME], cells[FRAME + 3], cells[FRAME + 2] = self._settled(
            cells[FRAME], cells[FRAME + 3], cells[FRAME + 2]
        )

    def _hold(self, vector: int) -> None:
        """An interrupt has to wait for IF.

        KVM has taken it from the local APIC already. It goes back, and the task priority keeps it there: the guest may
        end the handling of another interrupt meanwhile, and its EOI must not be for this one.
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
        else:  # of the PIC
            self._held.append(vector)
        self.cells[PENDING] = 1

    def _set_priority(self, priority: int) -> None:
        """CR8, the task priority of the local APIC."""
        page = self.vcpu.page
        self._masked = priority == _HIGHEST
        page.u64[(SREGS_AT + CR8) // 8] = priority
        page.u8[SREGS_AT + INTERRUPTS : SREGS_AT + SREGS_END] = NO_INTERRUPTS
        page.u64[DIRTY] |= SYNC_SREGS

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
        u64[_RSI], u64[RCX], u64[RIP], u64[RFLAGS] = BASE + JOBS * PAGE, len(entries), IRETQ_CODE + 16, 2
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
                handler += 3
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
