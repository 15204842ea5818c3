"""Registers written while KVM waits for the answer to a read: the read still completes, and what was written wins."""

from __future__ import annotations

import pytest

from bare_guest import CODE, DATA, MMIO, enter, guest, next_exit
from kvmpy.abi.exit_reasons import KVM_MSR_EXIT_REASON_UNKNOWN
from kvmpy.exits import Hlt, IoIn, IoOut, MmioRead, RdMsr
from kvmpy.x86.registers import Segment

UNKNOWN_MSR = 0x12345


@pytest.fixture(params=[True, False], ids=["sync_regs", "ioctls"])
def sync_regs(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_an_answer_reaches_its_register_though_another_was_written(sync_regs: bool) -> None:
    with guest("1: in al, 0x10; out 0x11, al; jmp 1b", sync_regs=sync_regs) as vcpu:
        for number in range(1, 20):
            event = next_exit(vcpu)
            assert isinstance(event, IoIn)
            vcpu.regs.rbx = number
            event.reply(number)
            assert vcpu.regs.rbx == number
            assert next_exit(vcpu) == IoOut(0x11, bytes([number]))
            assert vcpu.regs.rbx == number


def test_a_register_that_was_written_wins_over_the_answer(sync_regs: bool) -> None:
    with guest("in al, 0x10; hlt", sync_regs=sync_regs) as vcpu:
        event = next_exit(vcpu)
        assert isinstance(event, IoIn)
        event.reply(0x11)
        vcpu.regs.rax = 0x2222
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rax == 0x2222
        assert vcpu.regs.rip == CODE + 3


def test_a_jump_out_of_a_read_goes_where_it_was_sent(sync_regs: bool) -> None:
    with guest("in al, 0x10; hlt; nop; nop; hlt", sync_regs=sync_regs) as vcpu:
        assert isinstance(next_exit(vcpu), IoIn)
        vcpu.regs.rip = CODE + 4
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rip == CODE + 6


def test_a_whole_new_state_can_be_set_in_a_read(sync_regs: bool) -> None:
    with guest("in al, 0x10; hlt", sync_regs=sync_regs) as vcpu:
        assert isinstance(next_exit(vcpu), IoIn)
        enter(vcpu, "mov eax, 0x1234567; out 0x20, eax; hlt", 32)
        assert next_exit(vcpu) == IoOut(0x20, bytes.fromhex("67452301"), 4)
        assert vcpu.sregs.cr0 & 1


def test_system_registers_too_are_set_after_the_read(sync_regs: bool) -> None:
    # `rep insb` writes through ES when it completes: to where ES pointed when it began.
    with guest("mov cx, 4; mov dx, 0x10; xor di, di; rep insb; hlt", sync_regs=sync_regs) as vcpu:
        vcpu.sregs.es = Segment(DATA >> 4, DATA)
        event = next_exit(vcpu)
        assert isinstance(event, IoIn)
        event.reply(b"abcd")
        vcpu.sregs.es = Segment(0x900, 0x9000)
        assert vcpu.sregs.es.base == 0x9000
        assert next_exit(vcpu) == Hlt()
        assert vcpu.vm.memory.read(DATA, 5) == b"abcd\0"
        assert vcpu.vm.memory.read(0x9000, 4) == bytes(4)
        assert vcpu.sregs.es.base == 0x9000


def test_between_the_fragments_of_a_wide_read_registers_can_be_written(sync_regs: bool) -> None:
    source = f"movups xmm0, [{MMIO}]; movups [{DATA}], xmm0; hlt"
    with guest(source, 64, sync_regs=sync_regs, cpuid=True) as vcpu:
        for half in (b"ABCDEFGH", b"abcdefgh"):
            event = next_exit(vcpu)
            assert isinstance(event, MmioRead)
            event.reply(half)
            vcpu.regs.r12 = 0x1212
            assert vcpu.regs.r12 == 0x1212
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.r12 == 0x1212
        assert vcpu.vm.memory.read(DATA, 16) == b"ABCDEFGHabcdefgh"


def test_settle_completes_the_read_and_applies_what_was_written(sync_regs: bool) -> None:
    with guest("in ax, 0x10; hlt", sync_regs=sync_regs) as vcpu:
        event = next_exit(vcpu)
        assert isinstance(event, IoIn)
        event.reply(0x5555)
        vcpu.regs.rcx = 7
        vcpu.settle()
        assert (vcpu.regs.rax, vcpu.regs.rcx, vcpu.regs.rip) == (0x5555, 7, CODE + 2)
        assert next_exit(vcpu) == Hlt()
        assert (vcpu.regs.rax, vcpu.regs.rcx) == (0x5555, 7)


def test_writing_registers_in_a_read_is_no_interruption(sync_regs: bool) -> None:
    with guest("1: in al, 0x10; jmp 1b", sync_regs=sync_regs) as vcpu:
        for number in range(200):
            assert isinstance(next_exit(vcpu), IoIn)
            vcpu.regs.rdx = number


def test_a_kick_in_the_midst_of_it_is_not_swallowed(sync_regs: bool) -> None:
    with guest("1: in al, 0x10; jmp 1b", sync_regs=sync_regs) as vcpu:
        assert isinstance(next_exit(vcpu), IoIn)
        vcpu.regs.rdx = 3
        vcpu.kick()
        assert next_exit(vcpu).reason == 10
        assert vcpu.regs.rdx == 3
        assert isinstance(next_exit(vcpu), IoIn)


def test_registers_can_be_written_in_an_msr_exit(sync_regs: bool) -> None:
    with guest(f"mov ecx, {UNKNOWN_MSR}; rdmsr; hlt", sync_regs=sync_regs) as vcpu:
        vcpu.vm.exit_on_msrs(KVM_MSR_EXIT_REASON_UNKNOWN)
        event = next_exit(vcpu)
        assert isinstance(event, RdMsr)
        event.reply(0x1111_2222_3333_4444)
        vcpu.regs.rbx = 9
        assert next_exit(vcpu) == Hlt()
        assert (vcpu.regs.rax, vcpu.regs.rdx, vcpu.regs.rbx) == (0x3333_4444, 0x1111_2222, 9)
