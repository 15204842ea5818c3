"""Memory slots under running guests: RAM, ROM, files, memfds; added, moved, removed."""

from __future__ import annotations

import os
import tempfile

import pytest

from bare_guest import CODE, DATA, MMIO, RAM, bytes_out, empty_vm, enter, guest, next_exit, run_to_hlt, start
from kvmpy import Kvm, MemoryRegion, Vm
from kvmpy.abi.capabilities import Cap
from kvmpy.abi.flags import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
)
from kvmpy.abi.structs import kvm_memory_attributes
from kvmpy.errors import CapabilityError, ClosedError, GuestMemoryError, KvmError, OverlapError, UsageError
from kvmpy.exits import Hlt, MmioRead, MmioWrite

PAGE = 0x1000
FAR = 0x100_0000


def test_the_guest_reads_what_python_wrote_and_the_other_way_round() -> None:
    with guest(f"mov eax, [{DATA}]; not eax; mov [{DATA + 4}], eax; hlt", 32) as vcpu:
        vcpu.vm.memory.write_u32(DATA, 0x1234_5678)
        next_exit(vcpu)
        assert vcpu.vm.memory.read_u32(DATA + 4) == 0xEDCB_A987


def test_several_regions_with_a_hole() -> None:
    with guest(f"inc dword ptr [{FAR}]; inc dword ptr [{FAR + 0x20_0000}]; inc dword ptr [{MMIO}]; hlt", 32) as vcpu:
        vcpu.vm.add_ram(FAR, size=PAGE)
        vcpu.vm.add_ram(FAR + 0x20_0000, size=PAGE)
        event = next_exit(vcpu)
        assert isinstance(event, MmioRead)
        assert event.address == MMIO
        assert vcpu.vm.memory.read_u32(FAR) == vcpu.vm.memory.read_u32(FAR + 0x20_0000) == 1
        with pytest.raises(GuestMemoryError):
            vcpu.vm.memory.read_u32(MMIO)


def test_rom_can_be_run_and_read_but_not_written() -> None:
    from gnu_toolchain import assemble

    source = f"mov al, [{FAR}]; mov byte ptr [{FAR + 5}], 0x77; mov bl, [{FAR + 5}]; hlt"
    with guest("nop", 32) as vcpu:
        image = assemble(source, address=FAR, bits=32)
        vcpu.vm.add_rom(FAR, image)
        vcpu.set_protected_mode(entry=FAR)
        assert run_to_hlt(vcpu) == [MmioWrite(FAR + 5, b"\x77")]
        assert vcpu.vm.memory.read(FAR, len(image)) == image
        assert (vcpu.regs.rax & 0xFF, vcpu.regs.rbx & 0xFF) == (image[0], image[5])


def test_rom_may_have_any_length() -> None:
    with empty_vm() as vm:
        region = vm.add_rom(FAR, b"x" * 4097)
        assert (region.size, region.read_only) == (2 * PAGE, True)
        assert vm.memory.read(FAR + 4096, 3) == b"x\0\0"


def test_a_shared_file_is_written_through() -> None:
    with tempfile.TemporaryFile() as file, guest(f"inc dword ptr [{FAR + PAGE}]; hlt", 32) as vcpu:
        file.write(bytes(PAGE) + b"\x41\0\0\0".ljust(PAGE, b"."))
        file.flush()
        vcpu.vm.add_memory(MemoryRegion.from_file(FAR, file.fileno(), 2 * PAGE))
        next_exit(vcpu)
        assert os.pread(file.fileno(), 5, PAGE) == b"\x42\0\0\0."


def test_a_private_file_is_not() -> None:
    with tempfile.TemporaryFile() as file, guest(f"inc dword ptr [{FAR}]; hlt", 32) as vcpu:
        file.write(b"\x41".ljust(2 * PAGE, b"\0"))
        file.flush()
        vcpu.vm.add_memory(MemoryRegion.from_file(FAR, file.fileno(), PAGE, shared=False))
        next_exit(vcpu)
        assert vcpu.vm.memory.read_u8(FAR) == 0x42
        assert os.pread(file.fileno(), 1, 0) == b"\x41"


