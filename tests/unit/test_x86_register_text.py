"""Registers as text."""

from __future__ import annotations

from types import SimpleNamespace

from kvmpy.x86 import modes
from kvmpy.x86.flags import Rflags
from kvmpy.x86.register_text import (
    code_bits,
    general_registers_text,
    mode_text,
    rflags_text,
    segment_type_text,
    system_registers_text,
)
from kvmpy.x86.registers import GENERAL_REGISTERS, SEGMENT_REGISTERS, Registers, Segment


def test_flags_are_named_and_iopl_is_a_number() -> None:
    assert rflags_text(0x246) == "0x246 PF ZF IF IOPL=0"
    assert rflags_text(0x2) == "0x2 IOPL=0"
    assert rflags_text(0x3002 | Rflags.VM) == "0x23002 VM IOPL=3"
    assert rflags_text(1 << 40 | 2).split() == ["0x10000000002", "bit40", "IOPL=0"]


def test_every_general_register_is_shown_once_with_its_value() -> None:
    values = {name: 0x1111 * place for place, name in enumerate(GENERAL_REGISTERS, 1) if name != "rflags"}
    text = general_registers_text(Registers(**values))
    words = text.split()
    for name, value in values.items():
        assert words[words.index(name) + 1] == f"{value:016x}"
    assert len(text.splitlines()) == 6


def test_any_object_with_the_attributes_will_do() -> None:
    live = SimpleNamespace(**dict.fromkeys(GENERAL_REGISTERS, 0xABC))
    assert "rax 0000000000000abc" in general_registers_text(live)


def test_control_registers_are_decoded_and_segments_tabled() -> None:
    text = system_registers_text(modes.long_mode(0x1000, 0x2000, ring=3).sregs)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["mode"] == "mode 64-bit mode, ring 3"
    assert lines["cr0"].endswith("PE MP ET NE WP PG")
    assert lines["cr4"].endswith("PAE PGE OSFXSR OSXMMEXCPT")
    assert lines["efer"].endswith("LME LMA NXE")
    assert lines["cs"] == "cs   002b 0000000000000000 ffffffff 3   code, readable, accessed, 64 bits, g"
    assert lines["tr"].endswith("busy TSS")
    assert lines["ldt"].endswith("LDT, not present, unusable")
    assert {*SEGMENT_REGISTERS, "gdt", "idt", "cr2", "cr3", "cr8", "apic_base"} <= lines.keys()
    assert lines["apic_base"].endswith("at 0xfee00000, enabled, bootstrap processor")
    assert "interrupt" not in lines


def test_a_waiting_interrupt_is_mentioned() -> None:
    sregs = modes.real_mode().sregs
    sregs.interrupt = 0x20
    assert "interrupt 0x20 waits" in system_registers_text(sregs)


def test_modes_are_told_apart() -> None:
    assert mode_text(modes.real_mode().sregs) == "real mode"
    assert mode_text(modes.protected_mode(0).sregs) == "protected mode, 32 bits, no paging, ring 0"
    assert mode_text(modes.protected_mode(0, bits=16).sregs) == "protected mode, 16 bits, no paging, ring 0"
    assert mode_text(modes.paging32(0, 0).sregs) == "protected mode, 32 bits, paging, ring 0"
    assert mode_text(modes.pae(0, 0, ring=3).sregs) == "protected mode, 32 bits, PAE paging, ring 3"
    assert mode_text(modes.long_mode(0, 0, bits=32).sregs) == "compatibility mode, 32 bits, ring 0"


def test_the_width_of_code_follows_cs() -> None:
    assert code_bits(modes.real_mode().sregs) == 16
    assert code_bits(modes.protected_mode(0, bits=16).sregs) == 16
    assert code_bits(modes.protected_mode(0).sregs) == 32
    assert code_bits(modes.long_mode(0, 0, bits=32).sregs) == 32
    assert code_bits(modes.long_mode(0, 0).sregs) == 64
    left = modes.protected_mode(0).sregs
    left.cr0 &= ~1
    assert code_bits(left) == 32, "CS.D counts until CS is loaded"
    inactive = modes.long_mode(0, 0).sregs
    inactive.efer &= ~0x400
    assert code_bits(inactive) == 16, "CS.L is nothing outside of long mode"


def test_descriptor_types_are_spelled_out() -> None:
    assert segment_type_text(Segment(type=0)) == "data"
    assert segment_type_text(Segment(type=6)) == "data, expand-down, writable"
    assert segment_type_text(Segment(type=15)) == "code, conforming, readable, accessed"
    assert segment_type_text(Segment(type=9, s=0)) == "TSS"
    assert segment_type_text(Segment(type=8, s=0)) == "reserved type 8"


def test_register_values_print_themselves_by_this_text() -> None:
    state = modes.real_mode(0x7C00)
    assert str(state) == f"{general_registers_text(state.regs)}\n{system_registers_text(state.sregs)}"
