"""The registers of one logical processor as plain values.

`Segment` and `DescriptorTable` are immutable; `Registers` and `SystemRegisters` are mutable and compare by value.
They hold what KVM_GET_REGS and KVM_GET_SREGS hold (KVM API, sections 4.11 and 4.13) but know nothing of KVM.
Hand-written slotted classes: this module is on the path of `import kvmpy`, where dataclasses would cost 20 ms.
"""

__all__ = [
    "GENERAL_REGISTERS",
    "SEGMENT_REGISTERS",
    "CpuState",
    "DescriptorTable",
    "Registers",
    "Segment",
    "SystemRegisters",
]

GENERAL_REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip
"""Names in the order of the kernel's struct kvm_regs; all are 64 bits wide."""

SEGMENT_REGISTERS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
"""Names in the order of the kernel's struct kvm_sregs."""


class Segment:
    """A segment register with its hidden part (SDM vol. 3, 3.4.3): what the processor cached from the descriptor.

    `base` is 64 bits; `limit` is in bytes, 32 bits, already scaled by the granularity; `type` is the 4-bit
    descriptor type (SDM vol. 3, 3.4.5.1); `s` is 1 for code and data, 0 for system segments; `db` is D/B; `l` is
    the 64-bit code flag; `g` the granularity that the limit had; `unusable` marks a null segment as VT-x does.
    """

    __slots__ = ("avl", "base", "db", "dpl", "g", "l", "limit", "present", "s", "selector", "type", "unusable")
    __match_args__ = ("selector", "base", "limit", "type")

    def __init__(
        self,
        selector: int = 0,
        base: int = 0,
        limit: int = 0xFFFF,
        *,
        type: int = 3,
        present: int = 1,
        dpl: int = 0,
        db: int = 0,
        s: int = 1,
        l: int = 0,  # noqa: E741  the manual's name of the bit
        g: int = 0,
        avl: int = 0,
        unusable: int = 0,
    ) -> None:
        set_once = object.__setattr__
        set_once(self, "selector", selector)
        set_once(self, "base", base)
        set_once(self, "limit", limit)
        set_once(self, "type", type)
        set_once(self, "present", present)
        set_once(self, "dpl", dpl)
        set_once(self, "db", db)
        set_once(self, "s", s)
        set_once(self, "l", l)
        set_once(self, "g", g)
        set_once(self, "avl", avl)
        set_once(self, "unusable", unusable)

    selector: int
    base: int
    limit: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741
    g: int
    avl: int
    unusable: int

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Segment does not change; use segment.replace({name}=...)")

    def replace(self, **fields: int) -> "Segment":
        """The same segment with some fields changed."""
        values = {name: getattr(self, name) for name in self.__slots__}
        unknown = fields.keys() - values.keys()
        if unknown:
            raise TypeError(f"a Segment has no field {', '.join(sorted(unknown))}")
        return Segment(**(values | fields))

    def _key(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Segment) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> "tuple[object, tuple[dict[str, int]]]":  # copy and pickle would assign to fields
        return _segment, (dict(zip(self.__slots__, self._key(), strict=True)),)

    def _repr_html_(self) -> str:
        from kvmpy.x86.html_text import preformatted
        from kvmpy.x86.register_text import segment_type_text

        return preformatted(f"{self!r}\n{segment_type_text(self)}")

    def __repr__(self) -> str:
        flags = " ".join(f"{name}={getattr(self, name)}" for name in ("dpl", "present", "s", "db", "l", "g", "avl"))
        unusable = " unusable" if self.unusable else ""
        place = f"{self.selector:#06x} base={self.base:#x} limit={self.limit:#x}"
        return f"<Segment {place} type={self.type:#x} {flags}{unusable}>"


def _segment(fields: dict[str, int]) -> Segment:
    return Segment(**fields)


class DescriptorTable:
    """GDTR or IDTR: `base` (64 bits) and `limit` (16 bits, the last valid byte)."""

    __slots__ = ("base", "limit")
    __match_args__ = ("base", "limit")
    base: int
    limit: int

    def __init__(self, base: int = 0, limit: int = 0xFFFF) -> None:
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "limit", limit)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a DescriptorTable does not change; make a new one")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DescriptorTable):
            return NotImplemented
        return self.base == other.base and self.limit == other.limit

    def __hash__(self) -> int:
        return hash((self.base, self.limit))

    def __reduce__(self) -> "tuple[object, tuple[int, int]]":
        return DescriptorTable, (self.base, self.limit)

    def __repr__(self) -> str:
        return f"<DescriptorTable base={self.base:#x} limit={self.limit:#x}>"


