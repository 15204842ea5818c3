"""What only ring 0 may do, done for code of ring 0 that runs in ring 3: see `kvmpy.machine.direct_execution`.

Only what kernels do all the time, and in simple ways: for everything else KVM's emulator takes one step.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmpy.kvm.run_page import SYNC_REGS
from kvmpy.machine.direct_execution.context import (
    AC,
    CR0,
    CR2,
    CR3,
    CR4,
    CS,
    DIRTY,
    FRAME,
    FS_BASE,
    GS_BASE,
    IF,
    KEPT,
    KERNEL_GS,
    PAGE,
    RAX,
    RCX,
    RDX,
    REGISTERS,
    RSP,
    SELECTORS,
    SREGS_AT,
    TF,
)  # fmt: skip
from kvmpy.machine.direct_execution.memory import Refused
from kvmpy.machine.xsave_area import XsaveArea
from kvmpy.x86.instruction_length import length_and_kind

if TYPE_CHECKING:
    from kvmpy.machine.direct_execution.code import Code
    from kvmpy.machine.direct_execution.context import DirectContext

__all__ = ["PrivilegedInstructions"]

_MASK = (1 << 64) - 1
_X2APIC, _X2APIC_LAST, _TSC_DEADLINE = 0x800, 0x83F, 0x6E0
_WIDE_BASE = b"\x48\x0f\xae"
_OF_GROUPS = frozenset((0x01, 0x20, 0x22, 0x30))
DONE, STEP = True, False


class PrivilegedInstructions:
    """`perform` does the instruction at the frame's RIP. False: it is not known here, and nothing has changed.

    `changed_memory` is set when an instruction has changed what memory is where.
    """

    def __init__(self, context: DirectContext) -> None:
        self._context = context
        self._vcpu = context.vcpu
        self._cells = context.cells
        self._u64 = context.vcpu.page.u64
        self._by_opcode = {
            0x9C: self._pushf, 0x9D: self._popf, 0xFA: self._cli, 0xFB: self._sti, 0x8C: self._move_selector,
            0xCF: self._iretq, 0xF4: self._hlt, 0x0F: self._two_bytes,
        }  # fmt: skip
        self._small = self._wide = False
        self._repeat = self._extension = 0

    def perform(self, code: Code, offset: int) -> bool:
        """The instruction at `offset` of a page of code."""
        original = code.original
        if offset > PAGE - 15:
            return STEP
        at = offset
        self._small = self._wide = False
        self._repeat = self._extension = 0
        byte = original[at]
        while byte in (0x66, 0xF3):
            if byte == 0x66:
                self._small = True
            else:
                self._repeat = byte
            at += 1
            byte = original[at]
        if byte & 0xF0 == 0x40:
            self._wide = byte & 8 != 0
            self._extension = (byte & 1) << 3
            if byte & 6:
                return STEP
            at += 1
            byte = original[at]
        handler = self._by_opcode.get(byte)
        if handler is None:
            return STEP
        try:
            length = handler(code, at)
        except Refused:
            return STEP
        if length < 0:
            return STEP
        if length:
            self._cells[FRAME] += at - offset + length
        return DONE

    # Each answers how many bytes it is long from its opcode on, 0 when it has set RIP itself, or -1: not done

    def _pushf(self, code: Code, at: int) -> int:
        if self._small:
            return -1
        cells = self._cells
        rsp = cells[FRAME + 3] - 8
        self._context.memory.write_linear(rsp, self._context.inner(cells[FRAME + 2]).to_bytes(8, "little"))
        cells[FRAME + 3] = rsp
        return 1

    def _popf(self, code: Code, at: int) -> int:
        cells = self._cells
        rsp = cells[FRAME + 3]
        value = int.from_bytes(self._context.memory.read_linear(rsp, 8), "little")
        if value & TF or self._small:
            return -1
        cells[FRAME + 3] = rsp + 8
        self._set_flags(value)
        return 1

    def _set_flags(self, value: int) -> None:
        self._context.flags = value & (IF | AC)
        self._cells[FRAME + 2] = value & KEPT | IF | 2

    def _cli(self, code: Code, at: int) -> int:
        self._context.flags &= ~IF
        return 1

    def _sti(self, code: Code, at: int) -> int:
        self._context.flags |= IF
        if code.original[at + 1] == 0xF4:  # an interrupt must not come between STI and HLT
            self._context.halted = True
            return 2
        return 1

    def _hlt(self, code: Code, at: int) -> int:
        if not self._context.flags & IF:
            return -1
        self._context.halted = True
        return 1

    def _iretq(self, code: Code, at: int) -> int:
        if not self._wide:
            return -1
        frame = self._context.memory.read_linear(self._cells[FRAME + 3], 40)
        rip, cs, rflags, rsp, _ = struct.unpack("<5Q", frame)
        if cs != self._context.selector(CS) or rflags & TF:
            self._context.going_out = True
            return -1
        self._cells[FRAME], self._cells[FRAME + 3] = rip, rsp
        self._set_flags(rflags)
        self._context.arrived = True
        return 0

    def _move_selector(self, code: Code, at: int) -> int:
        modrm = code.original[at + 1]
        number = modrm >> 3 & 7
        if modrm < 0xC0 or number >= len(SELECTORS):
            return -1
        register = modrm & 7 | self._extension
        value = self._context.selector(SELECTORS[number])
        self._set_register(register, self._register(register) & ~0xFFFF | value if self._small else value)
        return 2

    def _register(self, number: int) -> int:
        place = REGISTERS[number]
        return self._cells[FRAME + 3] if place == RSP else self._u64[place]

    def _set_register(self, number: int, value: int) -> None:
        place = REGISTERS[number]
        if place == RSP:
            self._cells[FRAME + 3] = value
        else:
            self._u64[place] = value
            self._u64[DIRTY] |= SYNC_REGS

    def _two_bytes(self, code: Code, at: int) -> int:
        original = code.original
        opcode = original[at + 1]
        if opcode == 0x01:
            return self._group_7(original, at)
        if opcode == 0x07:
            self._context.going_out = True
            return -1
        if opcode in (0x20, 0x22):
            return self._control_register(original[at + 2], opcode == 0x22)
        if opcode == 0x30:
            return self._wrmsr()
        if opcode == 0xC7:
            return 0 if self._replace_xsave(code, at) else -1
        if opcode == 0xAE and self._repeat and original[at + 2] >= 0xC0:
            return self._base(original[at + 2])
        if opcode == 0x0B and self._context.deliver(6):
            return 0
        return -1

    def _group_7(self, original: bytes, at: int) -> int:
        modrm = original[at + 2]
        context = self._context
        if modrm in (0xCA, 0xCB):
            context.flags = context.flags & ~AC | (AC if modrm == 0xCB else 0)
            return 3
        if modrm == 0xF8:  # SWAPGS
            other = self._cells[KERNEL_GS]
            self._cells[KERNEL_GS] = self._u64[(SREGS_AT + GS_BASE) // 8]
            self._load_base(GS_BASE, other)
            return 3
        if modrm < 0xC0 and modrm & 0x38 == 0x38:  # INVLPG
            context.memory.revalidate(context.system(CR3), code=False)
            return length_and_kind(original, at)[0]
        return -1

    @staticmethod
    def is_likely(code: Code, at: int) -> bool:
        """Whether the instruction at `at` is one that is done here: then it saves a fault to do it at once."""
        original = code.original
        byte = original[at]
        if code.copy[at] == 0xE9 != byte:
            return False  # a stand-in does it
        if byte == 0x0F:
            return original[at + 1] in _OF_GROUPS
        if byte in (0x48, 0x66, 0xF3):
            following = original[at + 1 : at + 4]
            return (
                following[:1] == b"\x8c" or following[:2] in (b"\x0f\xae", b"\x0f\x22") or following == b"\x48\x0f\xae"
            )
        return byte in (0x9C, 0xFA)

    def _load_base(self, place: int, value: int) -> None:
        """Have KVM take the base of FS or GS: it is in the run page, for code of ring 3 can change it."""
        self._u64[(SREGS_AT + place) // 8] = value
        self._context.changed_system()

    def _base(self, modrm: int) -> int:
        """RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE."""
        context = self._context
        digit = modrm >> 3 & 7
        if digit > 3 or not context.system(CR4) >> 16 & 1:
            return -1
        place = GS_BASE if digit & 1 else FS_BASE
        number = modrm & 7 | self._extension
        if digit < 2:
            value = self._u64[(SREGS_AT + place) // 8]
            self._set_register(number, value if self._wide else value & 0xFFFF_FFFF)
            return 3
        value = self._register(number)
        if not self._wide:
            value &= 0xFFFF_FFFF
        if value >> 47 not in (0, 0x1FFFF):
            return -1
        self._load_base(place, value)
        return 3

    def _control_register(self, modrm: int, write: bool) -> int:
        context = self._context
        number, register = modrm >> 3 & 7, modrm & 7 | self._extension
        if write:
            value = self._register(register)
            if number != 3 or value >> 52:
                return -1
            context.set_system(CR3, value)
            context.memory.revalidate(value, code=False)
            return 3
        place = {0: CR0, 2: CR2, 3: CR3, 4: CR4}.get(number)
        if place is None:
            return -1
        self._set_register(register, context.system(place))
        return 3

    def _wrmsr(self) -> int:
        """The local APIC's, which change nothing else."""
        u64 = self._u64
        index = u64[RCX] & 0xFFFF_FFFF
        if index != _TSC_DEADLINE and not _X2APIC <= index <= _X2APIC_LAST:
            return -1
        value = u64[RAX] & 0xFFFF_FFFF | (u64[RDX] & 0xFFFF_FFFF) << 32
        return 2 if self._vcpu.set_msrs_until_refused([(index, value)]) == 1 else -1

    def _replace_xsave(self, code: Code, at: int) -> bool:
        """XSAVES and XRSTORS by XSAVEC and XRSTOR, which do the same where there are no supervisor components."""
        digit = code.original[at + 2] >> 3 & 7
        if digit not in (3, 5) or code.original[at + 2] >= 0xC0:
            return False
        area = XsaveArea(self._vcpu)
        if area.xcr0() != area.components:  # ring 3 has those of the host
            return False
        copy = self._context.memory.bytes[code.slot * PAGE : (code.slot + 1) * PAGE]
        modrm = copy[at + 2] & 0xC7
        if digit == 5:
            copy[at + 2] = modrm | 4 << 3
        else:
            copy[at + 1] = 0xAE
            copy[at + 2] = modrm | 5 << 3
        return True
