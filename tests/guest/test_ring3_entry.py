"""SYSCALL and INT n of ring 3 reach ring 0 as the manual says, also on a host whose KVM gets them wrong."""

from __future__ import annotations

import pytest

from gnu_toolchain import assemble_with_symbols
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import DebugExit
from kvmpy.machine.ring3_entry import needs_repair
from kvmpy.x86.flags import Efer
from kvmpy.x86.gates import Gate, Idt
from kvmpy.x86.long_mode import prepare, tables_size
from kvmpy.x86.msrs import Msr
from kvmpy.x86.page_tables import PageTables
from kvmpy.x86.paging import PagingMode
from kvmpy.x86.registers import CpuState

pytestmark = pytest.mark.kvm

SECONDS = 10.0
KERNEL, USER, USER_STACK, TABLES, STACK = 0x1000, 0x20_0000, 0x20_3000, 0x4_0000, 0x3_0000
HOLE = 0x40_0000
KERNEL_CS, USER_CS, USER_SS = 0x08, 0x2B, 0x23  # of the GDT that kvmpy.x86.long_mode.prepare writes

SOURCE = f"""
# Ring 0: long enough for the machine to look after SYSCALL once, then to ring 3.
_start: mov ecx, 200000
1:      dec ecx
        jnz 1b
        push {USER_SS}
        push {USER_STACK}
        push 0x202
        push {USER_CS}
        push {USER:#x}
        iretq

entry:  cmp rcx, offset after                     # where SYSCALL came from
        jne bad
        mov dx, cs
        test edx, 3
        jnz bad
        pushfq
        pop rdx
        test edx, 0x200                           # SFMASK
        jnz bad
        add eax, 1000
        sysretq

int80:  mov dx, cs
        test edx, 3
        jnz bad
        cmp qword ptr [rsp + 8], {USER_CS}
        jne bad
        add eax, 20
        iretq

fault:  add rsp, 8                                # error code
        add qword ptr [rsp], 8                    # the MOV that faults
        inc ebp
        iretq

illegal:
        inc r13d
        add qword ptr [rsp], 2                    # the UD2
        iretq

bad:    mov al, 0x7f
        out 0xf4, al

        .org {USER - KERNEL:#x}
        mov ebx, 10
        xor eax, eax
        xor ebp, ebp
        xor r13d, r13d
again:  syscall
after:  int 0x80
        mov ecx, dword ptr [{HOLE:#x}]
        nop
        ud2
        dec ebx
        jnz again
        cmp eax, 10 * 1020
        jne wrong
        cmp ebp, 10
        jne wrong
        cmp r13d, 10
        jne wrong
        mov al, 0
        out 0xf4, al
wrong:  mov al, 1
        out 0xf4, al
"""


def entered(machine: Machine, symbols: dict[str, int]) -> CpuState:
    """Ring 0 at `_start`; the pages of ring 3 from USER on, one that is not there at HOLE."""
    idt = Idt()
    for vector, name, dpl in ((14, "fault", 0), (6, "illegal", 0), (0x80, "int80", 3)):
        idt[vector] = Gate("interrupt", symbols[name], selector=KERNEL_CS, dpl=dpl)
    state = prepare(machine.memory, entry=KERNEL, tables=TABLES, stack=STACK, identity_map=HOLE, idt=idt)
    pages = PageTables(machine.memory, PagingMode.LEVEL4, state.sregs.cr3, size=tables_size(HOLE) - 0x4000)
    pages.map(0, 0, 0x20_0000, page_size=0x20_0000)
    pages.map(USER, USER, 0x20_0000, user=True, page_size=0x20_0000)
    state.sregs.efer |= Efer.SCE
    return state


def test_calls_of_ring_3_go_through_and_its_faults_stay_its_own() -> None:
    code, symbols = assemble_with_symbols(SOURCE, address=KERNEL, bits=64)
    with Machine(vcpus=1, memory=16 << 20) as machine:
        machine.add(DebugExit())
        machine.load(FlatImage(code, KERNEL, "long"))
        vcpu = machine.vcpus[0]
        vcpu.set_cpu_state(entered(machine, symbols))
        star = KERNEL_CS << 32 | (USER_SS - 8 & ~3 | 3) << 48
        vcpu.set_msrs({Msr.STAR: star, Msr.LSTAR: symbols["entry"], Msr.SFMASK: 0x200})
        outcome = machine.run(SECONDS)
        assert (outcome.end, outcome.code) == (End.EXITED, 1), str(outcome.report)
        entry = machine.runners[0].ring3_entry
        if needs_repair():
            assert entry is not None
            assert entry.counts == {"syscall": 10, "int n": 10}
        else:
            assert entry is None
