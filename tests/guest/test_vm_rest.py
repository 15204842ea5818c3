"""What a VM has besides memory and interrupts: capabilities, clock, devices, statistics, MSR filters, vCPU ids."""

from __future__ import annotations

import errno
import time

import pytest

from bare_guest import empty_vm, guest, next_exit, run_to_hlt
from kvmpy import DeviceFd, Kvm
from kvmpy.abi.capabilities import Cap
from kvmpy.errors import CapabilityError, ClosedError, KvmError, RegisterValueError, UsageError
from kvmpy.exits import Hlt
from kvmpy.kvm.msr_filter import MsrFilterRange
from kvmpy.kvm.vm_interrupts import IrqchipRoute, MsiRoute

DEV_TYPE_VFIO = 4


def test_the_clock_runs_and_can_be_set() -> None:
    with empty_vm() as vm:
        vm.set_clock(5_000_000_000)
        first = vm.get_clock().clock
        assert 5_000_000_000 <= first < 15_000_000_000
        time.sleep(0.01)
        assert vm.get_clock().clock - first >= 10_000_000


def test_capabilities_of_the_vm() -> None:
    with empty_vm() as vm:
        assert vm.check_extension(Cap.USER_MEMORY) == 1
        assert vm.check_extension(10) == vm.check_extension(Cap.NR_MEMSLOTS) > 30
        assert vm.check_extension(0xFFFF) == 0
    with pytest.raises(ClosedError):
        vm.check_extension(Cap.USER_MEMORY)


def test_a_capability_is_enabled_or_refused() -> None:
    with empty_vm() as vm:
        vm.enable_cap(Cap.X86_USER_SPACE_MSR, 1)
        with pytest.raises(KvmError, match="KVM_ENABLE_CAP"):
            vm.enable_cap(0xFFFF)
        with pytest.raises(KvmError):
            vm.enable_cap(Cap.X86_USER_SPACE_MSR, 1 << 60)
        with pytest.raises(UsageError):
            vm.enable_cap(Cap.X86_USER_SPACE_MSR, 1, 2, 3, 4, 5)
        with pytest.raises(UsageError):
            vm.enable_cap(Cap.X86_USER_SPACE_MSR, 1 << 64)


def test_the_vm_has_a_tsc_frequency_for_its_vcpus() -> None:
    with empty_vm() as vm:
        try:
            khz = vm.get_tsc_khz()
        except KvmError:
            if vm.check_extension(Cap.VM_TSC_CONTROL):
                raise
            pytest.skip("this host's KVM has no TSC frequency of a VM")
        assert vm.create_vcpu().get_tsc_khz() == khz > 100_000
        if vm.check_extension(Cap.VM_TSC_CONTROL):
            vm.set_tsc_khz(khz)


def test_numbers_that_do_not_fit_the_kernels_fields_are_refused() -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        for call in (
            lambda: vm.set_irq_line(1 << 32, 1),
            lambda: vm.set_irq_line(5, 1 << 32),
            lambda: vm.signal_msi(1 << 64, 0),
            lambda: vm.signal_msi(0, 1 << 32),
            lambda: vm.set_gsi_routing([MsiRoute(1 << 32, 0, 0)]),
            lambda: vm.set_gsi_routing([IrqchipRoute(0, -1, 0)]),
            lambda: vm.set_clock(1 << 64),
            lambda: vm.add_irqfd(0, 1 << 32),
            lambda: vm.coalesce_writes(1 << 64, 4),
            lambda: vm.set_identity_map_address(1 << 64),
            lambda: vm.get_irqchip(1 << 32),
            lambda: vm.create_device(1 << 32),
        ):
            with pytest.raises(RegisterValueError):
                call()
        for wrong in (-1, 1 << 64, 1.5, "1"):
            with pytest.raises(UsageError):
                vm.ioctl("KVM_SET_TSS_ADDR", wrong)


def test_a_device_inside_the_kernel_has_attributes_and_closes_with_its_vm() -> None:
    with empty_vm() as vm:
        if not vm.check_extension(Cap.DEVICE_CTRL):
            pytest.skip("this host's KVM has no device control")
        try:
            device = vm.create_device(DEV_TYPE_VFIO)
        except KvmError as error:
            if error.errno not in (errno.ENODEV, errno.EINVAL):
                raise
            pytest.skip("this host's KVM has no VFIO device")
        assert isinstance(device, DeviceFd)
        assert device.has_attribute(1, 1)  # KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD
        assert not device.has_attribute(1, 99)
        assert not device.has_attribute(99, 0)
        with pytest.raises(KvmError, match="KVM_SET_DEVICE_ATTR"):
            device.set_attribute(1, 1, (0xFFFF_FFFF).to_bytes(4, "little"))  # no such file
        with pytest.raises(KvmError):
            device.get_attribute(1, 1)
        with pytest.raises(UsageError, match="vm descriptor"):
            device.ioctl("KVM_CREATE_VCPU", 0)
    assert device.closed
    with pytest.raises(ClosedError):
        device.has_attribute(1, 1)


