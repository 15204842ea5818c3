"""/dev/kvm itself: opening it, what it offers, and the generic ioctl of every descriptor."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from bare_guest import empty_vm, guest, next_exit
from kvmpy import Kvm, Vcpu, Vm
from kvmpy.abi.capabilities import Cap
from kvmpy.abi.ioctls import IOCTLS
from kvmpy.abi.structs import kvm_cpuid2, kvm_msrs, kvm_regs, kvm_signal_mask, kvm_sregs, sized
from kvmpy.errors import KvmError, KvmUnavailableError, UsageError
from kvmpy.kvm import cpuid

# Opening


def test_a_missing_device_says_what_to_do() -> None:
    with pytest.raises(KvmUnavailableError, match="/nonexistent") as refused:
        Kvm("/nonexistent")
    assert refused.value.ioctl == "open(/nonexistent)"
    assert refused.value.advice


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_a_file_that_is_not_kvm_is_refused(path: str) -> None:
    with pytest.raises(KvmUnavailableError, match="is not KVM's device"):
        Kvm(path)


def test_a_folder_is_refused() -> None:
    with pytest.raises(KvmUnavailableError):
        Kvm("/dev")


def test_an_ordinary_file_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("device") / "kvm"
    path.write_bytes(b"")
    with pytest.raises(KvmUnavailableError):
        Kvm(str(path))


def test_a_device_without_permission_says_which_group_and_rule(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Root drops its rights, after loading what nobody else may be allowed to read.
    code = """
import os, sys, kvmpy.kvm.advice
from kvmpy import Kvm
from kvmpy.errors import KvmUnavailableError
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    Kvm(sys.argv[1])
except KvmUnavailableError as error:
    print(error.errno, "usermod -aG kvm" in error.advice, 'KERNEL=="kvm"' in str(error))
