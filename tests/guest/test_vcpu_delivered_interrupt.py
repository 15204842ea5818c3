"""An interrupt that was delivered is gone, also from the system registers that KVM_RUN copies out."""

import pytest

from bare_guest import guest, next_exit
from kvmpy.exits import Hlt, IoOut

_VECTOR = 0x40
_COUNTS = f"""
        xor ax, ax
        mov ds, ax
        mov word ptr [{4 * _VECTOR}], offset handler
        mov word ptr [{4 * _VECTOR + 2}], ax
        xor bx, bx
        sti
        hlt
1:      nop
        mov al, bl
        out 0x66, al
        jmp 1b
handler:
        inc bx
        iret
"""


@pytest.mark.parametrize("sync_regs", [True, False])
def test_writing_a_system_register_does_not_deliver_it_again(sync_regs: bool) -> None:
    with guest(_COUNTS, sync_regs=sync_regs) as vcpu:
        assert vcpu.sregs.interrupt is None  # from now on KVM_RUN copies the system registers
        assert next_exit(vcpu) == Hlt()
        vcpu.interrupt(_VECTOR)
        vcpu.settle()  # KVM_RUN that comes back before it delivers: the interrupt is in what it copied
        assert vcpu.sregs.interrupt == _VECTOR
        assert next_exit(vcpu) == IoOut(0x66, b"\x01")
        assert vcpu.sregs.interrupt is None
        vcpu.sregs.cr2 = 0x1000
        assert next_exit(vcpu) == IoOut(0x66, b"\x01")