_RESET_CODE, _RESET_DATA = Segment(type=11), Segment(type=3)
_RESET_TR, _RESET_LDT = Segment(type=11, s=0), Segment(type=2, s=0)
_RESET_TABLE = DescriptorTable()


class _Comparable:
    """Equality and copying over __slots__, for the two mutable register files."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def _repr_html_(self) -> str:
        from kvmpy.x86.html_text import preformatted

        return preformatted(str(self))

    def differences(self, other: "_Comparable") -> dict[str, tuple[object, object]]:
        """Register name -> (here, there), for every register that differs."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__slots__)
        return {name: (here, there) for name, here, there in pairs if here != there}


class Registers(_Comparable):
    """General registers, RIP and RFLAGS: 64-bit unsigned integers. RFLAGS starts as 2, as after reset."""

    __slots__ = GENERAL_REGISTERS
    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int

    def __init__(self, **values: int) -> None:
        self.rax = self.rbx = self.rcx = self.rdx = self.rsi = self.rdi = self.rsp = self.rbp = 0
        self.r8 = self.r9 = self.r10 = self.r11 = self.r12 = self.r13 = self.r14 = self.r15 = self.rip = 0
        self.rflags = 2
        if values:
            unknown = values.keys() - GENERAL_REGISTERS
            if unknown:
                raise TypeError(f"no such register: {', '.join(sorted(unknown))}")
            for name, value in values.items():
                setattr(self, name, value)

    def copy(self) -> "Registers":
        return Registers(**{name: getattr(self, name) for name in GENERAL_REGISTERS})

    def __str__(self) -> str:
        from kvmpy.x86.register_text import general_registers_text

        return general_registers_text(self)

    def __repr__(self) -> str:
        return f"<Registers rip={self.rip:#x} rsp={self.rsp:#x} rflags={self.rflags:#x}>"


class SystemRegisters(_Comparable):
    """Segments, descriptor tables, control registers, EFER and the local APIC base.

    `interrupt` is the vector that KVM holds for injection (struct kvm_sregs, interrupt_bitmap), or None.
    A new one is a processor after reset (SDM vol. 3, table 9-1), except that CS is based at 0.
    """

    __slots__ = (*SEGMENT_REGISTERS, "gdt", "idt", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base", "interrupt")
    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DescriptorTable
    idt: DescriptorTable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt: int | None

    def __init__(self) -> None:
        self.cs = _RESET_CODE
        self.ds = self.es = self.fs = self.gs = self.ss = _RESET_DATA
        self.tr = _RESET_TR
        self.ldt = _RESET_LDT
        self.gdt = self.idt = _RESET_TABLE
        self.cr0 = 0x6000_0010  # CD, NW and ET, as after reset
        self.cr2 = self.cr3 = self.cr4 = self.cr8 = self.efer = 0
        self.apic_base = 0xFEE0_0900  # enabled, bootstrap processor
        self.interrupt = None

    def copy(self) -> "SystemRegisters":
        new = SystemRegisters()
        for name in self.__slots__:
            setattr(new, name, getattr(self, name))
        return new

    def __str__(self) -> str:
        from kvmpy.x86.register_text import system_registers_text

        return system_registers_text(self)

    def __repr__(self) -> str:
        control = f"cr0={self.cr0:#x} cr3={self.cr3:#x} cr4={self.cr4:#x} efer={self.efer:#x}"
        return f"<SystemRegisters {control} cs={self.cs.selector:#x}>"


class CpuState(_Comparable):
    """Both register files of one processor: what an entry state sets and what the entry rules judge."""

    __slots__ = ("regs", "sregs")
    __match_args__ = ("regs", "sregs")
    regs: Registers
    sregs: SystemRegisters

    def __init__(self, regs: Registers | None = None, sregs: SystemRegisters | None = None) -> None:
        self.regs = regs if regs is not None else Registers()
        self.sregs = sregs if sregs is not None else SystemRegisters()

    def copy(self) -> "CpuState":
        return CpuState(self.regs.copy(), self.sregs.copy())

    def __str__(self) -> str:
        return f"{self.regs}\n{self.sregs}"

    def __repr__(self) -> str:
        return f"<CpuState {self.regs!r} {self.sregs!r}>"