def test_a_file_opened_for_reading_only_is_read_only_memory() -> None:
    with tempfile.NamedTemporaryFile() as file, guest(f"mov al, [{FAR}]; mov [{FAR}], al; hlt", 32) as vcpu:
        file.write(b"Z" * PAGE)
        file.flush()
        fd = os.open(file.name, os.O_RDONLY)
        try:
            vcpu.vm.add_memory(MemoryRegion.from_file(FAR, fd, PAGE, read_only=True))
        finally:
            os.close(fd)
        assert run_to_hlt(vcpu) == [MmioWrite(FAR, b"Z")]
        with pytest.raises(GuestMemoryError, match="only be read"):
            vcpu.vm.memory.write(FAR, b"a")


def test_two_vms_share_a_memfd() -> None:
    memfd = os.memfd_create("shared")
    try:
        os.ftruncate(memfd, PAGE)
        with guest(f"mov dword ptr [{FAR}], 0xABCD; hlt", 32) as writer, guest(f"mov eax, [{FAR}]; hlt", 32) as reader:
            for vcpu in (writer, reader):
                vcpu.vm.add_memory(MemoryRegion.from_file(FAR, memfd, PAGE))
                next_exit(vcpu)
            assert reader.regs.rax == 0xABCD
    finally:
        os.close(memfd)


def test_shared_memory_makes_its_own_memfd() -> None:
    with guest(f"mov byte ptr [{FAR + 7}], 9; hlt", 32) as vcpu:
        region = vcpu.vm.add_memory(MemoryRegion.shared_memory(FAR, PAGE))
        next_exit(vcpu)
        assert region.buffer[7] == 9


def test_memory_comes_and_goes_at_run_time() -> None:
    with guest(f"1: mov eax, [{FAR}]; hlt; jmp 1b", 32) as vcpu:
        vm = vcpu.vm
        assert next_exit(vcpu) == MmioRead(FAR, 4)
        assert next_exit(vcpu) == Hlt()
        region = vm.add_ram(FAR, size=PAGE)
        vm.memory.write_u32(FAR, 0x11)
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rax == 0x11
        vm.remove_memory(region)
        assert region not in vm.memory.regions
        assert next_exit(vcpu) == MmioRead(FAR, 4)
        assert next_exit(vcpu) == Hlt()
        vm.add_memory(region)  # the same memory, with what was in it
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rax == 0x11


def test_memory_moves_at_run_time() -> None:
    with guest(f"1: mov eax, [{FAR}]; mov ebx, [{FAR + 0x10_0000}]; hlt; jmp 1b", 32) as vcpu:
        region = vcpu.vm.add_ram(FAR, size=PAGE)
        vcpu.vm.memory.write_u32(FAR, 0x22)
        assert next_exit(vcpu) == MmioRead(FAR + 0x10_0000, 4)
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rax == 0x22
        vcpu.vm.move_memory(region, FAR + 0x10_0000)
        assert next_exit(vcpu) == MmioRead(FAR, 4)
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rbx == 0x22
        assert vcpu.vm.memory.read_u32(FAR + 0x10_0000) == 0x22
        with pytest.raises(GuestMemoryError):
            vcpu.vm.memory.read_u32(FAR)


def test_moving_onto_other_memory_is_refused_and_changes_nothing() -> None:
    with empty_vm() as vm:
        region = vm.add_ram(FAR, size=2 * PAGE)
        with pytest.raises(OverlapError, match="RAM 0x0"):
            vm.move_memory(region, PAGE)
        with pytest.raises(UsageError):
            vm.move_memory(region, FAR + 1)
        assert region.address == FAR
        vm.memory.write_u8(FAR, 5)
        vm.move_memory(region, FAR + PAGE)  # onto a part of itself
        assert vm.memory.read_u8(FAR + PAGE) == 5


