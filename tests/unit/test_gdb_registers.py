"""Registers by gdb's names: linear pc, segments that are loaded, x87 tags, and nothing half-written."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from kvmpy.debug.gdb.architecture import Architecture
from kvmpy.debug.gdb.registers import RegisterAccess
from kvmpy.debug.gdb.target import TargetError
from kvmpy.debug.gdb.target_description import describe
from kvmpy.debug.gdb.xsave_area import XsaveArea
from kvmpy.errors import EntryRefusedError, KvmError
from kvmpy.x86.descriptors import Gdt, tss_segment
from kvmpy.x86.modes import long_mode, protected_mode, real_mode
from kvmpy.x86.registers import CpuState, Registers, SystemRegisters

GDT = 0x5000


class LiveGeneral(Registers):
    """General registers that can be assigned, like a vCPU's."""

    def assign(self, values: Registers) -> None:
        for name in Registers.__slots__:
            setattr(self, name, getattr(values, name))


class LiveSystem(SystemRegisters):
    def assign(self, values: SystemRegisters) -> None:
        for name in SystemRegisters.__slots__:
            setattr(self, name, getattr(values, name))


class StandingVcpu:
    """A vCPU's registers without KVM; `refuse` says which system registers it does not take."""

    def __init__(self, state: CpuState) -> None:
        self.regs, self.sregs = LiveGeneral(), LiveSystem()
        self.regs.assign(state.regs)
        self.sregs.assign(state.sregs)
        self.area = bytearray(4096)
        self.area[0:2] = b"\x7f\x03"
        self.area[24:28] = b"\x80\x1f\0\0"
        self.msrs = {0xC000_0102: 0x1234}
        self.refuse: Callable[[SystemRegisters], bool] = lambda sregs: False
        self.memory = bytearray(0x10000)

    def get_xsave(self) -> bytes:
        return bytes(self.area)

    def set_xsave(self, area: bytes) -> None:
        self.area[:] = area

    def get_msr(self, index: int) -> int:
        if index not in self.msrs:
            raise KvmError("KVM_GET_MSRS", errno.EINVAL)
        return self.msrs[index]

    def set_msr(self, index: int, value: int) -> None:
        self.msrs[index] = value

    def get_debug_registers(self) -> object:
        if self.refuse(self.sregs):
            raise EntryRefusedError("KVM_SET_SREGS", errno.EINVAL, [])
        return None

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.memory[address : address + length])

    def access(self) -> RegisterAccess:
        return RegisterAccess(self, self.read)

    def value(self, name: str) -> int | None:
        (value,) = self.access().read((name,))
        return value


def vcpu_in(state: CpuState) -> StandingVcpu:
    return StandingVcpu(state)


@pytest.mark.parametrize("architecture", list(Architecture))
def test_every_register_of_a_description_is_there_and_can_be_written_back(architecture: Architecture) -> None:
    vcpu = vcpu_in(long_mode(0x1000, 0x2000))
    description = describe(architecture, avx=True)
    before = vcpu.access().read(description.sources)
    assert None not in before
    vcpu.access().write(
        {name: value for name, value in zip(description.sources, before, strict=True) if value is not None}
    )
    assert vcpu.access().read(description.sources) == before


def test_pc_is_linear_in_real_mode() -> None:
    vcpu = vcpu_in(real_mode(segment=0x07C0, offset=0x12))
    assert vcpu.value("pc") == 0x7C12
    vcpu.access().write({"pc": 0x7C80})
    assert (vcpu.regs.rip, vcpu.sregs.cs.selector) == (0x80, 0x07C0)


def test_pc_outside_the_code_segment_is_refused() -> None:
    vcpu = vcpu_in(real_mode(segment=0x07C0, offset=0))
    with pytest.raises(TargetError, match="outside the code segment"):
        vcpu.access().write({"pc": 0x7B00, "rax": 1})
    assert vcpu.regs.rax == 0


def test_pc_is_rip_in_64_bit_mode() -> None:
    vcpu = vcpu_in(long_mode(0x1000, 0x2000))
    vcpu.access().write({"pc": 0xFFFF_8000_0000_0000, "cs_base": 0x5000})
    assert vcpu.regs.rip == vcpu.value("pc") == 0xFFFF_8000_0000_0000


def test_pc_wraps_at_4_gib_in_32_bits() -> None:
    vcpu = vcpu_in(protected_mode(0x1000))
    vcpu.sregs.cs = vcpu.sregs.cs.replace(base=0xFFFF_F800)
    assert vcpu.value("pc") == 0x800


def test_a_selector_in_real_mode_sets_the_base() -> None:
    vcpu = vcpu_in(real_mode(0x1000))
    vcpu.access().write({"ds": 0xB800, "cs": 0x100, "pc": 0x1004})
    assert (vcpu.sregs.ds.selector, vcpu.sregs.ds.base) == (0xB800, 0xB8000)
    assert (vcpu.sregs.cs.base, vcpu.regs.rip) == (0x1000, 4)


def with_gdt(state: CpuState, *, long: bool = False) -> tuple[StandingVcpu, dict[str, int]]:
    vcpu = vcpu_in(state)
    gdt = Gdt(long_mode=long)
    names = {"code": gdt.append("code64" if long else "code32"), "data": gdt.append("data32")}
    names["tss"] = gdt.append(tss_segment(0x1234_5678_9000 if long else 0x9000))
    vcpu.memory[GDT : GDT + len(gdt)] = gdt.to_bytes()
    vcpu.sregs.gdt = gdt.register(GDT)
    return vcpu, names