"""
    path = tmp_path_factory.mktemp("device") / "kvm"
    path.write_bytes(b"")
    path.chmod(0)
    path.parent.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout == "13 True True\n", done.stderr


# What the host offers


def test_limits_are_numbers_that_make_sense() -> None:
    with Kvm() as kvm:
        assert 1 <= kvm.max_vcpus <= kvm.max_vcpu_id
        assert kvm.vcpu_mmap_size >= 0x2000
        assert kvm.check_extension(Cap.USER_MEMORY) == kvm.check_extension(3) == 1
        assert kvm.check_extension(0xFFFF_FFFF) == 0


def test_a_type_of_vm_that_does_not_exist_is_refused_with_advice() -> None:
    with Kvm() as kvm, pytest.raises(KvmError, match="0 always works"):
        kvm.create_vm(0x7FFF)


def test_supported_cpuid_is_of_a_processor_with_long_mode() -> None:
    with Kvm() as kvm:
        table = kvm.supported_cpuid()
        assert table.has("lm")
        assert table.find(0) is not None
        assert len(table) > 5


@pytest.mark.parametrize("first", [1, 2, 7])
def test_cpuid_tables_of_any_length_are_read(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    with Kvm() as kvm:
        expected = kvm.supported_cpuid()
        emulated = kvm.emulated_cpuid()
        monkeypatch.setattr(cpuid, "_FIRST_TRY", first)
        assert kvm.supported_cpuid() == expected
        assert kvm.emulated_cpuid() == emulated
    with guest("hlt") as vcpu:
        vcpu.set_cpuid(expected)
        assert len(vcpu.get_cpuid()) == len(expected)


def test_msr_lists_and_feature_msrs() -> None:
    with Kvm() as kvm:
        indices = kvm.msr_indices()
        assert {0x10, 0xC000_0080 + 2} <= set(indices)
        assert len(set(indices)) == len(indices)
        for index in kvm.feature_msr_indices():
            assert 0 <= kvm.feature_msr(index) < 1 << 64
        with pytest.raises(KvmError, match="feature_msr_indices"):
            kvm.feature_msr(0x7777_7777)


# The generic ioctl


def test_an_ioctl_fills_its_structure_in_place() -> None:
    with guest("hlt") as vcpu:
        regs = kvm_regs()
        assert vcpu.ioctl("KVM_GET_REGS", regs) == 0
        assert regs.rip == 0x1000


def test_an_ioctl_answers_what_the_kernel_returned() -> None:
    with Kvm() as kvm:
        assert kvm.ioctl("KVM_GET_API_VERSION") == 12
        assert kvm.ioctl("KVM_CHECK_EXTENSION", Cap.USER_MEMORY) == 1


def test_an_unknown_name_is_refused() -> None:
    with Kvm() as kvm, pytest.raises(UsageError, match="no ioctl 'KVM_NONSENSE'"):
        kvm.ioctl("KVM_NONSENSE")


def test_an_ioctl_of_another_descriptor_is_refused() -> None:
    with guest("hlt") as vcpu:
        for descriptor, name in (
            (vcpu, "KVM_CREATE_VM"),
            (vcpu.vm, "KVM_RUN"),
            (vcpu.vm.kvm, "KVM_GET_REGS"),
            (vcpu, "KVM_IRQ_LINE"),
        ):
            with pytest.raises(UsageError, match=f"{name} is an ioctl of a"):
                descriptor.ioctl(name)


@pytest.mark.parametrize("argument", [None, 5, b"x" * 144, kvm_sregs(), kvm_regs])
def test_an_argument_of_another_type_is_refused(argument: object) -> None:
    with guest("hlt") as vcpu, pytest.raises(UsageError, match="KVM_GET_REGS takes a kvm_regs"):
        vcpu.ioctl("KVM_GET_REGS", argument)


def test_an_argument_where_there_is_none_is_refused() -> None:
    with guest("hlt") as vcpu, pytest.raises(UsageError, match="takes no argument"):
        vcpu.ioctl("KVM_NMI", 0)


@pytest.mark.parametrize("argument", [None, "1", 1.0, -1, 1 << 64])
def test_an_int_is_an_int_of_64_bits(argument: object) -> None:
    with Kvm() as kvm, pytest.raises(UsageError, match="takes an int"):
        kvm.ioctl("KVM_CHECK_EXTENSION", argument)


def test_a_u64_goes_by_pointer() -> None:
    with empty_vm() as vm:
        assert vm.ioctl("KVM_SET_IDENTITY_MAP_ADDR", ctypes.c_uint64(0xFFFB_C000)) == 0
        with pytest.raises(UsageError):
            vm.ioctl("KVM_SET_IDENTITY_MAP_ADDR", 0xFFFB_C000)


def test_a_structure_that_promises_more_than_it_has_is_refused() -> None:
    with guest("hlt") as vcpu:
        for name, argument in (
            ("KVM_GET_CPUID2", kvm_cpuid2(nent=100)),
            ("KVM_GET_CPUID2", sized(kvm_cpuid2, 3)(nent=4)),
            ("KVM_GET_MSRS", kvm_msrs(nmsrs=1)),
            ("KVM_SET_SIGNAL_MASK", kvm_signal_mask(len=8)),
        ):
            with pytest.raises(UsageError, match="room for"):
                vcpu.ioctl(name, argument)
        with pytest.raises(UsageError, match="room for 0 entries"):
            vcpu.vm.kvm.ioctl("KVM_GET_SUPPORTED_CPUID", kvm_cpuid2(nent=1))


def test_a_signal_mask_can_be_set_by_hand() -> None:
    with guest("hlt") as vcpu:
        mask = sized(kvm_signal_mask, 8)(len=8)
        vcpu.ioctl("KVM_SET_SIGNAL_MASK", mask)
        with pytest.raises(KvmError):
            vcpu.ioctl("KVM_SET_SIGNAL_MASK", sized(kvm_signal_mask, 4)(len=4))


# A descriptor that is no longer what it was: every ioctl of the table gives a typed error, and none crashes.


def every_argument(name: str) -> object:
    entry = IOCTLS[name]
    if entry.argument is None:
        return None
    if entry.argument == "int":
        return 0
    kind = entry.argument_type
    assert kind is not None
    return kind()


@pytest.mark.parametrize("kind", ["system", "vm", "vcpu"])
def test_every_ioctl_on_a_descriptor_of_something_else_is_a_typed_error(kind: str) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    try:
        with guest("hlt") as vcpu:
            next_exit(vcpu)  # no register waits to be written
            descriptor: Kvm | Vm | Vcpu = {"system": vcpu.vm.kvm, "vm": vcpu.vm, "vcpu": vcpu}[kind]  # type: ignore[assignment]
            mine = os.dup(descriptor.fileno())
            os.dup2(null, descriptor.fileno(), inheritable=False)
            try:
                for name, entry in IOCTLS.items():
                    if kind in entry.descriptors:
                        with pytest.raises(KvmError) as refused:
                            descriptor.ioctl(name, every_argument(name))
                        assert refused.value.ioctl == name
                        assert refused.value.errno == 25  # ENOTTY
            finally:
                os.dup2(mine, descriptor.fileno(), inheritable=False)
                os.close(mine)
    finally:
        os.close(null)
