"""Interrupt controllers inside KVM: lines, messages, routes and timers reach the guest's handlers."""

from __future__ import annotations

import pytest

from bare_guest import CODE, empty_vm, guest, next_exit, start
from kvmpy import Vcpu, Vm
from kvmpy.abi.capabilities import Cap
from kvmpy.abi.flags import KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE
from kvmpy.errors import CapabilityError, KvmError, UsageError
from kvmpy.exits import Interrupted, IoapicEoi, IoOut
from kvmpy.kvm.vm_interrupts import IrqchipRoute, MsiRoute

VECTOR = 0x40
MSI_TO_FIRST_CPU = 0xFEE0_0000
FIXED, NMI = 0, 4 << 8


def handler(vector: int, byte: int, eoi: str = "") -> str:
    return f"""
        jmp set{vector}
        handler{vector}: push ax; mov al, {byte}; out 0x10, al; {eoi}; pop ax; iret
        set{vector}: xor ax, ax; mov ds, ax
        mov word ptr [{vector} * 4], offset handler{vector}; mov word ptr [{vector} * 4 + 2], 0
    """


# Both PICs, vectors from 0x20 and 0x28 on, all lines open.
PICS = """
    mov al, 0x11; out 0x20, al; out 0xA0, al
    mov al, 0x20; out 0x21, al; mov al, 0x28; out 0xA1, al
    mov al, 4; out 0x21, al; mov al, 2; out 0xA1, al
    mov al, 1; out 0x21, al; out 0xA1, al
    mov al, 0; out 0x21, al; out 0xA1, al
"""
PIC_EOI = "mov al, 0x20; out 0x20, al; out 0xA0, al"
# The local APIC is below 4 GiB: real mode reaches it with a 4 GiB segment, "unreal mode", which set_real_mode's state
# has not. Protected mode cannot return from handlers on every host, so these guests switch the APIC on from Python.
WAIT = "mov al, 0x77; out 0x11, al; sti; 1: hlt; jmp 1b"


def enable_local_apic(vcpu: Vcpu) -> None:
    lapic = vcpu.get_lapic()
    registers = bytearray(bytes(lapic))
    registers[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
    vcpu.set_lapic(type(lapic).from_buffer_copy(registers))


def ready(vcpu: Vcpu) -> None:
    assert next_exit(vcpu) == IoOut(0x11, b"\x77")


def silent(vcpu: Vcpu) -> bool:
    """Whether the guest hears nothing for a while."""
    return vcpu.run(timeout=0.05) == Interrupted(True)


def with_pics(vm: Vm, *handlers: str) -> Vcpu:
    vm.create_irqchip()
    vcpu = start(vm, "".join(handlers) + PICS + WAIT)
    ready(vcpu)
    return vcpu


def test_lines_of_both_pics_reach_their_handlers() -> None:
    with empty_vm() as vm:
        vcpu = with_pics(vm, handler(0x25, 0x05, PIC_EOI), handler(0x2C, 0x0C, PIC_EOI))
        assert vm.irqchip == "full"
        for gsi, byte in ((5, b"\x05"), (12, b"\x0c"), (5, b"\x05")):
            vm.set_irq_line(gsi, 1)
            vm.set_irq_line(gsi, 0)
            assert next_exit(vcpu) == IoOut(0x10, byte)
        assert silent(vcpu)


def test_line_status_tells_delivered_from_masked() -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        vcpu = start(vm, handler(0x25, 0x05, PIC_EOI) + PICS + "mov al, 0x08; out 0x21, al;" + WAIT)  # IRQ 3 masked
        ready(vcpu)
        assert vm.set_irq_line_status(5, 1) > 0
        vm.set_irq_line_status(5, 0)
        assert next_exit(vcpu) == IoOut(0x10, b"\x05")
        vm.set_gsi_routing([IrqchipRoute(20, KVM_IRQCHIP_IOAPIC, 20)])
        assert vm.set_irq_line_status(20, 1) == -1  # the IOAPIC's entries are masked after reset
        vm.set_irq_line_status(20, 0)


def test_lines_need_a_controller() -> None:
    with empty_vm() as vm:
        with pytest.raises(KvmError, match="create_irqchip"):
            vm.set_irq_line(5, 1)
        with pytest.raises(KvmError):
            vm.get_irqchip(0)


def test_controllers_come_before_vcpus_and_once() -> None:
    with guest("hlt") as vcpu:
        for create in (vcpu.vm.create_irqchip, vcpu.vm.create_split_irqchip):
            with pytest.raises(UsageError, match="before the first create_vcpu"):
                create()
        with pytest.raises(UsageError, match="before the first create_vcpu"):
            vcpu.vm.set_identity_map_address(0xFFFB_C000)
    with empty_vm() as vm:
        vm.create_irqchip()
        with pytest.raises(KvmError, match="already"):
            vm.create_irqchip()


def test_states_of_the_controllers_round_trip() -> None:
    with empty_vm() as vm:
        vcpu = with_pics(vm)
        master, slave, ioapic = (vm.get_irqchip(chip) for chip in (0, 1, 2))
        assert (master.chip.pic.irq_base, slave.chip.pic.irq_base) == (0x20, 0x28)
        master.chip.pic.irq_base = 0x50
        ioapic.chip.ioapic.redirtbl[3].bits = 1 << 16 | 0x99
        for state in (master, slave, ioapic):
            vm.set_irqchip(state)
        assert vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER).chip.pic.irq_base == 0x50
        assert bytes(vm.get_irqchip(KVM_IRQCHIP_PIC_SLAVE)) == bytes(slave)
        assert vm.get_irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[3].bits == 1 << 16 | 0x99
        assert silent(vcpu)
        with pytest.raises(KvmError):
            vm.get_irqchip(3)


