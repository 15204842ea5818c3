"""INT3, INT n, INTO, INT1: events that an instruction asks for (SDM vol. 3, 6.4.4)."""

from __future__ import annotations

from kvmpy.x86.emulator.guest_exception import SoftwareInterrupt
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import instruction
from kvmpy.x86.event_delivery.event import Event

_DB = 1
_OF = 0x800


@instruction("int3", 0, 0xCC, prefix=None, modrm=False)
def _int3(op: Operands) -> None:
    raise SoftwareInterrupt(Event.int3())


@instruction("int n", 0, 0xCD, prefix=None, modrm=False, immediate=1)
def _int(op: Operands) -> None:
    raise SoftwareInterrupt(Event.software_interrupt(op.it.immediate))


@instruction("int1", 0, 0xF1, prefix=None, modrm=False)
def _int1(op: Operands) -> None:
    raise SoftwareInterrupt(Event.exception(_DB))  # not software's in that no gate's DPL counts (SDM vol. 2, INT n)


@instruction("into", 0, 0xCE, prefix=None, modrm=False, bits=(16, 32))
def _into(op: Operands) -> None:
    if op.flags & _OF:
        raise SoftwareInterrupt(Event.into())
