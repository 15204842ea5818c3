"""A vCPU's registers as live objects: loaded once, written back once before the vCPU runs on.

With KVM_CAP_SYNC_REGS the kernel copies registers through `kvm_run.s` on every KVM_RUN (KVM API, section 6.12), so
these objects are views of that area: the general registers are always up to date, and assigning to one marks the area
dirty for the next KVM_RUN; there is nothing to do on the path of an exit. The system registers are copied only after
somebody has asked for them once, because reading them costs some processors a microsecond or more. KVM_GET_REGS and
its sisters fill the same area when the vCPU has not run yet.

Without the capability the area is private memory and the vCPU loads and writes it back by ioctl around KVM_RUN.
"""

from kvmpy.kvm.register_images import (
    CONTROL,
    CONTROL_REGISTERS,
    INTERRUPTS,
    KVM_DTABLE,
    KVM_SEGMENT,
    SEGMENT_SIZE,
    SREGS_SIZE,
    TABLES,
    check,
    general_image,
    interrupt_image,
    segment_image,
    system_image,
    table_image,
)
from kvmpy.kvm.register_sync import ALL, RegisterSync
from kvmpy.kvm.run_page import REGS, SREGS
from kvmpy.x86.registers import (
    GENERAL_REGISTERS,
    SEGMENT_REGISTERS,
    DescriptorTable,
    Registers,
    Segment,
    SystemRegisters,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["LiveRegisters", "LiveSystemRegisters"]


def _general(index: int, name: str) -> property:
    just_this = (index,)

    def read(registers: "LiveRegisters") -> int:
        registers._sync.need_regs()
        return registers._cells[index]

    def write(registers: "LiveRegisters", value: int) -> None:
        check(name, value, 64)
        registers._sync.need_regs()
        registers._cells[index] = value
        registers._sync.mark_regs(just_this)

    return property(read, write, doc=f"{name.upper()}, 64 bits, unsigned")


def _control(index: int, name: str) -> property:
    def read(registers: "LiveSystemRegisters") -> int:
        registers._sync.need_sregs()
        return registers._control[index]

    def write(registers: "LiveSystemRegisters", value: int) -> None:
        check(name, value, 64)
        registers._sync.need_sregs()
        registers._control[index] = value
        registers._sync.mark_sregs()

    return property(read, write, doc=f"{name.upper()}, 64 bits, unsigned")


def _segment(index: int, name: str) -> property:
    def read(registers: "LiveSystemRegisters") -> Segment:
        registers._sync.need_sregs()
        return registers._read_segment(index * SEGMENT_SIZE)

    def write(registers: "LiveSystemRegisters", value: Segment) -> None:
        image = segment_image(name, value)
        registers._sync.need_sregs()
        registers._area[index * SEGMENT_SIZE : (index + 1) * SEGMENT_SIZE] = image
        registers._sync.mark_sregs()

    return property(read, write, doc=f"{name.upper()} with its hidden part")


def _table(index: int, name: str) -> property:
    def read(registers: "LiveSystemRegisters") -> DescriptorTable:
        registers._sync.need_sregs()
        return registers._read_table(TABLES + 16 * index)

    def write(registers: "LiveSystemRegisters", value: DescriptorTable) -> None:
        image = table_image(name, value)
        registers._sync.need_sregs()
        registers._area[TABLES + 16 * index : TABLES + 16 * (index + 1)] = image
        registers._sync.mark_sregs()

    return property(read, write, doc=f"{name.upper()}R: base and limit")


_SEGMENTS_KEPT = 256
_segments: dict[bytes, Segment] = {}
"""By struct kvm_segment: a guest has a few, they are asked for at each exit, and making one takes 2 us."""


def _segment_of(image: bytes) -> Segment:
    base, limit, selector, kind, present, dpl, db, s, long, g, avl, unusable = KVM_SEGMENT.unpack(image)
    return Segment(
        selector, base, limit,
        type=kind, present=present, dpl=dpl, db=db, s=s, l=long, g=g, avl=avl, unusable=unusable,
    )  # fmt: skip


def _no_register(name: str, names: "Iterable[str]") -> AttributeError:
    """For AL, EAX and their like, which are parts of the registers that KVM knows, and for the wrong object."""
    whole = _whole_register(name)
    if whole:
        return AttributeError(f"no register {name!r}: it is a part of {whole}, which is 64 bits wide")
    if name in GENERAL_REGISTERS:
        return AttributeError(f"no register {name!r} here: it is one of vcpu.regs")
    if name in SystemRegisters.__slots__:
        return AttributeError(f"no register {name!r} here: it is one of vcpu.sregs")
    return AttributeError(f"no register {name!r}; there are {', '.join(names)}")


def _whole_register(name: str) -> str:
    """The 64-bit register that AX, EAX, AL, SIL, R8D ... are parts of, or ""."""
    for register in GENERAL_REGISTERS:
        stem = register[1:]
        if stem.isdigit():
            parts = [f"{register}d", f"{register}w", f"{register}b"]
        else:
            parts = [stem, f"e{stem}"]
            parts += [f"{stem[0]}l", f"{stem[0]}h"] if stem.endswith("x") else [f"{stem}l"]
        if name in parts:
            return register
    return ""


class LiveRegisters:
    """General registers, RIP and RFLAGS of one vCPU (KVM_GET_REGS, KVM API section 4.11). See `Vcpu.regs`.

    Every attribute is an unsigned 64-bit int; assigning what does not fit raises RegisterValueError. Prints readably.
    """

    __slots__ = ("_area", "_cells", "_sync")
    rax = _general(0, "rax")
    rbx = _general(1, "rbx")
    rcx = _general(2, "rcx")
    rdx = _general(3, "rdx")
    rsi = _general(4, "rsi")
    rdi = _general(5, "rdi")
    rsp = _general(6, "rsp")
    rbp = _general(7, "rbp")
    r8 = _general(8, "r8")
    r9 = _general(9, "r9")
    r10 = _general(10, "r10")
    r11 = _general(11, "r11")
    r12 = _general(12, "r12")
    r13 = _general(13, "r13")
    r14 = _general(14, "r14")
    r15 = _general(15, "r15")
    rip = _general(16, "rip")
    rflags = _general(17, "rflags")

    def __init__(self, sync: RegisterSync) -> None:
        area = sync.area[REGS:SREGS]
        object.__setattr__(self, "_sync", sync)
        object.__setattr__(self, "_area", area)
        object.__setattr__(self, "_cells", area.cast("Q"))

    _sync: RegisterSync
    _area: memoryview
    _cells: memoryview

    def __setattr__(self, name: str, value: int) -> None:
        if name not in GENERAL_REGISTERS:  # a misspelt register must not become an attribute that changes nothing
            raise _no_register(name, GENERAL_REGISTERS)
        object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # or a type checker would believe in every name

        def __getattr__(self, name: str) -> int:  # asked only for what is not there
            raise _no_register(name, GENERAL_REGISTERS)

    def copy(self) -> Registers:
        """The registers now, as a plain value that does not change."""
        self._sync.need_regs()
        return Registers(**dict(zip(GENERAL_REGISTERS, self._cells, strict=True)))

    def assign(self, values: Registers) -> None:
        """Take over all registers of `values`."""
        self.assign_values([getattr(values, name) for name in GENERAL_REGISTERS])

    def values(self) -> list[int]:
        """All of them as numbers, in the order of `kvmpy.x86.registers.GENERAL_REGISTERS`."""
        self._sync.need_regs()
        return self._cells.tolist()

    def assign_values(self, values: list[int]) -> None:
        """The counterpart of `values`. Raises RegisterValueError naming a register whose value does not fit."""
        image = general_image(values)
        self._sync.will_write()
        self._area[:] = image
        self._sync.mark_regs(ALL)

    def drop(self) -> None:
        """Let go of the vCPU's mapping: the vCPU is closed."""
        self._cells.release()
        self._area.release()

    def __str__(self) -> str:
        return str(self.copy())

    def _repr_html_(self) -> str:
        return self.copy()._repr_html_()

    def __repr__(self) -> str:
        return repr(self.copy())


class LiveSystemRegisters:
    """Segments, tables, control registers, EFER, APIC base of one vCPU (KVM_GET_SREGS, 4.13). See `Vcpu.sregs`.

    Segments and tables are immutable values: `sregs.cs = sregs.cs.replace(base=0x1000)`.
    """

    __slots__ = ("_area", "_control", "_sync")
    cs = _segment(0, "cs")
    ds = _segment(1, "ds")
    es = _segment(2, "es")
    fs = _segment(3, "fs")
    gs = _segment(4, "gs")
    ss = _segment(5, "ss")
    tr = _segment(6, "tr")
    ldt = _segment(7, "ldt")
    gdt = _table(0, "gdt")
    idt = _table(1, "idt")
    cr0 = _control(0, "cr0")
    cr2 = _control(1, "cr2")
    cr3 = _control(2, "cr3")
    cr4 = _control(3, "cr4")
    cr8 = _control(4, "cr8")
    efer = _control(5, "efer")
    apic_base = _control(6, "apic_base")

    def __init__(self, sync: RegisterSync) -> None:
        area = sync.area[SREGS : SREGS + SREGS_SIZE]
        object.__setattr__(self, "_sync", sync)
        object.__setattr__(self, "_area", area)
        object.__setattr__(self, "_control", area[CONTROL:INTERRUPTS].cast("Q"))

    _sync: RegisterSync
    _area: memoryview
    _control: memoryview

    def __setattr__(self, name: str, value: object) -> None:
        if name not in SystemRegisters.__slots__:
            raise _no_register(name, SystemRegisters.__slots__)
        object.__setattr__(self, name, value)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> int:
            raise _no_register(name, SystemRegisters.__slots__)

    @property
    def interrupt(self) -> int | None:
        """The vector that waits to be injected (interrupt_bitmap), or None."""
        self._sync.need_sregs()
        return self._read_interrupt()

    @interrupt.setter
    def interrupt(self, vector: int | None) -> None:
        image = interrupt_image(vector)
        self._sync.need_sregs()
        self._area[INTERRUPTS:SREGS_SIZE] = image
        self._sync.mark_sregs()

    def control_registers(self) -> list[int]:
        """CR0, CR2, CR3, CR4, CR8, EFER and the APIC base in one look."""
        self._sync.need_sregs()
        return self._control.tolist()

    def copy(self) -> SystemRegisters:
        """The registers now, as a plain value that does not change."""
        self._sync.need_sregs()
        values = SystemRegisters()
        for index, name in enumerate(SEGMENT_REGISTERS):
            setattr(values, name, self._read_segment(index * SEGMENT_SIZE))
        values.gdt, values.idt = self._read_table(TABLES), self._read_table(TABLES + 16)
        for name, value in zip(CONTROL_REGISTERS, self._control, strict=True):
            setattr(values, name, value)
        values.interrupt = self._read_interrupt()
        return values

    def assign(self, values: SystemRegisters) -> None:
        """Take over all registers of `values`."""
        image = system_image(values)
        self._sync.will_write()
        self._area[:] = image
        self._sync.mark_sregs()

    def _read_segment(self, at: int) -> Segment:
        image = self._area[at : at + SEGMENT_SIZE].tobytes()
        segment = _segments.get(image)
        if segment is None:
            if len(_segments) >= _SEGMENTS_KEPT:
                _segments.clear()
            segment = _segments[image] = _segment_of(image)
        return segment

    def _read_table(self, at: int) -> DescriptorTable:
        return DescriptorTable(*KVM_DTABLE.unpack_from(self._area, at))

    def _read_interrupt(self) -> int | None:
        bits = int.from_bytes(self._area[INTERRUPTS:SREGS_SIZE], "little")
        return bits.bit_length() - 1 if bits else None

    def drop(self) -> None:
        """Let go of the vCPU's mapping: the vCPU is closed."""
        self._control.release()
        self._area.release()

    def __str__(self) -> str:
        return str(self.copy())

    def _repr_html_(self) -> str:
        return self.copy()._repr_html_()

    def __repr__(self) -> str:
        return repr(self.copy())
