"""One way to break every entry rule: the table behind the unit tests and behind the comparison with the real KVM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvmpy.errors import GuestMemoryError
from kvmpy.x86 import modes
from kvmpy.x86.entry_rules import KVM_CR4, KVM_EFER, ProcessorLimits
from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags
from kvmpy.x86.registers import CpuState, DescriptorTable, Segment

PDPT = 0x2000
RESTRICTED = ProcessorLimits(unrestricted_guest=False)
DATA_REGISTERS = ("ss", "ds", "es", "fs", "gs")
CODE_AND_DATA = ("cs", *DATA_REGISTERS)


class Bytes:
    """Physical memory from 0 on."""

    def __init__(self, size: int = 0x1_0000) -> None:
        self.data = bytearray(size)

    def read(self, address: int, length: int) -> bytes:
        self._check(address, length)
        return bytes(self.data[address : address + length])

    def write(self, address: int, data: bytes) -> None:
        self._check(address, len(data))
        self.data[address : address + len(data)] = data

    guest_write = write

    def _check(self, address: int, length: int) -> None:
        if not 0 <= address <= address + length <= len(self.data):
            raise GuestMemoryError(f"{address:#x} is not in memory", address, length)


def real() -> CpuState:
    return modes.real_mode(0x7C00)


def protected() -> CpuState:
    return modes.protected_mode(0x1000)


def paging32() -> CpuState:
    return modes.paging32(0x1000, 0x2000)


def pae() -> CpuState:
    return modes.pae(0x1000, PDPT)


def long() -> CpuState:
    state = modes.long_mode(0x1000, 0x2000)
    state.sregs.ldt = Segment(0x40, 0x5000, 0xFFF, type=2, s=0)
    return state


def virtual_8086() -> CpuState:
    state = modes.protected_mode(0x100)
    state.regs.rflags |= Rflags.VM
    for name in CODE_AND_DATA:
        setattr(state.sregs, name, Segment(0x1000, 0x10000, 0xFFFF, type=3, dpl=3))
    return state


GOOD_STATES = {
    "real": real,
    "reset": modes.reset_vector,
    "protected": protected,
    "paging32": paging32,
    "pae": pae,
    "long": long,
    "virtual-8086": virtual_8086,
}


@dataclass(frozen=True)
class Break:
    """A state that breaks `rule`, and within its rule set nothing else but the unavoidable `companions`."""

    rule: str
    good: Callable[[], CpuState]
    change: Callable[[CpuState], None]
    limits: ProcessorLimits = field(default_factory=ProcessorLimits)
    companions: tuple[str, ...] = ()
    memory: Bytes | None = None

    @property
    def broken(self) -> CpuState:
        state = self.good()
        self.change(state)
        return state


def sets(**values: int) -> Callable[[CpuState], None]:
    """Registers get new values."""

    def change(state: CpuState) -> None:
        for name, value in values.items():
            setattr(state.regs if hasattr(state.regs, name) else state.sregs, name, value)

    return change


def on(register: str, bits: int) -> Callable[[CpuState], None]:
    def change(state: CpuState) -> None:
        owner = state.regs if hasattr(state.regs, register) else state.sregs
        setattr(owner, register, getattr(owner, register) | int(bits))

    return change


def off(register: str, bits: int) -> Callable[[CpuState], None]:
    def change(state: CpuState) -> None:
        owner = state.regs if hasattr(state.regs, register) else state.sregs
        setattr(owner, register, getattr(owner, register) & ~int(bits))

    return change


def segment(register: str, **fields: int) -> Callable[[CpuState], None]:
    def change(state: CpuState) -> None:
        setattr(state.sregs, register, getattr(state.sregs, register).replace(**fields))

    return change


def both(*changes: Callable[[CpuState], None]) -> Callable[[CpuState], None]:
    def change(state: CpuState) -> None:
        for one in changes:
            one(state)

    return change


def _table(register: str, base: int) -> Callable[[CpuState], None]:
    return lambda state: setattr(state.sregs, register, DescriptorTable(base, 0xFF))


def _pdpt(*entries: int) -> Bytes:
    memory = Bytes()
    for index, entry in enumerate(entries):
        memory.write(PDPT + 8 * index, entry.to_bytes(8, "little"))
    return memory


NEWER_KERNELS_ONLY = frozenset({"kvm.efer.bits"})
"""Rules that KVM_SET_SREGS of older kernels (6.18 among them, measured) does not enforce."""

KVM_BREAKS = (
    Break("kvm.cr0.high", real, on("cr0", 1 << 32)),
    Break("kvm.cr0.nw", real, both(on("cr0", Cr0.NW), off("cr0", Cr0.CD))),
    Break("kvm.cr0.pg", real, on("cr0", Cr0.PG)),
    Break("kvm.cr4.bits", real, on("cr4", Cr4.SMXE)),
    Break("kvm.cr4.bits", real, on("cr4", Cr4.LA57), ProcessorLimits(cr4=KVM_CR4 & ~int(Cr4.LA57))),
    Break("kvm.cr4.bits", real, on("cr4", 1 << 63)),
    Break("kvm.long_mode.pae", long, off("cr4", Cr4.PAE)),
    Break("kvm.long_mode.lma", long, off("efer", Efer.LMA)),
    Break("kvm.long_mode.cr3", long, on("cr3", 1 << 52)),
    Break("kvm.long_mode.cr3", long, on("cr3", 1 << 48), ProcessorLimits(physical_address_bits=48)),
    Break("kvm.long_mode.cr3", long, on("cr3", 1 << 61), ProcessorLimits(lam=False)),
    Break("kvm.efer.lma", real, on("efer", Efer.LMA)),
    Break("kvm.efer.lma", protected, on("efer", Efer.LMA | Efer.LME)),
    Break("kvm.cs.l", protected, segment("cs", l=1, db=0)),
    Break("kvm.efer.bits", real, on("efer", 1 << 1)),
    Break("kvm.efer.bits", real, on("efer", 1 << 63)),
    Break("kvm.efer.bits", real, on("efer", Efer.NXE), ProcessorLimits(efer=KVM_EFER & ~int(Efer.NXE))),
    Break("kvm.apic_base.reserved", real, on("apic_base", 1 << 9)),
    Break("kvm.apic_base.reserved", real, on("apic_base", 1)),
    Break("kvm.apic_base.reserved", real, on("apic_base", 1 << 52)),
    Break("kvm.apic_base.mode", real, sets(apic_base=0xFEE0_0400)),
    Break("kvm.apic_base.x2apic", real, on("apic_base", 1 << 10), ProcessorLimits(x2apic=False)),
)

VTX_REGISTER_BREAKS = (
    Break("vtx.cr0.high", real, on("cr0", 1 << 40)),
    Break("vtx.cr0.pg", real, on("cr0", Cr0.PG)),
    Break("vtx.cr4.bits", real, on("cr4", 1 << 15)),
    Break("vtx.cr4.bits", real, on("cr4", Cr4.SMAP), ProcessorLimits(cr4=KVM_CR4 & ~int(Cr4.SMAP))),
    Break("vtx.cr4.cet", protected, on("cr4", Cr4.CET)),
    Break("vtx.ia32e.pg", long, off("cr0", Cr0.PG)),
    Break("vtx.ia32e.pae", long, off("cr4", Cr4.PAE)),
    Break("vtx.cr4.pcide", protected, on("cr4", Cr4.PCIDE)),
    Break("vtx.cr3.width", real, on("cr3", 1 << 52)),
    Break("vtx.cr3.width", long, on("cr3", 1 << 62), ProcessorLimits(lam=False)),
    Break("vtx.efer.reserved", real, on("efer", Efer.SVME)),
    Break("vtx.efer.reserved", real, on("efer", 1 << 63)),
    Break("vtx.efer.lme", long, off("efer", Efer.LME)),
    Break("vtx.gdtr.base", long, _table("gdt", 1 << 47)),
    Break("vtx.idtr.base", long, _table("idt", 0x8000_0000_0000_0000)),
    Break("vtx.rip", long, sets(rip=1 << 48)),
    Break("vtx.rip", protected, sets(rip=1 << 32)),
    Break("vtx.rip", lambda: modes.long_mode(0x1000, 0x2000, bits=32), sets(rip=1 << 32)),
    Break("vtx.rflags.reserved", real, on("rflags", 1 << 15)),
    Break("vtx.rflags.reserved", real, on("rflags", 1 << 22)),
    Break("vtx.rflags.fixed1", real, off("rflags", Rflags.FIXED1)),
    Break("vtx.rflags.vm", virtual_8086, off("cr0", Cr0.PE)),
    Break("vtx.rflags.if", real, sets(interrupt=0x20)),
    Break("vtx.pdpte", pae, sets(), memory=_pdpt(0x3001, 0x4021)),
    Break("vtx.pdpte", pae, sets(), memory=_pdpt(0, 0, 0, 1 << 52 | 1)),
)

VTX_SEGMENT_BREAKS = (
    Break("vtx.tr.ti", long, segment("tr", selector=0x34)),
    Break("vtx.ldt.ti", long, segment("ldt", selector=0x44)),
    Break("vtx.ss.rpl", protected, segment("cs", selector=0x0B), RESTRICTED),
    *(Break(f"vtx.{name}.v8086_base", virtual_8086, segment(name, base=0x10010)) for name in CODE_AND_DATA),
    *(Break(f"vtx.{name}.base", long, segment(name, base=1 << 47)) for name in ("tr", "fs", "gs", "ldt")),
    *(Break(f"vtx.{name}.base", long, segment(name, base=1 << 32)) for name in ("cs", "ss", "ds", "es")),
    *(Break(f"vtx.{name}.v8086_limit", virtual_8086, segment(name, limit=0xFFFE)) for name in CODE_AND_DATA),
    *(Break(f"vtx.{name}.v8086_rights", virtual_8086, segment(name, dpl=0)) for name in CODE_AND_DATA),
    *(Break(f"vtx.{name}.v8086_rights", virtual_8086, segment(name, avl=1)) for name in CODE_AND_DATA),
    Break("vtx.cs.accessed", long, segment("cs", type=10)),
    *(Break(f"vtx.{name}.accessed", long, segment(name, type=2)) for name in DATA_REGISTERS),
    Break("vtx.cs.type", long, segment("cs", type=1)),
    Break("vtx.cs.type", protected, segment("cs", type=3), RESTRICTED),
    Break("vtx.ss.type", long, segment("ss", type=1)),
    Break("vtx.ss.type", long, segment("ss", type=11)),
    *(Break(f"vtx.{name}.readable", long, segment(name, type=9)) for name in DATA_REGISTERS[1:]),
    *(Break(f"vtx.{name}.s", long, segment(name, s=0)) for name in CODE_AND_DATA),
    Break("vtx.cs.dpl", long, segment("cs", dpl=3)),
    Break("vtx.cs.dpl", long, segment("cs", type=15, dpl=1)),
    Break("vtx.cs.dpl", long, segment("cs", type=3, dpl=1)),
    Break("vtx.ss.dpl_rpl", protected, both(segment("cs", selector=0x0B), segment("ss", selector=0x13)), RESTRICTED),
    Break("vtx.ss.dpl_zero", real, both(segment("cs", dpl=3), segment("ss", dpl=3))),
    Break("vtx.ss.dpl_zero", long, both(segment("cs", type=3), segment("ss", dpl=3))),
    *(Break(f"vtx.{name}.dpl", long, segment(name, selector=0x13), RESTRICTED) for name in DATA_REGISTERS[1:]),
    Break("vtx.cs.present", long, segment("cs", present=0)),
    Break("vtx.cs.db", long, segment("cs", db=1)),
    *(Break(f"vtx.{name}.g_low", long, segment(name, limit=0xFF000, g=1)) for name in (*CODE_AND_DATA, "tr", "ldt")),
    *(Break(f"vtx.{name}.g_high", long, segment(name, limit=1 << 20, g=0)) for name in (*CODE_AND_DATA, "tr", "ldt")),
    Break("vtx.tr.type", long, segment("tr", type=3)),
    Break("vtx.tr.type", protected, segment("tr", type=9)),
    Break("vtx.tr.s", long, segment("tr", s=1)),
    Break("vtx.tr.present", long, segment("tr", present=0), companions=("vtx.tr.usable",)),
    Break("vtx.tr.usable", long, segment("tr", unusable=1)),
    Break("vtx.ldt.type", long, segment("ldt", type=3)),
    Break("vtx.ldt.s", long, segment("ldt", s=1)),
)

AMDV_BREAKS = (
    Break("amdv.cr0.nw", real, both(on("cr0", Cr0.NW), off("cr0", Cr0.CD))),
    Break("amdv.cr0.high", real, on("cr0", 1 << 63)),
    Break("amdv.cr3.mbz", long, on("cr3", 1 << 52)),
    Break("amdv.cr3.mbz", long, on("cr3", 1 << 45), ProcessorLimits(physical_address_bits=45)),
    Break("amdv.cr4.mbz", real, on("cr4", Cr4.VMXE)),
    Break("amdv.cr4.mbz", real, on("cr4", 1 << 32)),
    Break("amdv.cr4.cet", protected, on("cr4", Cr4.CET)),
    Break("amdv.efer.mbz", real, on("efer", 1 << 2)),
    Break("amdv.efer.mbz", real, on("efer", 1 << 40)),
    Break("amdv.efer.long_mode", real, on("efer", Efer.LME), ProcessorLimits(long_mode=False)),
    Break("amdv.long_mode.pae", long, off("cr4", Cr4.PAE)),
    Break("amdv.long_mode.pe", long, off("cr0", Cr0.PE)),
    Break("amdv.long_mode.cs", long, segment("cs", db=1)),
)

BREAKS = KVM_BREAKS + VTX_REGISTER_BREAKS + VTX_SEGMENT_BREAKS + AMDV_BREAKS
