"""What somebody new to Kvm, Vm and Vcpu gets wrong: the message says what to write instead."""

from collections.abc import Iterator
from typing import Any

import pytest

from kvmpy import Kvm, MiB, UsageError


@pytest.fixture
def vm() -> Iterator[Any]:
    """Untyped, so that the mistakes below are not found by a type checker first."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        yield vm


@pytest.mark.parametrize(
    ("part", "whole"),
    [
        ("al", "rax"), ("bh", "rbx"), ("cx", "rcx"), ("edx", "rdx"), ("dl", "rdx"), ("sil", "rsi"), ("di", "rdi"),
        ("esp", "rsp"), ("bpl", "rbp"), ("r8d", "r8"), ("r10w", "r10"), ("r15b", "r15"), ("eip", "rip"), ("ip", "rip"),
        ("eflags", "rflags"), ("flags", "rflags"),
    ],
)  # fmt: skip
def test_a_part_of_a_register_is_answered_with_the_whole(vm: Any, part: str, whole: str) -> None:
    regs = vm.create_vcpu().regs
    with pytest.raises(AttributeError, match=f"'{part}': it is a part of {whole},"):
        getattr(regs, part)
    with pytest.raises(AttributeError, match=f"'{part}': it is a part of {whole},"):
        setattr(regs, part, 1)


def test_a_register_of_the_other_set_is_answered_with_its_place(vm: Any) -> None:
    vcpu = vm.create_vcpu()
    with pytest.raises(AttributeError, match=r"'cr3' here: it is one of vcpu\.sregs"):
        _ = vcpu.regs.cr3
    with pytest.raises(AttributeError, match=r"'rip' here: it is one of vcpu\.regs"):
        vcpu.sregs.rip = 0x1000
    with pytest.raises(AttributeError, match="no register 'rxa'; there are rax, rbx"):
        vcpu.regs.rxa = 1
    assert not hasattr(vcpu.sregs, "cr9")


@pytest.mark.parametrize("capability", ["IRQCHIP", None, 1.5])
def test_a_capability_is_a_member_of_cap_or_a_number(vm: Any, capability: Any) -> None:
    for call in (vm.kvm.check_extension, vm.check_extension, vm.enable_cap, vm.create_vcpu().enable_cap):
        with pytest.raises(UsageError, match=r"such as Cap\.IRQCHIP"):
            call(capability)


@pytest.mark.parametrize(("address", "size"), [("0x1000", 0x1000), (0x1000, 0.5 * MiB), (None, 0x1000), (0, None)])
def test_memory_has_a_number_as_address_and_size(vm: Any, address: Any, size: Any) -> None:
    with pytest.raises(UsageError, match="address and size are ints"):
        vm.add_ram(address, size=size)
    assert vm.memory.regions == ()
