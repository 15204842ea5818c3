"""What single steps on this host are like, found by small guests.

KVM steps by the trap flag (SDM vol. 3, 18.3.1.4) where the processor runs the guest, and by itself where its
instruction emulator does.
"""

from __future__ import annotations

import functools

from kvmpy.exits import Debug, MmioRead
from kvmpy.kvm import Kvm
from kvmpy.kvm.first_exit import first_exit

__all__ = ["breaks_in_ring3", "steps_go_on", "steps_in_ring3"]

_CODE, _TABLES, _STACK = 0x1000, 0x10000, 0x4000
_NOWHERE = 0x20_0000
"""Where there is no memory."""
_SECONDS = 1.0


@functools.cache
def steps_go_on() -> bool:
    """Whether steps, once asked for, go on after an instruction that KVM has emulated for the processor.

    KVM may lose the trap flag there, because the program counter is not where stepping began. Then each step has to be
    asked for.
    """
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x20000)
        vm.memory.write(_CODE, b"\xa0" + _NOWHERE.to_bytes(4, "little") + b"\x90\x90\x90\xf4")  # mov al, [NOWHERE]
        vcpu = vm.create_vcpu()
        vcpu.set_protected_mode(_CODE, stack=_STACK)
        vcpu.single_step()
        places = []
        for _ in range(5):
            event = first_exit(vcpu, _SECONDS)
            if isinstance(event, MmioRead):
                event.reply(0)
            elif isinstance(event, Debug):
                places.append(event.pc - _CODE)
        return places == [5, 6, 7, 8]


@functools.cache
def steps_in_ring3() -> bool:
    """Whether a single step in ring 3 of 64-bit mode comes out of the guest; else the guest gets a #DB."""
    return isinstance(_in_ring3(b"\x90\x90\x90", step=True), Debug)


@functools.cache
def breaks_in_ring3() -> bool:
    """Whether INT3 in ring 3 of 64-bit mode comes out of the guest; else the guest gets a #BP."""
    return isinstance(_in_ring3(b"\xcc", step=False), Debug)


def _in_ring3(code: bytes, *, step: bool) -> object:
    from kvmpy.abi.flags import KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_SW_BP

    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x20000)
        vm.memory.write(_CODE, code)
        vcpu = vm.create_vcpu()
        vcpu.set_long_mode(_CODE, tables=_TABLES, stack=_STACK, ring=3)
        vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | (KVM_GUESTDBG_SINGLESTEP if step else KVM_GUESTDBG_USE_SW_BP))
        return first_exit(vcpu, _SECONDS)