def test_a_device_that_does_not_exist_is_refused() -> None:
    with empty_vm() as vm, pytest.raises(KvmError, match="KVM_CREATE_DEVICE"):
        vm.create_device(0xFFFF)


def test_statistics_of_a_vm() -> None:
    with empty_vm() as vm:
        if not vm.check_extension(Cap.BINARY_STATS_FD):
            pytest.skip("this host's KVM has no binary statistics")
        with vm.statistics() as statistics:
            counters = statistics.read()
            assert counters
            assert all(name.isidentifier() for name in counters)
            assert all(isinstance(value, (int, list)) for value in counters.values())
            with pytest.raises(UsageError):
                statistics.ioctl("KVM_RUN")
        with pytest.raises(ClosedError):
            statistics.read()


@pytest.mark.parametrize("id", [-1, 1 << 31, 1 << 32, 1 << 64, 100_000])
def test_a_vcpu_id_out_of_range_is_refused(id: int) -> None:
    with empty_vm() as vm:
        with pytest.raises(UsageError, match="out of range"):
            vm.create_vcpu(id)
        assert vm.vcpus == ()


def test_a_vcpu_id_is_used_once_and_free_ones_are_found() -> None:
    with empty_vm() as vm:
        assert vm.create_vcpu(3).id == 3
        with pytest.raises(UsageError, match="id 3 already"):
            vm.create_vcpu(3)
        assert vm.create_vcpu().id == 4
        assert vm.create_vcpu(0).id == 0
        assert [vcpu.id for vcpu in vm.vcpus] == [3, 4, 0]


def test_many_vcpus() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vcpus = [vm.create_vcpu() for _ in range(min(32, kvm.max_vcpus))]
        for vcpu in vcpus:
            vcpu.regs.rax = vcpu.id
        assert [vcpu.regs.rax for vcpu in vcpus] == list(range(len(vcpus)))


# MSR filters


def test_a_filtered_msr_without_exits_is_a_gp() -> None:
    source = """
        jmp go
        handler: mov al, 0x6D; out 0x66, al; hlt
        go: xor ax, ax; mov ds, ax
        mov word ptr [13 * 4], offset handler; mov word ptr [13 * 4 + 2], 0
        mov ecx, 0x174; rdmsr; out 0x10, al; wrmsr; hlt
    """
    with guest(source, cpuid=True) as vcpu:
        vcpu.vm.set_msr_filter([MsrFilterRange(0x174, reads=False)])
        assert [getattr(event, "port", None) for event in run_to_hlt(vcpu)] == [0x10, 0x66]


def test_a_filter_that_denies_by_default() -> None:
    with guest("mov ecx, 0x174; rdmsr; mov al, 1; out 0x10, al; hlt", cpuid=True) as vcpu:
        vcpu.vm.set_msr_filter([MsrFilterRange(0x170, 16, allow=[0x174])], default_allow=False)
        assert len(run_to_hlt(vcpu)) == 1
        vcpu.vm.set_msr_filter([])  # and an empty one allows everything again
        assert next_exit_is_not_lost(vcpu.vm.kvm)


def next_exit_is_not_lost(kvm: Kvm) -> bool:
    with kvm.create_vm() as vm:
        vm.add_ram(0, size=0x2000)
        vm.memory.write(0x1000, b"\xf4")
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(entry=0x1000)
        return next_exit(vcpu) == Hlt()


def test_filters_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError):
        MsrFilterRange(0, reads=False, writes=False)
    for count in (0, -1, 0x600 * 8 + 1):
        with pytest.raises(UsageError):
            MsrFilterRange(0, count)
    with pytest.raises(UsageError):
        MsrFilterRange(1 << 32)
    with empty_vm() as vm:
        with pytest.raises(UsageError, match="at most 16"):
            vm.set_msr_filter([MsrFilterRange(index) for index in range(17)])
        vm.set_msr_filter([MsrFilterRange(index) for index in range(16)])


def test_an_ioctl_without_its_capability_says_which() -> None:
    from kvmpy.abi.structs import kvm_xen_hvm_config

    with empty_vm() as vm:
        if vm.check_extension(Cap.XEN_HVM):
            pytest.skip("this host's KVM has Xen")
        with pytest.raises(CapabilityError, match="KVM_CAP_XEN_HVM") as refused:
            vm.ioctl("KVM_XEN_HVM_CONFIG", kvm_xen_hvm_config())
        assert refused.value.ioctl == "KVM_XEN_HVM_CONFIG"
