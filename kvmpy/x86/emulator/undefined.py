"""Instructions that raise #UD, as UD0 and UD1 do on purpose, and those that are there only when CR4 enables them.

VMX, SMX and SGX cannot be enabled in a guest of a KVM that runs ring 0 in software.
"""

from __future__ import annotations

from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import MEMORY, instruction

_UD = 6


def _undefined(op: Operands) -> None:
    raise GuestException.of(_UD)


instruction("ud0", 1, 0xFF, prefix=None)(_undefined)
instruction("ud1", 1, 0xB9, prefix=None)(_undefined)
instruction("vmread", 1, 0x78, prefix=0)(_undefined)
instruction("vmwrite", 1, 0x79, prefix=0)(_undefined)
instruction("getsec", 1, 0x37, prefix=0, modrm=False)(_undefined)
instruction("invept", 2, 0x80, prefix=0x66, operand=MEMORY)(_undefined)
instruction("invvpid", 2, 0x81, prefix=0x66, operand=MEMORY)(_undefined)
for _name, _prefix, _digit in (("vmptrld", 0, 6), ("vmclear", 0x66, 6), ("vmxon", 0xF3, 6), ("vmptrst", 0, 7)):
    instruction(_name, 1, 0xC7, prefix=_prefix, digit=_digit, operand=MEMORY)(_undefined)
for _name, _digit, _rm in (
    ("vmlaunch", 0, 2), ("vmresume", 0, 3), ("vmxoff", 0, 4), ("pconfig", 0, 5), ("encls", 1, 7), ("enclu", 2, 7),
):  # fmt: skip
    instruction(_name, 1, 0x01, prefix=0, digit=_digit, rm=_rm)(_undefined)