def test_a_selector_in_protected_mode_comes_from_the_descriptor_table() -> None:
    vcpu, selectors = with_gdt(protected_mode(0x1000))
    vcpu.sregs.ds = vcpu.sregs.ds.replace(selector=0x50, base=0x7000)
    vcpu.access().write({"ds": selectors["data"], "tr": selectors["tss"]})
    assert (vcpu.sregs.ds.base, vcpu.sregs.ds.limit) == (0, 0xFFFF_FFFF)
    assert (vcpu.sregs.tr.base, vcpu.sregs.tr.type) == (0x9000, 11)
    assert vcpu.sregs.tr.limit == vcpu.value("tr_limit") == 0x67


def test_a_task_register_of_long_mode_has_a_64_bit_base() -> None:
    vcpu, selectors = with_gdt(long_mode(0x1000, 0x2000), long=True)
    vcpu.access().write({"tr": selectors["tss"]})
    assert vcpu.sregs.tr.base == vcpu.value("tr_base") == 0x1234_5678_9000


def test_the_null_selector_makes_a_segment_unusable() -> None:
    vcpu, _ = with_gdt(protected_mode(0x1000))
    vcpu.access().write({"gs": 0})
    assert (vcpu.sregs.gs.selector, vcpu.sregs.gs.unusable, vcpu.sregs.gs.present) == (0, 1, 0)


@pytest.mark.parametrize("selector", [0x100, 0x18, 0x1_0000, 0x0C])
def test_a_selector_without_a_fitting_descriptor_is_refused(selector: int) -> None:
    vcpu, selectors = with_gdt(protected_mode(0x1000))
    assert selectors["tss"] == 0x18
    vcpu.sregs.ldt = vcpu.sregs.ldt.replace(base=0x6000, limit=7)
    before = vcpu.sregs.copy()
    with pytest.raises(TargetError):
        vcpu.access().write({"ds": selector})
    assert vcpu.sregs.copy() == before


def test_tables_limits_and_control_registers_are_set() -> None:
    vcpu = vcpu_in(protected_mode(0x1000))
    vcpu.access().write({"idtr_base": 0x3000, "idtr_limit": 0x7FF, "cr2": 0xDEAD, "ldtr_limit": 0x17, "rflags": 0x246})
    assert (vcpu.sregs.idt.base, vcpu.sregs.idt.limit) == (0x3000, 0x7FF)
    assert (vcpu.sregs.cr2, vcpu.sregs.ldt.limit, vcpu.regs.rflags) == (0xDEAD, 0x17, 0x246)


def test_what_kvm_refuses_changes_nothing() -> None:
    vcpu = vcpu_in(protected_mode(0x1000))
    vcpu.refuse = lambda sregs: bool(sregs.cr0 & 1 << 31)
    before = vcpu.sregs.copy()
    with pytest.raises(EntryRefusedError):
        vcpu.access().write({"rax": 5, "cr0": before.cr0 | 1 << 31})
    assert vcpu.sregs.copy() == before
    assert vcpu.regs.rax == 0


def test_an_msr_that_kvm_does_not_give_is_not_available() -> None:
    vcpu = vcpu_in(long_mode(0x1000, 0x2000))
    assert vcpu.value("k_gs_base") == 0x1234
    vcpu.access().write({"k_gs_base": 0x5678})
    assert vcpu.msrs == {0xC000_0102: 0x5678}
    vcpu.msrs.clear()
    assert vcpu.value("k_gs_base") is None


def test_an_unknown_register_is_an_error() -> None:
    vcpu = vcpu_in(real_mode(0x1000))
    with pytest.raises(TargetError, match="foo"):
        vcpu.value("foo")
    with pytest.raises(TargetError, match="foo"):
        vcpu.access().write({"foo": 1})


def test_floating_point_registers_are_where_fxsave_has_them() -> None:
    vcpu = vcpu_in(long_mode(0x1000, 0x2000))
    vcpu.access().write(
        {"st1": 0x4000_C90F_DAA2_2168_C235, "xmm15": 1 << 127, "ymm2h": 7, "mxcsr": 0x1FA0, "fop": 0x7FF}
    )
    area = bytes(vcpu.area)
    assert area[48:58] == 0x4000_C90F_DAA2_2168_C235.to_bytes(10, "little")
    assert area[160 + 15 * 16 + 15] == 0x80
    assert area[576 + 2 * 16] == 7
    assert area[24:28] == b"\xa0\x1f\0\0"
    assert area[512] == 7, "a component without its XSTATE_BV bit counts as initial"
    assert vcpu.value("st1") == 0x4000_C90F_DAA2_2168_C235
    assert vcpu.value("fctrl") == 0x37F


def test_the_tag_word_tells_valid_zero_special_and_empty() -> None:
    area = XsaveArea(bytes(4096))
    area.write("fstat", 5 << 11)  # TOP is 5: st0 is physical register 5, st3 is register 0
    one, infinity = 0x3FFF_8000_0000_0000_0000, 0x7FFF_8000_0000_0000_0000
    area.write("st0", one)
    area.write("st2", infinity)
    area.write("st3", 0)
    area.write("ftag", 0b00_10_00_11_11_11_11_01)
    assert area.read("ftag") == 0b10_01_00_11_11_11_11_01, "7: infinity, 6: zero, 5: one, 0: zero"
    assert bytes(area)[4] == 0b1110_0001
