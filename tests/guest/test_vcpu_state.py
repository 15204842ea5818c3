"""The rest of a vCPU's state: each get has its set, the guest sees what was set, and KVM what the guest did."""

from __future__ import annotations

import pytest

from bare_guest import CODE, DATA, TABLES, bytes_out, empty_vm, guest, next_exit, run_until_halted, start
from kvmpy import Kvm, Vcpu
from kvmpy.abi.capabilities import Cap
from kvmpy.abi.flags import KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED
from kvmpy.errors import CapabilityError, KvmError, RegisterValueError, UsageError
from kvmpy.exits import Hlt, Interrupted, IoOut, IrqWindowOpen
from kvmpy.x86.cpuid import CpuidEntry

TSC, APIC_BASE = 0x10, 0x1B
LSTAR, KERNEL_GS_BASE = 0xC000_0082, 0xC000_0102


def needs(vcpu: Vcpu, capability: Cap) -> None:
    if not vcpu.vm.check_extension(capability):
        pytest.skip(f"this host's KVM has no {capability.name}")


def handler(vector: int, output: int, *, iret: bool = True) -> str:
    """Real-mode code that installs a handler which writes a byte to port 0x66."""
    return f"""
        jmp go{vector}
        handler{vector}: push ax; mov al, {output}; out 0x66, al; pop ax; {"iret" if iret else "hlt"}
        go{vector}: xor ax, ax; mov ds, ax
        mov word ptr [{vector} * 4], offset handler{vector}; mov word ptr [{vector} * 4 + 2], 0
    """


# FPU, XSAVE, XCRs


def test_fpu_state_round_trips() -> None:
    with guest("hlt", 64, cpuid=True) as vcpu:
        fpu = vcpu.get_fpu()
        assert fpu.fcw == 0x37F
        fpu.fcw = 0x27F
        fpu.mxcsr = 0x1F80
        vcpu.set_fpu(fpu)
        assert vcpu.get_fpu().fcw == 0x27F


def test_xsave_shows_what_the_guest_loaded() -> None:
    with guest(f"movups xmm2, [{DATA}]; hlt", 64, cpuid=True) as vcpu:
        value = bytes(range(0x50, 0x60))
        vcpu.vm.memory.write(DATA, value)
        next_exit(vcpu)
        area = vcpu.get_xsave()
        assert area[160 + 32 : 160 + 48] == value  # FXSAVE layout: xmm0 at byte 160
        assert area[512] & 2  # XSTATE_BV: SSE


def test_xsave_that_is_set_is_what_the_guest_stores() -> None:
    with guest(f"movups [{DATA}], xmm5; hlt", 64, cpuid=True) as vcpu:
        area = bytearray(vcpu.get_xsave())
        area[160 + 80 : 160 + 96] = b"sixteen bytes ok"
        area[512] |= 3
        vcpu.set_xsave(bytes(area))
        next_exit(vcpu)
        assert vcpu.vm.memory.read(DATA, 16) == b"sixteen bytes ok"


@pytest.mark.parametrize("size", [0, 512, 4095, 4097])
def test_an_xsave_area_of_a_wrong_size_is_refused(size: int) -> None:
    with guest("hlt") as vcpu, pytest.raises(UsageError, match="4096"):
        vcpu.set_xsave(bytes(size))


def test_xcrs_round_trip() -> None:
    with guest("hlt", cpuid=True) as vcpu:
        needs(vcpu, Cap.XCRS)
        xcrs = vcpu.get_xcrs()
        assert xcrs.nr_xcrs == 1
        assert xcrs.xcrs[0].value & 1
        vcpu.set_xcrs(xcrs)
        assert bytes(vcpu.get_xcrs()) == bytes(xcrs)


# MSRs


def test_every_msr_of_the_list_can_be_read_at_once() -> None:
    with guest("hlt", cpuid=True) as vcpu:
        indices = vcpu.vm.kvm.msr_indices()
        assert TSC in indices
        values = vcpu.get_msrs(indices)
        assert list(values) == indices


