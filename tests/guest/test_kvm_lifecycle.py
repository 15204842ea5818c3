"""Birth and death of descriptors: closed once, refused afterwards, missed when forgotten, and nothing left behind."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from bare_guest import DATA, MMIO, RAM, empty_vm, guest, next_exit, start
from kvmpy import Kvm, Vcpu, Vm
from kvmpy.abi.capabilities import Cap
from kvmpy.errors import ClosedError
from kvmpy.exits import Hlt, IoIn, IoOut, MmioRead
from kvmpy.kvm.coalesced_ring import CoalescedRing
from kvmpy.kvm.dirty_ring import DirtyRing
from kvmpy.kvm.full_state import FullState
from kvmpy.kvm.msr_filter import MsrFilterRange
from kvmpy.memory import MemoryRegion

T = TypeVar("T")

KVM_USES: dict[str, Callable[[Kvm], object]] = {
    "fileno": lambda kvm: kvm.fileno(),
    "with": lambda kvm: kvm.__enter__(),
    "create_vm": lambda kvm: kvm.create_vm(),
    "check_extension": lambda kvm: kvm.check_extension(Cap.USER_MEMORY),
    "max_vcpus": lambda kvm: kvm.max_vcpus,
    "max_vcpu_id": lambda kvm: kvm.max_vcpu_id,
    "supported_cpuid": lambda kvm: kvm.supported_cpuid(),
    "emulated_cpuid": lambda kvm: kvm.emulated_cpuid(),
    "msr_indices": lambda kvm: kvm.msr_indices(),
    "feature_msr_indices": lambda kvm: kvm.feature_msr_indices(),
    "feature_msr": lambda kvm: kvm.feature_msr(0x10A),
    "ioctl": lambda kvm: kvm.ioctl("KVM_GET_API_VERSION"),
}

VM_USES: dict[str, Callable[[Vm], object]] = {
    "fileno": lambda vm: vm.fileno(),
    "with": lambda vm: vm.__enter__(),
    "add_ram": lambda vm: vm.add_ram(RAM, size=0x1000),
    "add_rom": lambda vm: vm.add_rom(RAM, b"x"),
    "add_memory": lambda vm: vm.add_memory(MemoryRegion.anonymous(RAM, 0x1000)),
    "add_guest_memfd": lambda vm: vm.add_guest_memfd(MemoryRegion.anonymous(RAM, 0x1000), 0),
    "create_guest_memfd": lambda vm: vm.create_guest_memfd(0x1000),
    "remove_memory": lambda vm: vm.remove_memory(vm.memory.regions[0]),
    "move_memory": lambda vm: vm.move_memory(vm.memory.regions[0], RAM),
    "set_dirty_logging": lambda vm: vm.set_dirty_logging(vm.memory.regions[0]),
    "enable_manual_dirty_log": lambda vm: vm.enable_manual_dirty_log(),
    "dirty_bitmap": lambda vm: vm.dirty_bitmap(vm.memory.regions[0]),
    "dirty_pages": lambda vm: vm.dirty_pages(vm.memory.regions[0]),
    "clear_dirty_bitmap": lambda vm: vm.clear_dirty_bitmap(vm.memory.regions[0], bytes(8)),
    "reset_dirty_rings": lambda vm: vm.reset_dirty_rings(),
    "create_vcpu": lambda vm: vm.create_vcpu(),
    "set_boot_vcpu_id": lambda vm: vm.set_boot_vcpu_id(0),
    "check_extension": lambda vm: vm.check_extension(Cap.USER_MEMORY),
    "enable_cap": lambda vm: vm.enable_cap(Cap.X86_USER_SPACE_MSR, 0),
    "get_clock": lambda vm: vm.get_clock(),
    "set_clock": lambda vm: vm.set_clock(0),
    "get_tsc_khz": lambda vm: vm.get_tsc_khz(),
    "set_tsc_khz": lambda vm: vm.set_tsc_khz(1_000_000),
    "exit_on_msrs": lambda vm: vm.exit_on_msrs(0),
    "set_msr_filter": lambda vm: vm.set_msr_filter([MsrFilterRange(0)]),
    "create_device": lambda vm: vm.create_device(4),
    "statistics": lambda vm: vm.statistics(),
    "create_pit": lambda vm: vm.create_pit(),
    "set_tss_address": lambda vm: vm.set_tss_address(0xFFFB_D000),
    "get_irqchip": lambda vm: vm.get_irqchip(0),
    "get_pit": lambda vm: vm.get_pit(),
    "set_irq_line": lambda vm: vm.set_irq_line(1, 1),
    "set_irq_line_status": lambda vm: vm.set_irq_line_status(1, 1),
    "signal_msi": lambda vm: vm.signal_msi(0xFEE0_0000, 0x40),
    "set_gsi_routing": lambda vm: vm.set_gsi_routing([]),
    "add_ioeventfd": lambda vm: vm.add_ioeventfd(0, MMIO, 4),
    "remove_ioeventfd": lambda vm: vm.remove_ioeventfd(0, MMIO, 4),
    "add_irqfd": lambda vm: vm.add_irqfd(0, 1),
    "remove_irqfd": lambda vm: vm.remove_irqfd(0, 1),
    "coalesce_writes": lambda vm: vm.coalesce_writes(MMIO, 4),
    "stop_coalescing_writes": lambda vm: vm.stop_coalescing_writes(MMIO, 4),
    "ioctl": lambda vm: vm.ioctl("KVM_GET_NR_MMU_PAGES"),
}

VCPU_USES: dict[str, Callable[[Vcpu], object]] = {
    "fileno": lambda vcpu: vcpu.fileno(),
    "with": lambda vcpu: vcpu.__enter__(),
    "vm": lambda vcpu: vcpu.vm,
    "regs": lambda vcpu: vcpu.regs,
    "sregs": lambda vcpu: vcpu.sregs,
    "cpu_state": lambda vcpu: vcpu.cpu_state(),
    "set_real_mode": lambda vcpu: vcpu.set_real_mode(entry=0),
    "set_protected_mode": lambda vcpu: vcpu.set_protected_mode(entry=0),
    "set_long_mode": lambda vcpu: vcpu.set_long_mode(entry=0, cr3=0),
    "run": lambda vcpu: vcpu.run(),
    "exits": lambda vcpu: next(vcpu.exits()),
    "kick": lambda vcpu: vcpu.kick(),
    "settle": lambda vcpu: vcpu.settle(),
    "claim": lambda vcpu: vcpu.claim(),
    "page": lambda vcpu: vcpu.page.immediate_exit,
    "capture": lambda vcpu: FullState.capture(vcpu),
    "get_fpu": lambda vcpu: vcpu.get_fpu(),
    "get_xsave": lambda vcpu: vcpu.get_xsave(),
    "set_xsave": lambda vcpu: vcpu.set_xsave(bytes(4096)),
    "get_xcrs": lambda vcpu: vcpu.get_xcrs(),
    "get_debug_registers": lambda vcpu: vcpu.get_debug_registers(),
    "get_msrs": lambda vcpu: vcpu.get_msrs([0x10]),
    "set_msr": lambda vcpu: vcpu.set_msr(0x10, 0),
    "get_events": lambda vcpu: vcpu.get_events(),
    "inject_exception": lambda vcpu: vcpu.inject_exception(6),
    "get_cpuid": lambda vcpu: vcpu.get_cpuid(),
    "get_lapic": lambda vcpu: vcpu.get_lapic(),
    "get_mp_state": lambda vcpu: vcpu.get_mp_state(),
    "set_mp_state": lambda vcpu: vcpu.set_mp_state(0),
    "interrupt": lambda vcpu: vcpu.interrupt(0x40),
    "nmi": lambda vcpu: vcpu.nmi(),
    "smi": lambda vcpu: vcpu.smi(),
    "single_step": lambda vcpu: vcpu.single_step(),
    "translate": lambda vcpu: vcpu.translate(0),
    "get_tsc_khz": lambda vcpu: vcpu.get_tsc_khz(),
    "kvmclock_paused": lambda vcpu: vcpu.kvmclock_paused(),
    "enable_cap": lambda vcpu: vcpu.enable_cap(Cap.HYPERV_SYNIC),
    "statistics": lambda vcpu: vcpu.statistics(),
    "get_sregs2": lambda vcpu: vcpu.get_sregs2(),
    "ioctl": lambda vcpu: vcpu.ioctl("KVM_RUN"),
    "coalesced ring": lambda vcpu: CoalescedRing(vcpu),
    "dirty ring": lambda vcpu: DirtyRing(vcpu),
}


def unrefused(uses: dict[str, Callable[[T], object]], closed: T) -> list[str]:
    """The uses that a closed descriptor does not answer with ClosedError."""
    missed = []
    for name, use in uses.items():
        try:
            use(closed)
        except ClosedError as error:
            if "after it was closed" not in str(error):
                missed.append(f"{name}: {error}")
        else:
            missed.append(name)
    return missed


def test_every_use_of_a_closed_kvm_is_refused() -> None:
    kvm = Kvm()
    kvm.close()
    assert unrefused(KVM_USES, kvm) == []


def test_every_use_of_a_closed_vm_is_refused() -> None:
    with empty_vm() as vm:
        pass
    assert unrefused(VM_USES, vm) == []


@pytest.mark.parametrize("sync_regs", [True, False])
def test_every_use_of_a_closed_vcpu_is_refused(sync_regs: bool) -> None:
    with guest("in al, 0x10; hlt", sync_regs=sync_regs) as vcpu:
        regs, sregs, page = vcpu.regs, vcpu.sregs, vcpu.page
        assert isinstance(next_exit(vcpu), IoIn)
    assert unrefused(VCPU_USES, vcpu) == []
    looks: list[Callable[[], object]] = [
        lambda: regs.rax,
        lambda: setattr(regs, "rax", 1),
        lambda: sregs.cs,
        lambda: regs.copy(),
        lambda: str(sregs),
    ]
    for look in looks:
        with pytest.raises(ClosedError):
            look()
    with pytest.raises(ValueError, match="released"):
        page.u8[0]


def test_closing_twice_is_nothing_and_closed_says_so() -> None:
    with guest("hlt") as vcpu:
        vm, kvm = vcpu.vm, vcpu.vm.kvm
        for descriptor in (vcpu, vm, kvm):
            assert not descriptor.closed
            descriptor.close()
            assert descriptor.closed
            assert "closed" in repr(descriptor)
            descriptor.close()


def test_closing_a_vm_closes_its_vcpus() -> None:
    with empty_vm() as vm:
        vcpus = [vm.create_vcpu() for _ in range(3)]
        vcpus[1].close()
        vm.close()
        assert all(vcpu.closed for vcpu in vcpus)
        assert vm.vcpus == tuple(vcpus)


def test_a_vm_lives_on_without_its_kvm() -> None:
    kvm = Kvm()
    vm = kvm.create_vm()
    kvm.close()
    vm.add_ram(0, size=RAM)
    assert next_exit(start(vm, "hlt")) == Hlt()
    vm.close()


def test_the_number_of_a_closed_descriptor_may_belong_to_another_file() -> None:
    with guest("hlt") as vcpu:
        number = vcpu.fileno()
        vcpu.close()
        with empty_vm() as vm:
            other = start(vm, "hlt")
            assert number in (vm.kvm.fileno(), vm.fileno(), other.fileno())
            # The prebuilt call of the run loop must not reach what has the number now.
            assert vcpu.enter(*vcpu.entry) < 0
            assert other.regs.rip == 0x1000


def forget_kvm(vm: Vm) -> None:
    Kvm()


def forget_vm(vm: Vm) -> None:
    vm.kvm.create_vm()


def forget_vcpu(vm: Vm) -> None:
    other = vm.kvm.create_vm()
    other.add_ram(0, size=RAM)
    next_exit(start(other, "hlt"))


def forget_statistics(vm: Vm) -> None:
    vm.statistics()


@pytest.mark.parametrize("forget", [forget_kvm, forget_vm, forget_vcpu, forget_statistics])
def test_a_forgotten_descriptor_is_closed_with_a_warning(forget: Callable[[Vm], None]) -> None:
    def forget_and_collect() -> None:
        forget(vm)
        gc.collect()

    with empty_vm() as vm:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.warns(ResourceWarning, match="was never closed"):
            forget_and_collect()
        assert len(os.listdir("/proc/self/fd")) == before


def test_closed_descriptors_are_forgotten_without_a_warning_and_without_the_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd")), resident()
        for _ in range(20):
            with guest("in al, 0x10; hlt") as vcpu:
                vcpu.vm.memory.fill(DATA, RAM - DATA, 1)
                assert isinstance(next_exit(vcpu), IoIn)
                del vcpu
        assert len(os.listdir("/proc/self/fd")) == before[0]
        assert resident() - before[1] < 10 * RAM
    finally:
        gc.enable()


def test_exits_that_somebody_keeps_keep_no_file_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept = []
    for _ in range(10):
        with guest(f"in al, 0x10; mov eax, [{MMIO}]; hlt", 32) as vcpu:
            kept += [next_exit(vcpu), vcpu.regs, vcpu.sregs, vcpu.page, next_exit(vcpu), vcpu]
    assert isinstance(kept[4], MmioRead)
    assert len(os.listdir("/proc/self/fd")) == before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 0x1000


def cycle(kvm: Kvm, number: int) -> None:
    with kvm.create_vm() as vm:
        vm.add_ram(0, size=0x10_0000)
        vm.memory.write(DATA, bytes([0xE4, 0x10, 0xE6, 0x11, 0xF4]))  # in al, 0x10; out 0x11, al; hlt
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(entry=DATA)
        event = next_exit(vcpu)
        assert isinstance(event, IoIn)
        event.reply(number & 0xFF)
        assert next_exit(vcpu) == IoOut(0x11, bytes([number & 0xFF]))


def check_cycles(count: int) -> None:
    with Kvm() as kvm:
        for number in range(50):
            cycle(kvm, number)
        gc.collect()
        fds, memory = len(os.listdir("/proc/self/fd")), resident()
        for number in range(count):
            cycle(kvm, number)
        assert len(os.listdir("/proc/self/fd")) == fds
        assert resident() - memory < 0x20_0000
        timers = Path("/proc/self/timers").read_text() if os.path.exists("/proc/self/timers") else ""
        assert timers.count("ID:") < 20


def test_five_hundred_vms_leave_nothing() -> None:
    check_cycles(500)


@pytest.mark.slow
def test_ten_thousand_vms_leave_nothing() -> None:
    check_cycles(10_000)


def test_a_failed_creation_leaks_nothing() -> None:
    with Kvm() as kvm:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            with pytest.raises(OSError, match="KVM_CREATE_VM"):
                kvm.create_vm(99)
            with pytest.raises(OSError, match="KVM"):
                Kvm("/dev/null")
        assert len(os.listdir("/proc/self/fd")) == before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_kvm_whose_vms_come_and_go_keeps_one_idle_vm_and_closes_it() -> None:
    before = open_files()
    with Kvm() as kvm:
        with kvm.create_vm() as first, kvm.create_vm():
            first.create_vcpu()
            assert open_files() == before + 5  # a vCPU has two, one for the mapping
        assert open_files() == before + 1
        for _ in range(3):
            cycle(kvm, 1)
            assert open_files() == before + 3  # a VM and its vCPU
        last = kvm.create_vm()
    assert open_files() == before + 1
    last.add_ram(0, size=RAM)
    assert next_exit(start(last, "hlt")) == Hlt()
    last.close()
    assert open_files() == before


def test_a_forgotten_kvm_takes_its_idle_vm_along() -> None:
    def forget() -> None:
        kvm = Kvm()
        cycle(kvm, 1)
        cycle(kvm, 2)
        assert open_files() == before + 3

    before = open_files()
    with pytest.warns(ResourceWarning, match="was never closed"):
        forget()
    assert open_files() == before


@pytest.mark.parametrize("room", [1, 2])
def test_vms_come_and_go_where_there_is_no_room_for_an_idle_one(room: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Kvm() as kvm:
        cycle(kvm, 1)
        before = open_files()
        taken = [os.dup(0)]
        while taken[-1] != len(taken) + before - 2:  # until no number below is free
            taken.append(os.dup(0))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1 + room, hard))
            vm = kvm.create_vm()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
        vm.close()
        cycle(kvm, 2)
        assert open_files() == before


KILLED = """
import os, sys, threading
sys.path.insert(0, {tests!r})
from bare_guest import empty_vm, start
with empty_vm() as vm:
    vm.create_irqchip()
    vm.create_pit()
    vcpu = start(vm, "1: jmp 1b")
    threading.Timer(0.1, lambda: print("running", flush=True)).start()
    vcpu.run()
"""


def threads_of_kvm() -> set[str]:
    """Kernel threads that serve VMs (kvm-pit/PID, kvm-nx-lpage-recovery-PID)."""
    names = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            name = path.read_text().strip()
        except OSError:
            continue
        if name.startswith("kvm-"):
            names.add(f"{path.parent.name} {name}")
    return names


def test_a_killed_process_leaves_nothing_behind() -> None:
    before = threads_of_kvm()
    tests = os.path.dirname(os.path.dirname(__file__))
    with subprocess.Popen(
        [sys.executable, "-c", KILLED.format(tests=tests)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert not os.path.exists(f"/proc/{process.pid}")
    for _ in range(100):
        left = {name for name in threads_of_kvm() - before if name.endswith(str(process.pid))}
        if not left:
            break
        time.sleep(0.05)
    assert not left
    with guest("hlt") as vcpu:
        assert next_exit(vcpu) == Hlt()