def test_slot_numbers_are_used_again() -> None:
    with empty_vm() as vm:
        for _ in range(100):
            first, second = vm.add_ram(FAR, size=PAGE), vm.add_ram(2 * FAR, size=PAGE)
            assert {vm.slot_number(first), vm.slot_number(second)} == {1, 2}
            vm.remove_memory(first)
            vm.remove_memory(second)


@pytest.mark.parametrize(
    ("address", "size", "message"),
    [
        (0, 0, "must be positive"),
        (0, -PAGE, "must be positive"),
        (0, PAGE + 1, "multiples of 0x1000"),
        (1, PAGE, "multiples of 0x1000"),
        (-PAGE, PAGE, "64-bit"),
        (1 << 64, PAGE, "64-bit"),
        ((1 << 64) - PAGE, 2 * PAGE, "64-bit"),
        ((1 << 64) - PAGE, PAGE, "64-bit"),
        (0, 1 << 63, "room"),
    ],
)
def test_memory_that_cannot_be_is_refused(address: int, size: int, message: str) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        with pytest.raises(UsageError, match=message):
            vm.add_ram(address, size=size)
        assert vm.memory.regions == ()


def test_more_memory_than_a_host_has_addresses_for_is_an_error_of_the_kernel() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        with pytest.raises(KvmError) as refused:
            vm.add_ram(0, size=1 << 56)
        assert refused.value.ioctl == "mmap"
        with pytest.raises(KvmError, match="address width"):
            vm.add_ram(1 << 62, size=PAGE)
        assert vm.memory.regions == ()


@pytest.mark.parametrize(
    ("address", "size"), [(0, PAGE), (RAM - PAGE, PAGE), (RAM - PAGE, 2 * PAGE), (0, 2 * RAM), (PAGE, PAGE)]
)
def test_overlapping_memory_is_refused_and_names_both(address: int, size: int) -> None:
    with empty_vm() as vm:
        with pytest.raises(OverlapError) as refused:
            vm.add_ram(address, size=size, name="second")
        assert refused.value.new.startswith("second")
        assert refused.value.existing == f"RAM 0x0..{RAM - 1:#x}"
        with pytest.raises(OverlapError):
            vm.add_rom(address, bytes(size))
        with pytest.raises(OverlapError):
            vm.add_memory(MemoryRegion.anonymous(address, size))
        assert len(vm.memory.regions) == 1


def test_adjacent_memory_is_no_overlap() -> None:
    with guest(f"mov eax, [{RAM - 2}]; hlt", 32) as vcpu:
        vcpu.vm.add_ram(RAM, size=PAGE)
        vcpu.vm.memory.write(RAM - 2, b"abcd")
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rax == int.from_bytes(b"abcd", "little")


def test_memory_of_another_vm_is_refused() -> None:
    with empty_vm() as first, empty_vm() as second:
        region = first.memory.regions[0]
        for call in (
            lambda: second.remove_memory(region),
            lambda: second.move_memory(region, FAR),
            lambda: second.set_dirty_logging(region),
            lambda: second.dirty_bitmap(region),
            lambda: second.slot_number(region),
        ):
            with pytest.raises(UsageError, match="is not memory of"):
                call()


def test_views_outlive_their_vm() -> None:
    with empty_vm() as vm:
        view = vm.memory.view(DATA, 4)
        memory = vm.memory
        vm.memory.write(DATA, b"stay")
    assert view.tobytes() == b"stay"
    assert memory.read(DATA, 4) == b"stay"
    del memory, vm
    view[0:1] = b"S"
    assert view.tobytes() == b"Stay"


def test_a_closed_vm_takes_no_memory() -> None:
    with empty_vm() as vm:
        region = vm.memory.regions[0]
    for call in (
        lambda: vm.add_ram(FAR, size=PAGE),
        lambda: vm.add_rom(FAR, b"x"),
        lambda: vm.remove_memory(region),
        lambda: vm.move_memory(region, FAR),
        lambda: vm.dirty_bitmap(region),
    ):
        with pytest.raises(ClosedError):
            call()
    assert vm.memory.regions == (region,)
    assert region.address == 0


