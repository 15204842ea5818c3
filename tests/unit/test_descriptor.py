"""What all descriptors share, without KVM: ownership, errors, arguments; and the small pieces around them."""

from __future__ import annotations

import errno
import gc
import os
import warnings

import pytest

from kvmpy.abi.capabilities import Cap
from kvmpy.abi.structs import kvm_guest_debug, kvm_irqfd, kvm_regs
from kvmpy.errors import CapabilityError, ClosedError, KvmError, KvmpyError, RegisterValueError, UsageError
from kvmpy.kvm.advice import advice_for, advice_for_open
from kvmpy.kvm.checked_struct import filled, fits
from kvmpy.kvm.descriptor import Descriptor
from kvmpy.kvm.processor_limits import limits_of
from kvmpy.x86.cpuid import CpuidEntry, CpuidTable
from kvmpy.x86.flags import Cr4, Efer


class NullVm(Descriptor):
    """A descriptor of /dev/null that believes that it is a VM."""

    kind = "vm"

    def __init__(self, capabilities: frozenset[int] = frozenset()) -> None:
        super().__init__(os.open("/dev/null", os.O_RDWR))
        self.capabilities = capabilities

    def _has_capability(self, capability: int) -> int:
        return capability in self.capabilities


def test_a_descriptor_owns_its_file_and_closes_it_once() -> None:
    descriptor = NullVm()
    number = descriptor.fileno()
    os.fstat(number)
    with descriptor as same:
        assert same is descriptor
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    other = os.open("/dev/null", os.O_RDONLY)  # gets the same number
    descriptor.close()
    os.fstat(other)
    os.close(other)


def test_use_after_close_is_refused() -> None:
    descriptor = NullVm()
    descriptor.close()
    assert descriptor.closed
    for use in (descriptor.fileno, descriptor.__enter__, lambda: descriptor.ioctl("KVM_CREATE_IRQCHIP")):
        with pytest.raises(ClosedError, match="NullVm closed"):
            use()


def test_a_forgotten_descriptor_warns_and_closes() -> None:
    number = -1

    def forget() -> None:
        nonlocal number
        number = NullVm().fileno()
        gc.collect()

    with pytest.warns(ResourceWarning, match=r"<NullVm fd \d+> was never closed"):
        forget()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_closed_one_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NullVm().close()
        gc.collect()


def test_one_whose_creation_failed_does_not_warn() -> None:
    class Failing(Descriptor):
        def __init__(self) -> None:
            raise OSError("no")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="no"):
            Failing()
        gc.collect()


def test_a_failed_ioctl_says_its_name_errno_and_advice() -> None:
    with NullVm(frozenset(Cap)) as descriptor, pytest.raises(KvmError) as refused:
        descriptor.ioctl("KVM_CREATE_IRQCHIP")
    error = refused.value
    assert isinstance(error, OSError)
    assert isinstance(error, KvmpyError)
    assert not isinstance(error, CapabilityError)
    assert (error.ioctl, error.errno) == ("KVM_CREATE_IRQCHIP", errno.ENOTTY)
    assert "ENOTTY" in str(error)
    assert "does not have this ioctl" in error.advice


def test_a_missing_capability_is_named() -> None:
    with NullVm() as descriptor, pytest.raises(CapabilityError, match="KVM_CAP_IRQCHIP"):
        descriptor.ioctl("KVM_CREATE_IRQCHIP")


def test_arguments_are_checked_before_the_kernel_sees_them() -> None:
    with NullVm() as descriptor:
        for name, argument, message in (
            ("KVM_NONSENSE", None, "there is no ioctl"),
            ("KVM_RUN", None, "vcpu descriptor"),
            ("KVM_CREATE_IRQCHIP", 1, "takes no argument"),
            ("KVM_CREATE_VCPU", None, "takes an int"),
            ("KVM_CREATE_VCPU", kvm_regs(), "takes an int"),
            ("KVM_CREATE_VCPU", 1 << 64, "takes an int"),
            ("KVM_IRQFD", 0, "takes a kvm_irqfd"),
            ("KVM_IRQFD", kvm_irqfd, "takes a kvm_irqfd"),
            ("KVM_IRQFD", kvm_regs(), "takes a kvm_irqfd"),
        ):
            with pytest.raises(UsageError, match=message):
                descriptor.ioctl(name, argument)


def test_a_structure_is_filled_or_refused() -> None:
    assert filled(kvm_irqfd, fd=3, gsi=5).gsi == 5
    with pytest.raises(RegisterValueError, match=r"kvm_irqfd\.gsi is 32 bits wide"):
        filled(kvm_irqfd, gsi=1 << 32)
    with pytest.raises(RegisterValueError, match="-0x1"):
        filled(kvm_guest_debug, control=-1)
    with pytest.raises(UsageError, match=r"kvm_irqfd\.fd"):
        filled(kvm_irqfd, fd="5")  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "bits"), [(0, 1), (255, 8), ((1 << 64) - 1, 64)])
def test_numbers_that_fit_pass(value: int, bits: int) -> None:
    assert fits("it", value, bits) == value
    with pytest.raises(RegisterValueError, match="it is"):
        fits("it", 1 << bits, bits)


def test_advice_where_the_cause_is_known_and_nothing_else() -> None:
    assert "add_ram" in advice_for("KVM_RUN", errno.ENOSPC)
    assert advice_for("KVM_NONSENSE", errno.EPERM) == ""
    assert "usermod" in advice_for_open("/dev/kvm", errno.EACCES)
    assert "another hypervisor" in advice_for_open("/dev/kvm", errno.EBUSY)
    assert "doctor" in advice_for_open("/dev/kvm", errno.EINVAL)
    assert "docker" in advice_for_open("/dev/kvm", errno.ENOENT)


# What CPUID allows


def test_without_cpuid_only_the_oldest_bits_are_allowed() -> None:
    limits = limits_of(CpuidTable())
    assert limits.physical_address_bits == 36
    assert not limits.cr4 & (Cr4.LA57 | Cr4.PCIDE | Cr4.SMEP | Cr4.OSXSAVE | Cr4.CET)
    assert limits.cr4 & Cr4.PAE
    assert limits.cr4 & Cr4.OSFXSR
    assert not limits.efer & (Efer.LME | Efer.NXE | Efer.SVME)
    assert (limits.x2apic, limits.long_mode, limits.lam) == (False, False, False)


@pytest.mark.parametrize(
    ("feature", "bit"),
    [("la57", Cr4.LA57), ("pcid", Cr4.PCIDE), ("smap", Cr4.SMAP), ("ibt", Cr4.CET), ("shstk", Cr4.CET)],
)
def test_a_feature_allows_its_bit(feature: str, bit: Cr4) -> None:
    table = CpuidTable()
    table.set(feature)
    assert limits_of(table).cr4 == limits_of(CpuidTable()).cr4 | bit


def test_the_width_of_physical_addresses_is_the_cpuids() -> None:
    assert limits_of(CpuidTable([CpuidEntry(0x8000_0008, eax=0x3028)])).physical_address_bits == 0x28