def test_a_message_reaches_the_local_apic() -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        vcpu = start(vm, handler(VECTOR, 0x4D) + WAIT)
        enable_local_apic(vcpu)
        ready(vcpu)
        assert vm.signal_msi(MSI_TO_FIRST_CPU, VECTOR)
        assert next_exit(vcpu) == IoOut(0x10, b"\x4d")
        assert not vm.signal_msi(MSI_TO_FIRST_CPU | 7 << 12, VECTOR)  # there is no CPU 7


def test_a_route_turns_a_line_into_a_message_or_into_another_line() -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        vcpu = start(vm, handler(VECTOR, 0x4D) + handler(0x23, 0x03, PIC_EOI) + PICS + WAIT)
        enable_local_apic(vcpu)
        # KVM hands PIC interrupts to the first CPU through LINT0, which must be set to ExtINT.
        lapic = vcpu.get_lapic()
        registers = bytearray(bytes(lapic))
        registers[0x350:0x354] = (7 << 8).to_bytes(4, "little")
        vcpu.set_lapic(type(lapic).from_buffer_copy(registers))
        ready(vcpu)
        vm.set_gsi_routing([MsiRoute(30, MSI_TO_FIRST_CPU, VECTOR), IrqchipRoute(31, KVM_IRQCHIP_PIC_MASTER, 3)])
        vm.set_irq_line(31, 1)
        vm.set_irq_line(31, 0)
        assert next_exit(vcpu) == IoOut(0x10, b"\x03")
        vm.set_irq_line(30, 1)
        assert next_exit(vcpu) == IoOut(0x10, b"\x4d")
        vm.set_irq_line(5, 1)  # routed nowhere any more
        assert silent(vcpu)


def test_a_bad_route_is_refused() -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        with pytest.raises(KvmError):
            vm.set_gsi_routing([IrqchipRoute(0, 9, 0)])
        vm.set_gsi_routing([])


def test_routes_print_readably() -> None:
    assert repr(MsiRoute(1, 0xFEE0_0000, 0x40)) == "MsiRoute(gsi=1, address=0xfee00000, data=0x40)"
    assert repr(IrqchipRoute(1, 2, 3)) == "IrqchipRoute(gsi=1, chip=2, pin=3)"


def test_the_timer_inside_kvm_ticks() -> None:
    # Channel 0, mode 2, 1193 input clocks: a millisecond.
    timer = "mov al, 0x34; out 0x43, al; mov al, 0xA9; out 0x40, al; mov al, 4; out 0x40, al;"
    with empty_vm() as vm:
        vm.create_irqchip()
        vm.create_pit()
        vcpu = start(vm, handler(0x20, 0x20, PIC_EOI) + PICS + timer + WAIT)
        ready(vcpu)
        for _ in range(20):
            assert next_exit(vcpu) == IoOut(0x10, b"\x20")
        state = vm.get_pit()
        assert state.channels[0].mode == 2
        assert state.channels[0].count == 0x4A9
        state.channels[0].count = 0x5000
        vm.set_pit(state)
        assert vm.get_pit().channels[0].count == 0x5000


