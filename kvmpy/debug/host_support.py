"""What this host's KVM can stop at, found by small guests: which byte a software breakpoint is, whether data can be
watched by debug registers.

KVM on VT-x and AMD-V reports INT3 (KVM_GUESTDBG_USE_SW_BP, KVM API section 4.87) and data breakpoints. A KVM that runs
ring 0 in its instruction emulator does neither: there INT3 in long mode is an instruction that it cannot emulate, which
comes out just as well, and in real mode, where it goes through the IVT, ICEBP (0xF1) does that.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kvmpy.abi.flags import KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP
from kvmpy.exits import Debug, InternalError
from kvmpy.kvm import Kvm
from kvmpy.kvm.first_exit import first_exit

if TYPE_CHECKING:
    from kvmpy._exit import Exit
    from kvmpy.kvm import Vcpu

__all__ = ["INT3", "breakpoint_byte", "watches_data"]

INT3, ICEBP = 0xCC, 0xF1

_CODE, _DATA, _TABLES, _STACK = 0x1000, 0x2000, 0x10000, 0x4000
_WRITE_TO_DATA = bytes([0xC6, 0x04, 0x25, 0x00, 0x20, 0x00, 0x00, 0x01, 0x90, 0xF4])  # mov byte [0x2000], 1; nop; hlt
_SECONDS = 1.0


@functools.cache
def breakpoint_byte(real_mode: bool) -> int | None:
    """The one-byte instruction whose execution comes out of the guest, in real mode or outside; None: there is none."""
    for byte in (INT3, ICEBP):
        with Kvm() as kvm, kvm.create_vm() as vm:
            vm.add_ram(0, size=0x20000)
            vm.memory.write(_CODE, bytes([byte, 0xF4]))
            vm.memory.write(0, b"\x00\x20\x00\x00" * 16)  # all vectors lead to a HLT
            vm.memory.write(_DATA, b"\xf4")
            vcpu = vm.create_vcpu()
            if real_mode:
                vcpu.set_real_mode(_CODE, stack=_STACK)
            else:
                vcpu.set_long_mode(_CODE, tables=_TABLES, stack=_STACK)
            vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP)
            if _stopped_at_code(vcpu, first_exit(vcpu, _SECONDS)):
                return byte
    return None


def _stopped_at_code(vcpu: Vcpu, event: Exit) -> bool:
    return isinstance(event, (Debug, InternalError)) and vcpu.regs.rip == _CODE


@functools.cache
def watches_data() -> bool:
    """Whether a debug register that watches data stops the guest."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x20000)
        vm.memory.write(_CODE, _WRITE_TO_DATA)
        vcpu = vm.create_vcpu()
        vcpu.set_long_mode(_CODE, tables=_TABLES, stack=_STACK)
        vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, [_DATA], dr7=0x1_0402)
        return isinstance(first_exit(vcpu, _SECONDS), Debug)