def test_msrs_go_into_the_guest_and_back() -> None:
    source = f"mov ecx, {LSTAR}; rdmsr; mov ecx, {KERNEL_GS_BASE}; wrmsr; hlt"
    with guest(source, 64, cpuid=True) as vcpu:
        vcpu.set_msr(LSTAR, 0x0000_7ABC_1234_5678)
        next_exit(vcpu)
        assert (vcpu.regs.rdx, vcpu.regs.rax) == (0x7ABC, 0x1234_5678)
        assert vcpu.get_msr(KERNEL_GS_BASE) == 0x0000_7ABC_1234_5678


def test_more_msrs_than_kvm_takes_at_once() -> None:
    with guest("hlt", cpuid=True) as vcpu:
        assert vcpu.get_msrs([LSTAR] * 700) == {LSTAR: 0}


def test_an_unknown_msr_is_named() -> None:
    with guest("hlt") as vcpu:
        with pytest.raises(KvmError, match="0x12345") as refused:
            vcpu.get_msrs([TSC, 0x12345, LSTAR])
        assert refused.value.ioctl == "KVM_GET_MSRS"
        with pytest.raises(KvmError, match=r"0x12345 does not take 0x1\b"):
            vcpu.set_msrs({LSTAR: 0, 0x12345: 1})


@pytest.mark.parametrize("value", [-1, 1 << 64, None, 1.0])
def test_an_msr_value_that_does_not_fit_is_refused(value: int) -> None:
    with guest("hlt") as vcpu:
        with pytest.raises(RegisterValueError):
            vcpu.set_msr(LSTAR, value)
        with pytest.raises(RegisterValueError):
            vcpu.get_msr(1 << 32)


# CPUID


def test_the_guest_sees_the_cpuid_that_was_set() -> None:
    with guest("mov eax, 0x40000010; cpuid; hlt", 64) as vcpu:
        table = vcpu.vm.kvm.supported_cpuid()
        table.put(CpuidEntry(0x4000_0010, eax=0x1111, ebx=0x2222, ecx=0x3333, edx=0x4444))
        vcpu.set_cpuid(table)
        # KVM keeps some bits in step with CR4 and the APIC base; the rest is as it was set.
        assert {(entry.function, entry.index) for entry in vcpu.get_cpuid()} == {
            (entry.function, entry.index) for entry in table
        }
        assert vcpu.get_cpuid().find(0x4000_0010) == table.find(0x4000_0010)
        next_exit(vcpu)
        assert (vcpu.regs.rax, vcpu.regs.rbx, vcpu.regs.rcx, vcpu.regs.rdx) == (0x1111, 0x2222, 0x3333, 0x4444)


def test_cpuid_cannot_change_after_the_first_run() -> None:
    with guest("hlt", cpuid=True) as vcpu:
        next_exit(vcpu)
        table = vcpu.get_cpuid()
        table.put(CpuidEntry(0x4000_0010, eax=1))
        with pytest.raises(UsageError, match="after the vCPU has run"):
            vcpu.set_cpuid(table)


def test_a_cpuid_table_that_is_too_long_is_refused_with_advice() -> None:
    with guest("hlt") as vcpu:
        table = vcpu.vm.kvm.supported_cpuid()
        for leaf in range(300):
            table.put(CpuidEntry(0x5000_0000 + leaf))
        with pytest.raises(KvmError, match="256"):
            vcpu.set_cpuid(table)


# Debug registers, sregs2


def test_debug_registers_go_into_the_guest_and_back() -> None:
    with guest("mov rax, dr0; mov rbx, 0x5678; mov dr1, rbx; hlt", 64) as vcpu:
        registers = vcpu.get_debug_registers()
        assert registers.dr6 & 0xFFFF_0FF0 == 0xFFFF_0FF0
        registers.db[0] = 0x1234
        vcpu.set_debug_registers(registers)
        next_exit(vcpu)
        assert vcpu.regs.rax == 0x1234
        assert vcpu.get_debug_registers().db[1] == 0x5678


def test_sregs2_agrees_with_the_live_registers() -> None:
    with guest("hlt", 64) as vcpu:
        needs(vcpu, Cap.SREGS2)
        vcpu.sregs.cr2 = 0x1357
        sregs2 = vcpu.get_sregs2()
        assert (sregs2.cr2, sregs2.cr3) == (0x1357, vcpu.sregs.cr3)
        sregs2.cr2 = 0x2468
        vcpu.set_sregs2(sregs2)
        assert vcpu.sregs.cr2 == 0x2468
        assert next_exit(vcpu) == Hlt()


