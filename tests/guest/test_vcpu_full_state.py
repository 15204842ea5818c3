"""The whole state of a vCPU: captured, compared, and given to a vCPU of another VM that goes on as if nothing was."""

from __future__ import annotations

import copy
import pickle

import pytest

from bare_guest import CODE, DATA, MMIO, RAM, empty_vm, guest, next_exit, run_until_halted, start
from kvmpy import Kvm, Vcpu, Vm
from kvmpy.exits import Exit, Hlt, IoIn, IoOut, MmioRead
from kvmpy.kvm.full_state import FullState

TSC = 0x10
STAR, LSTAR, FMASK = 0xC000_0081, 0xC000_0082, 0xC000_0084

WIDE_READ = f"""
    movups xmm0, [{MMIO}]
    movups [{DATA}], xmm0
    hlt
"""


def same_memory(old: Vm, new: Vm) -> None:
    new.memory.write(0, old.memory.read(0, RAM))


def run_copy(old: Vcpu, state: FullState, *, irqchip: bool = False) -> Exit:
    """The next exit of a new VM with the memory of the old one and `state`."""
    with empty_vm() as vm:
        if irqchip:
            vm.create_irqchip()
        same_memory(old.vm, vm)
        vcpu = vm.create_vcpu()
        state.apply(vcpu)
        event = next_exit(vcpu)
        same_memory(vm, old.vm)
        return event


@pytest.mark.parametrize("sync_regs", [True, False], ids=["sync_regs", "ioctls"])
def test_state_saved_between_the_fragments_of_a_wide_read_gives_the_right_xmm0(sync_regs: bool) -> None:
    with guest(WIDE_READ, 64, cpuid=True, sync_regs=sync_regs) as vcpu:
        first = next_exit(vcpu)
        assert first == MmioRead(MMIO, 8)
        assert isinstance(first, MmioRead)
        first.reply(b"ABCDEFGH")
        met: list[Exit] = []

        def answer(event: Exit) -> None:
            met.append(event)
            assert isinstance(event, MmioRead)
            event.reply(b"abcdefgh")

        state = FullState.capture(vcpu, answer)
        assert met == [MmioRead(MMIO + 8, 8)]
        assert run_copy(vcpu, state) == Hlt()
        assert vcpu.vm.memory.read(DATA, 16) == b"ABCDEFGHabcdefgh"


def test_state_saved_in_a_port_read_has_the_answer() -> None:
    with guest("in al, 0x10; out 0x11, al; hlt") as vcpu:
        event = next_exit(vcpu)
        assert isinstance(event, IoIn)
        event.reply(0x77)
        state = FullState.capture(vcpu)
        assert state.regs.rip == CODE + 2
        assert run_copy(vcpu, state) == IoOut(0x11, b"\x77")
        assert next_exit(vcpu) == IoOut(0x11, b"\x77")  # the original goes on, too


def test_every_part_comes_back() -> None:
    source = """
        mov eax, 0x11223344; mov [0x9000], eax
        movups xmm3, [0x9000]
        mov rax, 0x1000; mov dr0, rax
        mov ecx, 0xC0000082; mov eax, 0x5000; xor edx, edx; wrmsr
        hlt
    """
    with guest(source, 64, cpuid=True) as vcpu, Kvm() as kvm, kvm.create_vm() as vm:
        assert next_exit(vcpu) == Hlt()
        state = FullState.capture(vcpu)
        assert state.msrs[LSTAR] == 0x5000
        assert FullState.capture(vcpu).differences(state) in ([], [f"msrs[{TSC:#x}]"])
        vm.add_ram(0, size=RAM)
        same_memory(vcpu.vm, vm)
        other = vm.create_vcpu()
        state.apply(other)
        again = FullState.capture(other)
        moving = {f"msrs[{TSC:#x}]", "msrs[0x11]", "msrs[0x4b564d00]"}
        assert set(again.differences(state)) <= moving
        assert other.regs.copy() == vcpu.regs.copy()
        assert other.get_debug_registers().db[0] == 0x1000


def test_a_state_is_a_value() -> None:
    with guest("hlt") as vcpu:
        state = FullState.capture(vcpu)
        twin = copy.deepcopy(state)
        assert twin == state
        assert pickle.loads(pickle.dumps(state)) == state
        vcpu.regs.rax = 5
        assert state.regs.rax == 0
        twin.regs.rax = 6
        assert twin != state
        assert twin.differences(state) == ["regs"]
        twin.msrs[STAR] = 1
        assert twin.differences(state) == ["regs", f"msrs[{STAR:#x}]"]
        assert state != 5


def test_a_halted_processor_with_a_local_apic_stays_halted_and_wakes_by_its_interrupt() -> None:
    source = """
        xor ax, ax; mov ds, ax
        mov word ptr [0x30 * 4], offset handler; mov word ptr [0x30 * 4 + 2], 0
        sti; hlt; cli; hlt
        handler: mov al, 0x5A; out 0x10, al; iret
    """
    with empty_vm() as vm:
        vm.create_irqchip()
        vcpu = start(vm, source)
        run_until_halted(vcpu)
        state = FullState.capture(vcpu)
        assert state.mp_state == 3
        assert state.lapic is not None
        with empty_vm() as other:
            other.create_irqchip()
            same_memory(vm, other)
            woken = other.create_vcpu()
            state.apply(woken)
            assert woken.run(timeout=0.05).reason == 10
            assert woken.get_mp_state() == 3
            # The APIC is as after reset; software-enable it, then send a message-signalled interrupt.
            lapic = woken.get_lapic()
            lapic.regs[0xF1] = b"\x01"[0] if isinstance(lapic.regs[0xF1], int) else b"\x01"
            woken.set_lapic(lapic)
            assert other.signal_msi(0xFEE0_0000, 0x30)
            assert next_exit(woken) == IoOut(0x10, b"\x5a")


def test_a_vcpu_that_has_run_takes_the_state_back() -> None:
    with guest("1: inc al; out 0x10, al; jmp 1b", cpuid=True) as vcpu:
        assert next_exit(vcpu) == IoOut(0x10, b"\1")
        state = FullState.capture(vcpu)
        assert next_exit(vcpu) == IoOut(0x10, b"\2")
        assert next_exit(vcpu) == IoOut(0x10, b"\3")
        state.apply(vcpu)
        assert next_exit(vcpu) == IoOut(0x10, b"\2")


def test_a_state_is_taken_back_though_cpuid_shows_cr4_by_now() -> None:
    with guest("mov eax, cr4; or eax, 1 << 18; mov cr4, eax; out 0x10, al; hlt", 32, cpuid=True) as vcpu:
        if not vcpu.get_cpuid().has("xsave"):
            pytest.skip("this host's KVM has no XSAVE for guests")
        state = FullState.capture(vcpu)
        assert isinstance(next_exit(vcpu), IoOut)
        assert vcpu.sregs.cr4 == 1 << 18
        state.apply(vcpu)
        assert vcpu.sregs.cr4 == 0
        assert isinstance(next_exit(vcpu), IoOut)


def test_a_pending_exception_is_part_of_the_state() -> None:
    source = """
        jmp go
        handler: mov al, 0x66; out 0x10, al; hlt
        go: xor ax, ax; mov ds, ax
        mov word ptr [6 * 4], offset handler; mov word ptr [6 * 4 + 2], 0
        hlt
        hlt
    """
    with guest(source) as vcpu:
        assert next_exit(vcpu) == Hlt()
        vcpu.inject_exception(6)
        state = FullState.capture(vcpu)
        assert run_copy(vcpu, state) == IoOut(0x10, b"\x66")
