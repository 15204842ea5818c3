"""Registers as the kernel's structures: struct kvm_regs and struct kvm_sregs (KVM API, sections 4.11 and 4.13).

What does not fit is refused by name, instead of being cut off.
"""

from struct import Struct
from struct import error as pack_error

from kvmpy.errors import RegisterValueError, UsageError
from kvmpy.x86.registers import (
    GENERAL_REGISTERS,
    SEGMENT_REGISTERS,
    DescriptorTable,
    Segment,
    SystemRegisters,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "CONTROL",
    "CONTROL_REGISTERS",
    "INTERRUPTS",
    "KVM_DTABLE",
    "KVM_SEGMENT",
    "REGS_SIZE",
    "SEGMENT_SIZE",
    "SREGS_SIZE",
    "TABLES",
    "check",
    "general_image",
    "interrupt_image",
    "segment_image",
    "system_image",
    "table_image",
]

CONTROL_REGISTERS = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")

# Offsets in struct kvm_sregs: eight struct kvm_segment of 24 bytes, two struct kvm_dtable of 16, then u64 fields.
SEGMENT_SIZE, TABLES, CONTROL, INTERRUPTS, SREGS_SIZE = 24, 192, 224, 280, 312
REGS_SIZE = 144
_KVM_REGS = Struct("=18Q")
KVM_SEGMENT = Struct("=QIH9Bx")  # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable
KVM_DTABLE = Struct("=QH6x")
_CONTROL_CELLS = Struct("=7Q")
_INTS = {int}
_SEGMENT_WIDTHS = {"base": 64, "limit": 32, "selector": 16, "type": 4, "dpl": 2}
_SEGMENT_FIELDS = tuple((field, _SEGMENT_WIDTHS.get(field, 1)) for field in Segment.__slots__)


def check(name: str, value: object, bits: int) -> None:
    """Raise RegisterValueError unless `value` is an unsigned number of so many bits."""
    if not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise RegisterValueError(name, value, bits)


def general_image(values: "Sequence[int]") -> bytes:
    """struct kvm_regs from its values, in the order of GENERAL_REGISTERS."""
    try:
        return _KVM_REGS.pack(*values)
    except pack_error:
        for name, value in zip(GENERAL_REGISTERS, values, strict=True):
            check(name, value, 64)
        raise


def system_image(values: SystemRegisters) -> bytes:
    """struct kvm_sregs."""
    control = [getattr(values, name) for name in CONTROL_REGISTERS]
    for name, value in zip(CONTROL_REGISTERS, control, strict=True):
        check(name, value, 64)
    images: list[bytes] = []
    last: object = images
    image = b""
    for name in SEGMENT_REGISTERS:
        segment = getattr(values, name)
        if segment is not last:  # the data segments are often one and the same
            last, image = segment, segment_image(name, segment)
        images.append(image)
    images += table_image("gdt", values.gdt), table_image("idt", values.idt), _CONTROL_CELLS.pack(*control)
    images.append(interrupt_image(values.interrupt))
    return b"".join(images)


def segment_image(name: str, value: object) -> bytes:
    """struct kvm_segment of a segment register. Raises RegisterValueError naming the field that does not fit."""
    if not isinstance(value, Segment):
        raise UsageError(f"{name} takes a kvmpy.x86.registers.Segment, not {value!r}")
    fields = (
        value.base, value.limit, value.selector, value.type, value.present, value.dpl, value.db, value.s, value.l,
        value.g, value.avl, value.unusable,
    )  # fmt: skip
    base, limit, selector, kind, present, dpl, db, s, long, g, avl, unusable = fields
    if (
        {*map(type, fields)} != _INTS
        or base >> 64 | limit >> 32 | selector >> 16 | kind >> 4 | dpl >> 2
        or (present | db | s | long | g | avl | unusable) >> 1
    ):
        _check_fields(name, value)  # one by one only now, or that would be most of the cost of an entry state
    return KVM_SEGMENT.pack(*fields)


def _check_fields(name: str, value: Segment) -> None:
    for field, bits in _SEGMENT_FIELDS:
        content = getattr(value, field)
        if not isinstance(content, int) or content < 0 or content >> bits:
            raise RegisterValueError(f"{name}.{field}", content, bits)


def table_image(name: str, value: object) -> bytes:
    """struct kvm_dtable of GDTR or IDTR."""
    if not isinstance(value, DescriptorTable):
        raise UsageError(f"{name} takes a kvmpy.x86.registers.DescriptorTable, not {value!r}")
    check(f"{name}.base", value.base, 64)
    check(f"{name}.limit", value.limit, 16)
    return KVM_DTABLE.pack(value.base, value.limit)


def interrupt_image(vector: int | None) -> bytes:
    """interrupt_bitmap: 256 bits, at most one of them set."""
    if vector is None:
        return bytes(32)
    check("interrupt", vector, 8)
    return (1 << vector).to_bytes(32, "little")