# Events


def test_an_injected_exception_is_delivered() -> None:
    with guest(handler(6, 0x61, iret=False) + "hlt; hlt") as vcpu:
        assert next_exit(vcpu) == Hlt()
        vcpu.inject_exception(6)
        assert vcpu.get_events().exception.injected == 1
        assert bytes_out(vcpu) == b"\x61"


def test_an_error_code_is_injected_in_long_mode() -> None:
    # A 64-bit IDT with one gate, built by the guest: vector 14 pops its error code into RAX.
    source = f"""
        lea rbx, [rip + handler]
        mov rdi, {DATA + 14 * 16}
        mov [rdi], bx
        mov word ptr [rdi + 2], 8
        mov word ptr [rdi + 4], 0x8E00
        shr rbx, 16
        mov [rdi + 6], rbx
        lidt [rip + idtr]
        hlt
        hlt
        idtr: .word 0xFFF
              .quad {DATA}
        handler: pop rax; hlt
    """
    with guest(source, 64) as vcpu:
        assert next_exit(vcpu) == Hlt()
        vcpu.inject_exception(14, 0x1234)
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rax == 0x1234


@pytest.mark.parametrize("vector", [-1, 32, 256, 1 << 32])
def test_an_exception_that_does_not_exist_is_refused(vector: int) -> None:
    with guest("hlt") as vcpu, pytest.raises(RegisterValueError):
        vcpu.inject_exception(vector)


def test_an_nmi_is_delivered() -> None:
    with guest(handler(2, 0x62) + "hlt; mov al, 0x70; out 0x66, al; hlt") as vcpu:
        assert next_exit(vcpu) == Hlt()
        vcpu.nmi()
        assert bytes_out(vcpu) == b"\x62\x70"


def test_smi_is_refused_where_there_is_no_smm() -> None:
    with guest("hlt") as vcpu:
        if vcpu.vm.check_extension(Cap.X86_SMM):
            pytest.skip("this host's KVM has SMM")
        with pytest.raises(CapabilityError, match="X86_SMM"):
            vcpu.smi()


# Interrupts without an irqchip


def test_an_interrupt_is_delivered_when_the_guest_is_ready() -> None:
    with guest(handler(0x40, 0x63) + "sti; 1: hlt; mov al, 0x71; out 0x66, al; cli; hlt") as vcpu:
        assert next_exit(vcpu) == Hlt()
        assert vcpu.page.if_flag
        assert vcpu.page.ready_for_interrupt_injection
        vcpu.interrupt(0x40)
        assert bytes_out(vcpu) == b"\x63\x71"


def test_the_interrupt_window_opens_when_the_guest_lets_interrupts_in() -> None:
    source = handler(0x40, 0x63) + "cli; out 0x10, al; sti; 1: nop; jmp 1b"
    with guest(source) as vcpu:
        event = next_exit(vcpu)
        assert isinstance(event, IoOut)
        assert event.port == 0x10
        assert not vcpu.page.if_flag
        assert not vcpu.page.ready_for_interrupt_injection
        vcpu.page.request_interrupt_window = True
        assert next_exit(vcpu) == IrqWindowOpen()
        vcpu.page.request_interrupt_window = False
        assert vcpu.page.ready_for_interrupt_injection
        assert vcpu.page.if_flag
        vcpu.interrupt(0x40)
        assert next_exit(vcpu) == IoOut(0x66, b"\x63")


@pytest.mark.parametrize("vector", [-1, 256, 1 << 32])
def test_an_interrupt_vector_that_does_not_exist_is_refused(vector: int) -> None:
    with guest("hlt") as vcpu, pytest.raises(RegisterValueError):
        vcpu.interrupt(vector)


def test_an_interrupt_past_an_irqchip_is_refused_with_advice() -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        with pytest.raises(KvmError, match="raise its lines"):
            start(vm, "hlt").interrupt(0x40)


# Local APIC, MP state


