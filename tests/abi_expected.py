"""What kvmpy's ABI tables say, name by name, with the C expression that must give the same."""

import ctypes
from collections.abc import Iterator

from kvmpy.abi import confidential, exit_reasons, flags, guest_interfaces, structs, withdrawn
from kvmpy.abi.capabilities import Cap
from kvmpy.abi.ioctls import IOCTLS
from kvmpy.abi.withdrawn import WITHDRAWN_IOCTLS

CONSTANT_MODULES = (flags, exit_reasons, guest_interfaces, confidential, withdrawn)

# Flexible arrays that kvmpy calls otherwise than C: where in the struct C has them, None for "no such C expression".
FLEXIBLE_IN_C = {
    "kvm_nested_state.data[0]": None,  # in C a union of two arrays of length 0
    "kvm_tdx_capabilities.cpuid_entries": "cpuid.entries",
    "kvm_tdx_init_vm.cpuid_entries": "cpuid.entries",
}

Expected = dict[str, tuple[str, str]]  # what kvmpy has: name -> (C expression or statement, value)


def constants() -> dict[str, int]:
    found = {f"KVM_CAP_{cap.name}": int(cap) for cap in Cap}
    for module in CONSTANT_MODULES:
        found |= {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, int)}
    for name in ("NONE", "READ", "WRITE"):  # withdrawn imports these from ioctls
        found.pop(name, None)
    return found


def walk(cls: type, path: str, offset: int) -> Iterator[tuple[str, int, int]]:
    """Every field below `cls` as (C path, offset, size), anonymous unions opened, arrays as a whole and element 0."""
    for name, kind, *bits in cls._fields_:  # type: ignore[attr-defined]
        if bits:
            continue
        at = offset + getattr(cls, name).offset
        if name.startswith("_"):
            if name in getattr(cls, "_anonymous_", ()):
                yield from walk(kind, path, at)
            continue
        yield f"{path}.{name}", at, ctypes.sizeof(kind)
        element, suffix = kind, ""
        while issubclass(element, ctypes.Array):
            element, suffix = element._type_, suffix + "[0]"
        if issubclass(element, ctypes.Structure | ctypes.Union):
            yield from walk(element, f"{path}.{name}{suffix}", at)


def expected() -> Expected:
    found: Expected = {}
    for name, number in constants().items():
        found[name] = (f'printf("%#llx", (unsigned long long)({name}))', hex(number) if number else "0")
    for name, ioctl in (IOCTLS | WITHDRAWN_IOCTLS).items():
        found[name] = (f'printf("%#llx", (unsigned long long)({name}))', hex(ioctl.number))
    for name in structs.names():
        cls = structs.struct(name)
        found[name] = (f'printf("%zu", sizeof(struct {name}))', str(ctypes.sizeof(cls)))
        fields = list(walk(cls, name, 0))
        flexible = getattr(cls, "_flexible_", None)
        if flexible:
            array, element = flexible
            fields.append((f"{name}.{array}[0]", ctypes.sizeof(cls), ctypes.sizeof(element)))
        for path, offset, size in fields:
            stem = path.removesuffix("[0]")
            in_c: str | None = FLEXIBLE_IN_C.get(path, FLEXIBLE_IN_C.get(stem, stem.partition(".")[2]))
            if in_c is None:
                continue
            if path.endswith("[0]"):
                in_c += "[0]"
            found[path] = (
                f'printf("%zu %zu", offsetof(struct {name}, {in_c}), sizeof(((struct {name} *)0)->{in_c}))',
                f"{offset} {size}",
            )
    return found | bit_fields()


def bit_fields() -> Expected:
    """Bit-fields have no offset in C: fill each with ones and compare the bytes of the whole entry."""
    entry = structs.kvm_ioapic_state().redirtbl[0]
    found: Expected = {}
    for name, _, *bits in type(entry.fields)._fields_:
        if bits:
            entry.bits = 0
            setattr(entry.fields, name, (1 << bits[0]) - 1)
            found[f"kvm_ioapic_state.redirtbl[0].fields.{name}"] = (
                "struct kvm_ioapic_state s; memset(&s, 0, sizeof s);"
                f"s.redirtbl[0].fields.{name} = -1;"
                'printf("%#llx", (unsigned long long)s.redirtbl[0].bits)',
                hex(entry.bits),
            )
    return found
