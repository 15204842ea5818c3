"""CMPXCHG16B (SDM vol. 2)."""

from __future__ import annotations

from contextlib import nullcontext

from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, instruction

_ZF = 0x40
_RAX, _RCX, _RDX, _RBX = 0, 1, 2, 3
_GP = 13


@instruction("cmpxchg16b", 1, 0xC7, prefix=None, digit=1, operand=MEMORY, w=True, bits=(64,), lockable=True)
def _cmpxchg16b(op: Operands) -> None:
    address = op.address()
    if address % 16:
        raise GuestException.of(_GP, 0)
    memory = op.cpu.memory
    with op.cpu.alone() if op.it.lock else nullcontext():
        memory.check_writable(address, 16)  # it is written in any case
        found = int.from_bytes(memory.read(address, 16), "little")
        if found == op.register(_RDX) << 64 | op.register(_RAX):
            memory.write(address, (op.register(_RCX) << 64 | op.register(_RBX)).to_bytes(16, "little"))
            op.set_flags(_ZF, _ZF)
            return
    op.set_register(_RAX, found & (1 << 64) - 1)
    op.set_register(_RDX, found >> 64)
    op.set_flags(0, _ZF)