def test_the_local_apic_round_trips() -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        vcpu = start(vm, "hlt")
        lapic = vcpu.get_lapic()
        registers = bytearray(bytes(lapic))
        registers[0x80] = 0x20  # TPR
        vcpu.set_lapic(type(lapic).from_buffer_copy(registers))
        assert bytes(vcpu.get_lapic())[0x80] == 0x20
        assert vcpu.sregs.cr8 == 2


def test_without_an_irqchip_there_is_no_local_apic() -> None:
    with guest("hlt") as vcpu, pytest.raises(KvmError, match="create_irqchip"):
        vcpu.get_lapic()


def test_mp_states_of_first_second_and_halted_processors() -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        first = start(vm, "cli; hlt")
        second = vm.create_vcpu()
        assert (first.get_mp_state(), second.get_mp_state()) == (KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED)
        run_until_halted(first)
        assert first.get_mp_state() == KVM_MP_STATE_HALTED
        first.set_mp_state(KVM_MP_STATE_RUNNABLE)
        assert first.get_mp_state() == KVM_MP_STATE_RUNNABLE
        with pytest.raises(KvmError):
            first.set_mp_state(77)


def test_setting_a_mode_starts_a_second_processor() -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        start(vm, "mov al, 2; out 0x10, al; cli; hlt")
        second = vm.create_vcpu()
        assert second.run(timeout=0.02) == Interrupted(True)  # it waits for SIPI
        second.set_real_mode(entry=CODE)
        assert next_exit(second) == IoOut(0x10, b"\2")


# Translation, time, the rest


def test_translate_walks_the_guests_tables() -> None:
    with guest("hlt", 64) as vcpu:
        translation = vcpu.translate(CODE + 5)
        assert (translation.valid, translation.physical_address) == (1, CODE + 5)
        assert vcpu.translate(0x7FFF_0000_0000).valid == 0
        vcpu.vm.memory.write_u64(TABLES + 0x4000, 0)  # the PML4 is the first page table
        if vcpu.translate(CODE).valid:
            pytest.skip("the page tables do not begin where this test thinks")


def test_the_tsc_has_a_frequency_and_runs() -> None:
    with guest("rdtsc; hlt; rdtsc; hlt", 64, cpuid=True) as vcpu:
        assert vcpu.get_tsc_khz() > 100_000
        next_exit(vcpu)
        first = vcpu.regs.rdx << 32 | vcpu.regs.rax
        next_exit(vcpu)
        assert vcpu.regs.rdx << 32 | vcpu.regs.rax > first


def test_setting_the_same_tsc_frequency_is_allowed() -> None:
    with guest("hlt") as vcpu:
        khz = vcpu.get_tsc_khz()
        vcpu.set_tsc_khz(khz)
        assert vcpu.get_tsc_khz() == khz


def test_kvmclock_paused_needs_a_kvmclock() -> None:
    with guest("hlt") as vcpu, pytest.raises(KvmError) as refused:
        vcpu.kvmclock_paused()
    assert refused.value.ioctl == "KVM_KVMCLOCK_CTRL"


def test_a_vcpu_capability_that_does_not_exist_is_refused() -> None:
    with guest("hlt") as vcpu:
        with pytest.raises(KvmError, match="KVM_ENABLE_CAP"):
            vcpu.enable_cap(0xFFFF)
        with pytest.raises(UsageError, match="at most 4"):
            vcpu.enable_cap(Cap.HYPERV_SYNIC, 1, 2, 3, 4, 5)


def test_statistics_of_a_vcpu_count_its_exits() -> None:
    with guest("1: out 0x10, al; jmp 1b") as vcpu:
        needs(vcpu, Cap.BINARY_STATS_FD)
        with vcpu.statistics() as statistics:
            before = statistics.read()
            for _ in range(20):
                next_exit(vcpu)
            after = statistics.read()
            assert before.keys() == after.keys()
            assert "exits" in after
            assert any(before[name] != after[name] for name in after)


def test_a_fresh_vcpu_is_in_the_reset_state_of_kvm() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        assert vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE
        assert vcpu.get_events().exception.injected == 0
        assert len(vcpu.get_cpuid()) == 0
        assert vcpu.get_msr(APIC_BASE) & 0xFFFF_F000 == 0xFEE0_0000
