"""Single steps and breakpoints (KVM_SET_GUEST_DEBUG)."""

from __future__ import annotations

import pytest

from bare_guest import CODE, guest, next_exit
from gnu_toolchain import assemble_with_symbols
from kvmpy.abi.flags import KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP
from kvmpy.exits import Debug, Hlt, InternalError, IoOut

SINGLE_STEP = 1 << 14  # DR6.BS


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_single_steps_stop_after_every_instruction(bits: int) -> None:
    with guest("inc eax; inc ebx; nop; inc eax; hlt", bits) as vcpu:
        code = vcpu.vm.memory.read(CODE, 16)
        width = {16: 2, 32: 1, 64: 2}[bits]  # of INC: with a prefix, short, and without a short form
        assert code[2 * width] == 0x90
        vcpu.single_step()
        places = []
        for _ in range(4):
            event = next_exit(vcpu)
            assert isinstance(event, Debug)
            assert event.exception == 1
            assert event.dr6 & SINGLE_STEP
            assert event.pc == vcpu.regs.rip
            places.append(event.pc - CODE)
        assert places == [width, 2 * width, 2 * width + 1, 3 * width + 1]
        assert (vcpu.regs.rax, vcpu.regs.rbx) == (2, 1)
        vcpu.single_step(False)
        assert next_exit(vcpu) == Hlt()


def test_the_guest_does_not_see_the_trap_flag_of_a_step() -> None:
    with guest("pushf; pop ax; hlt") as vcpu:
        vcpu.single_step()
        next_exit(vcpu)
        next_exit(vcpu)
        assert not vcpu.regs.rax & 0x100
        assert not vcpu.regs.rflags & 0x100


def test_ports_exit_while_single_stepping() -> None:
    with guest("mov al, 7; out 0x10, al; nop; hlt") as vcpu:
        vcpu.single_step()
        seen = [next_exit(vcpu) for _ in range(3)]
        assert IoOut(0x10, b"\7") in seen
        assert [type(event) for event in seen].count(Debug) == 2


def test_a_hardware_breakpoint_stops_before_its_instruction() -> None:
    source = "_start: mov ecx, 10; 1: inc eax; target: inc ebx; loop 1b; hlt"
    code, symbols = assemble_with_symbols(source, address=CODE, bits=32)
    with guest(source, 32) as vcpu:
        assert vcpu.vm.memory.read(CODE, len(code)) == code
        target = symbols["target"]
        vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, [target], dr7=0x402)
        for round in range(1, 4):
            event = next_exit(vcpu)
            assert isinstance(event, Debug)
            assert (event.exception, event.pc) == (1, target)
            assert event.dr6 & 1
            assert (vcpu.regs.rax, vcpu.regs.rbx) == (round, round - 1)
            # Step over it, as a debugger does: RFLAGS.RF would hold the breakpoint off for one instruction.
            vcpu.single_step()
            assert isinstance(next_exit(vcpu), Debug)
            assert vcpu.regs.rbx == round
            vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, [target], dr7=0x402)
        vcpu.set_guest_debug(0)
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rbx == 10


def test_a_software_breakpoint_is_a_debug_exit_or_an_instruction_kvm_cannot_emulate() -> None:
    with guest("nop; int3; hlt", 64) as vcpu:
        vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP)
        event = next_exit(vcpu)
        assert vcpu.regs.rip == CODE + 1
        if isinstance(event, InternalError):  # a KVM that runs ring 0 in its emulator
            assert event.instruction[0] == 0xCC
        else:
            assert isinstance(event, Debug)
            assert (event.exception, event.pc) == (3, CODE + 1)
