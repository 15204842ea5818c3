"""The ABI tables among themselves: numbers, sizes and names agree without any header at hand."""

import ast
import ctypes
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvmpy.abi
from abi_expected import CONSTANT_MODULES, constants, expected
from kvmpy.abi import exit_reasons, structs
from kvmpy.abi.capabilities import Cap
from kvmpy.abi.exit_reasons import EXIT_REASONS
from kvmpy.abi.ioctls import DEVICE, IOCTLS, KVM_GET_REGS, KVM_RUN, NONE, READ, SYSTEM, VCPU, VM, WRITE, Ioctl, encode
from kvmpy.abi.newer import NEWER_THAN_HEADERS
from kvmpy.abi.structs import sized, struct
from kvmpy.abi.withdrawn import WITHDRAWN_IOCTLS

ALL_IOCTLS = list((IOCTLS | WITHDRAWN_IOCTLS).values())
ALL_STRUCTS = [struct(name) for name in structs.names()]
FLEXIBLE = [cls for cls in ALL_STRUCTS if hasattr(cls, "_flexible_")]


def test_numbers_known_from_traces_of_other_programs() -> None:
    # As strace prints them for any KVM program.
    assert KVM_RUN == 0xAE80
    assert KVM_GET_REGS == 0x8090AE81
    assert IOCTLS["KVM_SET_USER_MEMORY_REGION"].number == 0x4020AE46
    assert IOCTLS["KVM_GET_SUPPORTED_CPUID"].number == 0xC008AE05


@pytest.mark.parametrize("ioctl", ALL_IOCTLS, ids=lambda ioctl: ioctl.name)
def test_number_recomputes_from_the_struct(ioctl: Ioctl) -> None:
    argument = ioctl.argument_type
    size = ctypes.sizeof(argument) if argument is not None and ioctl.direction != NONE else 0
    assert ioctl.size == size
    assert ioctl.number == encode(ioctl.direction, ioctl.nr, size)
    assert ioctl.number >> 8 & 0xFF == 0xAE
    assert ioctl.number >> 16 & 0x3FFF == size  # the encoding has 14 bits for it


def test_table_is_in_order_of_descriptors() -> None:
    seen = [ioctl.descriptor for ioctl in IOCTLS.values()]
    assert sorted(seen, key=[SYSTEM, VM, DEVICE, VCPU].index) == seen


def test_no_two_ioctls_of_a_descriptor_share_a_number() -> None:
    for descriptor in (SYSTEM, VM, DEVICE, VCPU):
        numbers = [ioctl.number for ioctl in IOCTLS.values() if descriptor in ioctl.descriptors]
        assert len(numbers) == len(set(numbers)), descriptor


def test_an_ioctl_without_direction_points_to_a_struct_only_where_the_kernel_does_so() -> None:
    odd = {ioctl.name for ioctl in ALL_IOCTLS if ioctl.direction == NONE and ioctl.argument not in (None, "int")}
    assert odd == {"KVM_REINJECT_CONTROL"}
    assert not [ioctl for ioctl in ALL_IOCTLS if ioctl.direction != NONE and ioctl.argument in (None, "int")]


def test_capabilities_of_ioctls_exist() -> None:
    for ioctl in ALL_IOCTLS:
        assert ioctl.capability is None or ioctl.capability in Cap.__members__, ioctl


def test_ioctl_shows_name_number_and_descriptors() -> None:
    assert repr(IOCTLS["KVM_ENABLE_CAP"]) == "<Ioctl KVM_ENABLE_CAP 0x4068aea3 on vcpu/vm>"
    assert IOCTLS["KVM_CREATE_VM"].argument_type is None
    assert IOCTLS["KVM_SET_IDENTITY_MAP_ADDR"].argument_type is ctypes.c_uint64
    assert IOCTLS["KVM_SET_IRQCHIP"].direction == READ  # the kernel's own slip, for ever
    assert IOCTLS["KVM_GET_ONE_REG"].direction == WRITE


@pytest.mark.parametrize("cls", ALL_STRUCTS, ids=lambda cls: cls.__name__)
def test_every_byte_of_a_struct_has_a_name(cls: type[ctypes.Structure]) -> None:
    assert gaps(cls, cls.__name__) == []


def gaps(cls: Any, path: str) -> list[str]:
    """Bytes of a struct or of what it holds that no field covers, as C's silent padding would."""
    if issubclass(cls, ctypes.Array):
        return gaps(cls._type_, f"{path}[0]")
    if not issubclass(cls, ctypes.Structure | ctypes.Union):
        return []
    found, end = [], 0
    for name, kind, *bits in cls._fields_:
        field = getattr(cls, name)
        offset, size = (field.offset, ctypes.sizeof(kind))
        if issubclass(cls, ctypes.Structure):
            if offset > end:
                found.append(f"{path}.{name} at {offset:#x} after {end:#x}")
            end = offset + size
        if not bits:
            found += gaps(kind, f"{path}.{name}")
    if issubclass(cls, ctypes.Structure) and end != ctypes.sizeof(cls):
        found.append(f"{path} ends at {end:#x} of {ctypes.sizeof(cls):#x}")
    return found


def test_a_gap_would_be_noticed() -> None:
    class Holed(ctypes.Structure):
        _fields_ = [("byte", ctypes.c_uint8), ("word", ctypes.c_uint32), ("tail", ctypes.c_uint8)]

    assert gaps(Holed, "holed") == ["holed.word at 0x4 after 0x1", "holed ends at 0x9 of 0xc"]


