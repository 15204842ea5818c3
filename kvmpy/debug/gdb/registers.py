"""The registers of a vCPU under the names that target descriptions use, all as unsigned numbers.

General registers, selectors, control registers and `rflags` have their usual names; `pc` is the *linear* address of
the next instruction, in every mode: CS base plus RIP where the base counts. `cs_base` and its like are the bases,
`tr_limit` and its like the limits, `st0`, `fctrl`, `xmm0`, `mxcsr`, `ymm0h` the floating point and vector registers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from kvmpy.debug.gdb.segment_loading import load_segment
from kvmpy.debug.gdb.target import TargetError
from kvmpy.debug.gdb.xsave_area import XsaveArea
from kvmpy.errors import KvmError
from kvmpy.x86.registers import GENERAL_REGISTERS, DescriptorTable, Registers, SystemRegisters

__all__ = ["RegisterAccess", "RegisterHolder"]

_KERNEL_GS_BASE = 0xC000_0102  # IA32_KERNEL_GS_BASE, which SWAPGS exchanges with the base of GS

_PLAIN = frozenset(GENERAL_REGISTERS) - {"rip"}
_SELECTORS = {"cs": "cs", "ss": "ss", "ds": "ds", "es": "es", "fs": "fs", "gs": "gs", "tr": "tr", "ldtr": "ldt"}
_BASES = {f"{name}_base": register for name, register in _SELECTORS.items()}
_LIMITS = {"tr_limit": "tr", "ldtr_limit": "ldt"}
_TABLES = {
    f"{name}_{field}": (name[:-1], field) for name in ("gdtr", "idtr") for field in ("base", "limit")
}  # fmt: skip
_CONTROL = frozenset(("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"))


class _Live(Protocol):
    def copy(self) -> SystemRegisters: ...
    def assign(self, values: SystemRegisters) -> None: ...


class _LiveGeneral(Protocol):
    def copy(self) -> Registers: ...
    def assign(self, values: Registers) -> None: ...


class RegisterHolder(Protocol):
    """What is needed of a vCPU that stands. `kvmpy.kvm.Vcpu` has it."""

    @property
    def regs(self) -> _LiveGeneral: ...
    @property
    def sregs(self) -> _Live: ...
    def get_xsave(self) -> bytes: ...
    def set_xsave(self, area: bytes) -> None: ...
    def get_msr(self, index: int) -> int: ...
    def set_msr(self, index: int, value: int) -> None: ...
    def get_debug_registers(self) -> object: ...


class RegisterAccess:
    """Reads and writes registers of one vCPU by name, while it stands.

    `read_memory(linear, length)` is asked for descriptors. Copies are made when a register in them is asked for, and
    kept: an object is for one look, or one change.
    """

    def __init__(self, vcpu: RegisterHolder, read_memory: Callable[[int, int], bytes]) -> None:
        self._vcpu = vcpu
        self._read_memory = read_memory
        self._regs: Registers | None = None
        self._sregs: SystemRegisters | None = None
        self._xsave: XsaveArea | None = None

    @property
    def regs(self) -> Registers:
        """The general registers, a copy."""
        if self._regs is None:
            self._regs = self._vcpu.regs.copy()
        return self._regs

    @property
    def sregs(self) -> SystemRegisters:
        """The system registers, a copy."""
        if self._sregs is None:
            self._sregs = self._vcpu.sregs.copy()
        return self._sregs

    @property
    def xsave(self) -> XsaveArea:
        """x87, SSE and AVX state, a copy."""
        if self._xsave is None:
            self._xsave = XsaveArea(self._vcpu.get_xsave())
        return self._xsave

    @property
    def pc(self) -> int:
        """The linear address of the next instruction (SDM vol. 1, 3.3.4)."""
        cs, rip = self.sregs.cs, self.regs.rip
        return rip if cs.l else (cs.base + rip) & 0xFFFF_FFFF

    def read(self, names: Sequence[str]) -> list[int | None]:
        """The registers' values; None for one that this host's KVM does not give."""
        return [self._read(name) for name in names]

    def _read(self, name: str) -> int | None:
        if name in _PLAIN:
            value: int = getattr(self.regs, name)
            return value
        if name == "pc":
            return self.pc
        if name in _SELECTORS:
            return int(getattr(self.sregs, _SELECTORS[name]).selector)
        if name in XsaveArea.NAMES:
            return self.xsave.read(name)
        if name in _BASES:
            return int(getattr(self.sregs, _BASES[name]).base)
        if name in _LIMITS:
            return int(getattr(self.sregs, _LIMITS[name]).limit)
        if name in _TABLES:
            register, field = _TABLES[name]
            return int(getattr(getattr(self.sregs, register), field))
        if name in _CONTROL:
            return int(getattr(self.sregs, name))
        if name == "k_gs_base":
            try:
                return self._vcpu.get_msr(_KERNEL_GS_BASE)
            except KvmError:
                return None
        raise TargetError(f"no register {name!r}")

    def write(self, values: Mapping[str, int]) -> None:
        """Set registers. What KVM refuses raises, as TargetError or EntryRefusedError, and nothing has changed then."""
        regs, sregs = self.regs.copy(), self.sregs.copy()
        xsave = XsaveArea(bytes(self.xsave)) if XsaveArea.NAMES & values.keys() else None
        for name, value in values.items():
            if name in _PLAIN:
                setattr(regs, name, value)
            elif xsave is not None and name in XsaveArea.NAMES:
                xsave.write(name, value)
            elif name not in ("pc", "k_gs_base"):
                self._set_system(sregs, regs.rflags, name, value)
        if "pc" in values:  # when CS has its new base
            regs.rip = _offset_in_code(values["pc"], sregs)
        old_sregs = self.sregs
        try:
            if sregs != old_sregs:
                self._vcpu.sregs.assign(sregs)
                self._vcpu.get_debug_registers()  # any ioctl: KVM judges system registers here, and not when it runs on
            if xsave is not None:
                self._vcpu.set_xsave(bytes(xsave))
            if "k_gs_base" in values:
                self._vcpu.set_msr(_KERNEL_GS_BASE, values["k_gs_base"])
        except BaseException:
            if sregs != old_sregs:
                self._vcpu.sregs.assign(old_sregs)
            raise
        self._vcpu.regs.assign(regs)

    def _set_system(self, sregs: SystemRegisters, rflags: int, name: str, value: int) -> None:
        if name in _SELECTORS:
            register = _SELECTORS[name]
            old = getattr(sregs, register)
            if value != old.selector:
                setattr(sregs, register, load_segment(old, value, sregs, rflags, self._read_memory))
        elif name in _BASES:
            register = _BASES[name]
            setattr(sregs, register, getattr(sregs, register).replace(base=value))
        elif name in _LIMITS:
            register = _LIMITS[name]
            setattr(sregs, register, getattr(sregs, register).replace(limit=value))
        elif name in _TABLES:
            register, field = _TABLES[name]
            table = getattr(sregs, register)
            base, limit = (value, table.limit) if field == "base" else (table.base, value)
            setattr(sregs, register, DescriptorTable(base, limit))
        elif name in _CONTROL:
            setattr(sregs, name, value)
        else:
            raise TargetError(f"no register {name!r}")


def _offset_in_code(linear: int, sregs: SystemRegisters) -> int:
    """RIP for a linear address."""
    cs = sregs.cs
    if cs.l:
        return linear
    offset = (linear - cs.base) & 0xFFFF_FFFF
    if offset > cs.limit:
        raise TargetError(f"{linear:#x} is outside the code segment, {cs.limit + 1:#x} bytes from {cs.base:#x}")
    return offset