def test_host_and_guest_agree_modulo_two_mib() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        region = vm.add_ram(0x4000_1000, size=0x40_0000, huge_pages=True)
        assert region.host_address % 0x20_0000 == 0x1000
        assert vm.memory.host_address(0x4000_1234) == region.host_address + 0x234


def test_untouched_memory_costs_nothing() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * PAGE

    with Kvm() as kvm, kvm.create_vm() as vm:
        before = resident()
        vm.add_ram(0, size=1 << 32)
        assert resident() - before < 0x40_0000


# guest_memfd and memory attributes, where the host has them


def guest_memfd_flags(vm: Vm) -> int:
    if not vm.check_extension(Cap.GUEST_MEMFD):
        pytest.skip("this host's KVM has no guest_memfd")
    return vm.check_extension(Cap.GUEST_MEMFD_FLAGS)


def test_a_region_may_have_a_guest_memfd() -> None:
    with empty_vm() as vm:
        guest_memfd_flags(vm)
        memfd = vm.create_guest_memfd(PAGE)
        try:
            region = vm.add_guest_memfd(MemoryRegion.anonymous(FAR, PAGE), memfd)
            with pytest.raises(OverlapError):
                vm.add_guest_memfd(MemoryRegion.anonymous(FAR, PAGE), memfd)
            vcpu = start(vm, f"inc dword ptr [{FAR}]; hlt", 32)
            assert next_exit(vcpu) == Hlt()
            assert vm.memory.read_u32(FAR) == 1  # not private: the ordinary memory counts
            vm.remove_memory(region)
        finally:
            os.close(memfd)


def test_a_guest_memfd_that_can_be_mapped_is_guest_memory() -> None:
    flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
    with empty_vm() as vm:
        if guest_memfd_flags(vm) & flags != flags:
            pytest.skip("this host's guest_memfd cannot be mapped")
        memfd = vm.create_guest_memfd(PAGE, flags)
        try:
            region = MemoryRegion.from_file(FAR, memfd, PAGE)
            vm.add_guest_memfd(region, memfd)
            vcpu = start(vm, f"mov dword ptr [{FAR}], 0x4D464447; hlt", 32)
            assert next_exit(vcpu) == Hlt()
            assert region.buffer[:4].tobytes() == b"GDFM"
        finally:
            os.close(memfd)


def test_a_bad_guest_memfd_is_refused() -> None:
    with empty_vm() as vm:
        guest_memfd_flags(vm)
        with pytest.raises(KvmError):
            vm.create_guest_memfd(PAGE + 1)
        with open("/dev/null", "rb") as file, pytest.raises(KvmError):
            vm.add_guest_memfd(MemoryRegion.anonymous(FAR, PAGE), file.fileno())
        assert len(vm.memory.regions) == 1


def test_memory_attributes_are_set_or_honestly_refused() -> None:
    with empty_vm() as vm:
        request = kvm_memory_attributes(address=0, size=PAGE, attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE)
        if vm.check_extension(Cap.MEMORY_ATTRIBUTES) & KVM_MEMORY_ATTRIBUTE_PRIVATE:
            vm.ioctl("KVM_SET_MEMORY_ATTRIBUTES", request)
        else:
            with pytest.raises(CapabilityError, match="MEMORY_ATTRIBUTES"):
                vm.ioctl("KVM_SET_MEMORY_ATTRIBUTES", request)


def test_code_that_python_changes_is_run() -> None:
    with guest("mov al, 1; out 0x10, al; hlt") as vcpu:
        for number in range(1, 5):
            enter(vcpu, f"mov al, {number}; out 0x10, al; hlt")
            assert bytes_out(vcpu) == bytes([number])
        assert vcpu.regs.rip == CODE + 5