@pytest.mark.parametrize("cls", ALL_STRUCTS, ids=lambda cls: cls.__name__)
def test_struct_says_what_it_is_and_has_the_kernels_name(cls: type[ctypes.Structure]) -> None:
    assert cls.__doc__
    assert struct(cls.__name__) is cls
    assert getattr(structs, cls.__name__) is cls


def test_an_unknown_struct_is_refused() -> None:
    with pytest.raises(KeyError):
        struct("kvm_no_such_struct")
    with pytest.raises(AttributeError, match="kvm_no_such_struct"):
        structs.kvm_no_such_struct  # noqa: B018
    assert "kvm_irqfd" in dir(structs)


@pytest.mark.parametrize("cls", FLEXIBLE, ids=lambda cls: cls.__name__)
def test_sized_adds_the_array_right_after_the_struct(cls: type[ctypes.Structure]) -> None:
    array, element = vars(cls)["_flexible_"]
    for entries in (0, 1, 7):
        longer = sized(cls, entries)
        assert ctypes.sizeof(longer) >= ctypes.sizeof(cls) + entries * ctypes.sizeof(element)
        assert ctypes.sizeof(longer) % ctypes.alignment(cls) == 0
        assert getattr(longer, array).offset == ctypes.sizeof(cls)
        assert len(getattr(longer(), array)) == (entries if element is not ctypes.c_char else 0)
        assert issubclass(longer, cls)


def test_sized_makes_each_class_once() -> None:
    assert sized(structs.kvm_cpuid2, 100) is sized(structs.kvm_cpuid2, 100)
    assert sized(structs.kvm_cpuid2, 100) is not sized(structs.kvm_cpuid2, 101)
    assert sized(structs.kvm_cpuid2, 100).__name__ == "kvm_cpuid2[100]"


def test_sized_array_lies_where_the_kernel_reads_it() -> None:
    mask = sized(structs.kvm_signal_mask, 8)()
    mask.len = 8
    mask.sigset[0] = 0x80
    assert bytes(mask) == b"\x08\0\0\0\x80" + bytes(7)
    routing = sized(structs.kvm_irq_routing, 2)()
    routing.nr = 2
    routing.entries[1].gsi = 0x55
    assert bytes(routing)[8 + 48] == 0x55


def test_sized_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TypeError, match="kvm_regs has no flexible array"):
        sized(structs.kvm_regs, 1)
    with pytest.raises(ValueError, match="-1 entries"):
        sized(structs.kvm_msrs, -1)


def test_every_exit_reason_has_its_name() -> None:
    detail = ("KVM_EXIT_IO_", "KVM_EXIT_HYPERCALL_", "KVM_EXIT_HYPERV_", "KVM_EXIT_XEN_")
    reasons = {
        value: name
        for name, value in vars(exit_reasons).items()
        if name.startswith("KVM_EXIT_") and not name.startswith(detail)
    }
    assert reasons == EXIT_REASONS
    assert sorted(EXIT_REASONS) == list(range(len(EXIT_REASONS)))


def test_capability_numbers_are_distinct_and_in_order() -> None:
    numbers = [int(cap) for cap in Cap.__members__.values()]
    assert len(numbers) == len(set(numbers))
    assert numbers == sorted(numbers)


def test_no_constant_is_defined_twice() -> None:
    places: dict[str, list[str]] = {}
    for module in CONSTANT_MODULES:
        assert module.__file__
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                places.setdefault(node.targets[0].id, []).append(module.__name__)
    twice = {name: where for name, where in places.items() if len(where) > 1 and name not in ("__all__", "_TABLE")}
    assert twice == {}
    assert set(constants()) & set(IOCTLS | WITHDRAWN_IOCTLS) == set()


def test_newer_names_exist_and_say_which_release_has_them() -> None:
    known = {name.replace("[0]", "") for name in expected()}
    assert set(NEWER_THAN_HEADERS) - known == set()
    for name, source in NEWER_THAN_HEADERS.items():
        release = re.fullmatch(r"(?:by )?Linux 6\.(\d+)", source)
        assert release, name
        assert 2 <= int(release[1]) <= 18, name


def test_the_table_of_ioctls_loads_neither_structs_nor_dear_modules() -> None:
    script = (
        "import sys; before = set(sys.modules); import kvmpy.abi.ioctls, kvmpy.abi.run_layout, kvmpy.abi.exit_reasons; "
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.split() == [
        "kvmpy",
        "kvmpy.abi",
        "kvmpy.abi.exit_reasons",
        "kvmpy.abi.ioctls",
        "kvmpy.abi.run_layout",
    ]


def test_hot_structs_load_only_their_own_module() -> None:
    script = (
        "import sys, ctypes; before = set(sys.modules); from kvmpy.abi.structs import kvm_regs, kvm_sregs; "
        "print(*sorted(name for name in set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.split() == ["kvmpy", "kvmpy.abi", "kvmpy.abi.structs", "kvmpy.abi.structs.registers"]


def test_the_package_imports_nothing_else_of_kvmpy_and_opens_no_file() -> None:
    for path in Path(next(iter(kvmpy.abi.__path__))).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module, path
                assert not node.module.startswith("kvmpy") or node.module.startswith("kvmpy.abi"), path
            if isinstance(node, ast.Import):
                assert not [alias for alias in node.names if alias.name not in ("ctypes",)], path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "open", path