def test_the_timer_needs_the_irqchip_and_comes_once() -> None:
    with empty_vm() as vm:
        with pytest.raises(KvmError, match="create_irqchip"):
            vm.create_pit()
        vm.create_irqchip()
        vm.create_pit()
        with pytest.raises(KvmError, match="already"):
            vm.create_pit()


@pytest.mark.parametrize("speaker", [True, False])
def test_the_speaker_port_is_inside_kvm_when_asked_for(speaker: bool) -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        vm.create_pit(speaker_port=speaker)
        vcpu = start(vm, "in al, 0x61; mov al, 1; out 0x10, al; cli; hlt")
        assert (next_exit(vcpu) == IoOut(0x10, b"\1")) is speaker


def test_split_irqchip_delivers_messages_and_tells_of_eois() -> None:
    with empty_vm() as vm:
        if not vm.check_extension(Cap.SPLIT_IRQCHIP):
            pytest.skip("this host's KVM has no split irqchip")
        vm.create_split_irqchip()
        assert vm.irqchip == "split"
        # Long mode reaches the local APIC's EOI register; interrupts come through a 64-bit IDT of one gate.
        source = f"""
            lea rbx, [rip + handler]
            mov rdi, {0x9000 + VECTOR * 16}
            mov [rdi], bx
            mov word ptr [rdi + 2], 8
            mov word ptr [rdi + 4], 0x8E00
            lidt [rip + idtr]
            mov edi, 0xFEE000F0
            mov dword ptr [rdi], 0x1FF
            mov al, 0x77; out 0x11, al
            sti
            1: hlt; jmp 1b
            idtr: .word 0xFFF
                  .quad 0x9000
            handler: mov al, 0x4D; out 0x10, al
                mov edi, 0xFEE000B0
                mov dword ptr [rdi], 0
                mov al, 0x4E; out 0x10, al
                iretq
        """
        vcpu = start(vm, source, 64)
        # A level-triggered route tells KVM which EOIs user space wants to hear of.
        vm.set_gsi_routing([MsiRoute(4, MSI_TO_FIRST_CPU, 1 << 15 | 1 << 14 | VECTOR)])
        ready(vcpu)
        assert vm.signal_msi(MSI_TO_FIRST_CPU, 1 << 15 | 1 << 14 | VECTOR)
        assert next_exit(vcpu) == IoOut(0x10, b"\x4d")
        assert next_exit(vcpu) == IoapicEoi(VECTOR)
        assert next_exit(vcpu) == IoOut(0x10, b"\x4e")
        with pytest.raises(KvmError):
            vm.get_irqchip(KVM_IRQCHIP_IOAPIC)


def test_special_addresses_are_taken_before_vcpus() -> None:
    with empty_vm() as vm:
        vm.set_identity_map_address(0xFFFB_C000)
        vm.set_tss_address(0xFFFB_D000)
        vcpu = start(vm, "mov al, 1; out 0x10, al; hlt")
        assert next_exit(vcpu) == IoOut(0x10, b"\1")
        with pytest.raises(UsageError):
            vm.set_identity_map_address(0)


def test_another_vcpu_may_be_the_first_to_start() -> None:
    with empty_vm() as vm:
        if not vm.check_extension(Cap.SET_BOOT_CPU_ID):
            pytest.skip("this host's KVM has no KVM_SET_BOOT_CPU_ID")
        vm.create_irqchip()
        vm.set_boot_vcpu_id(1)
        first, second = vm.create_vcpu(), vm.create_vcpu()
        assert (first.get_mp_state(), second.get_mp_state()) == (1, 0)
        vm.memory.write(CODE, b"\xe6\x10\xf4")
        first.set_real_mode(entry=CODE)  # setting a mode starts any processor
        assert next_exit(first) == IoOut(0x10, b"\0")


def test_reinjection_can_be_controlled_by_the_generic_ioctl() -> None:
    from kvmpy.abi.structs import kvm_reinject_control

    with empty_vm() as vm:
        if not vm.check_extension(Cap.REINJECT_CONTROL):
            pytest.skip("this host's KVM has no KVM_REINJECT_CONTROL")
        with pytest.raises((KvmError, CapabilityError)):
            vm.ioctl("KVM_REINJECT_CONTROL", kvm_reinject_control())
        vm.create_irqchip()
        vm.create_pit()
        vm.ioctl("KVM_REINJECT_CONTROL", kvm_reinject_control(pit_reinject=0))
