"""The rules of crash reports on states built by hand: those that no guest of the gallery shows, and innocent states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from crash_guests import GUESTS
from crash_states import CODE, HANDLER, MEMORY, STACK, TABLES, Scene
from kvmpy.debug.crash_report import RULES, Weight
from kvmpy.debug.crash_report.evidence import InterruptControllers, LocalApic, Pic
from kvmpy.exits import FailEntry, InternalError, IoIn, RdMsr
from kvmpy.machine.recent_exits import DeviceAccess
from kvmpy.machine.statistics import AccessCount
from kvmpy.x86 import modes
from kvmpy.x86.descriptor_tables import IDT, TSS
from kvmpy.x86.flags import Efer, Rflags
from kvmpy.x86.gates import Gate, Idt
from kvmpy.x86.paging import PageFlag
from kvmpy.x86.registers import DescriptorTable, Segment

P, RW, US = int(PageFlag.P), int(PageFlag.RW), int(PageFlag.US)
PICS = (Pic(0x20, 0, 0xFE, 0, True), Pic(0x28, 0, 0xFF, 0, True))
APIC = LocalApic(0, True, (), (), 0, True, 0, 0)


def finds(scene: Scene, rule: str, says: str = "", *, weight: Weight = Weight.CAUSE, **other: object) -> None:
    """The first finding is this one."""
    report = scene.report(**other)
    assert report.cause is not None, str(report)
    assert (report.cause.id, report.cause.weight) == (rule, weight), str(report)
    assert says in report.cause.text, report.cause.text
    assert not report.unavailable


def mentions(scene: Scene, rule: str, weight: Weight, **other: object) -> None:
    """This finding is among the others."""
    report = scene.report(**other)
    assert {finding.id: finding.weight for finding in report.findings}.get(rule) is weight, str(report)


# The TSS


def ring3(code: str = "0f 0b") -> Scene:
    """A program in ring 3 whose kernel has an IDT."""
    return Scene("long", code, ring=3, idt=True)


def test_no_task_register() -> None:
    scene = ring3()
    scene.sregs.tr = Segment(0, 0, 0, type=0, s=0, present=0, unusable=1)
    finds(scene, "tss-missing", "TR is null")
    scene = ring3()
    scene.sregs.tr = modes.task_register(0)
    finds(scene, "tss-missing", "only zeros")


def test_a_tss_that_is_too_small() -> None:
    scene = ring3()
    scene.sregs.tr = scene.sregs.tr.replace(limit=0xA)
    finds(scene, "tss-too-small", "0xb")


def test_a_kernel_stack_that_is_not_mapped() -> None:
    scene = ring3()
    scene.tss(4, 0x50_0000_0000)
    finds(scene, "tss-stack", "0x5000000000")
    scene = ring3()
    scene.tss(4, MEMORY + 0x1000)
    assert scene.found()[0] == "tss-stack"


def test_a_handler_with_an_interrupt_stack_that_was_never_set() -> None:
    scene = Scene("long", "0f 0b", idt=True)
    for vector in (6, 8, 14):
        scene.gate(vector, Gate("interrupt", HANDLER, ist=1).to_bytes())
    finds(scene, "tss-stack", "IST1")


def test_a_stack_segment_in_a_32_bit_tss_that_cannot_be_loaded() -> None:
    scene = Scene("protected", "f4", ring=3, idt=True)
    scene.tss(8, 8, 4)  # SS0: the code segment
    finds(scene, "tss-stack-segment", "not writable data")


# Gates


def test_gates_of_protected_mode_in_long_mode() -> None:
    scene = Scene("long", "0f 0b")
    table = Idt(bits=32)
    table.set_all(Gate("interrupt", HANDLER, bits=32))
    scene.memory.write(TABLES + IDT, table.to_bytes())
    scene.sregs.idt = DescriptorTable(TABLES + IDT, 0xFFF)
    finds(scene, "gate-handler", "8 bytes")
    table[13] = Gate("task", selector=0x30, bits=32)
    scene.memory.write(TABLES + IDT, table.to_bytes())
    scene.memory.write(CODE, b"\x8e\xd8")  # mov ds, eax
    scene.regs.rax = 0x100
    scene.memory.write(TABLES + IDT + 13 * 16 + 5, b"\x85")
    finds(scene, "gate-type", "0x85")


def test_a_handler_beyond_its_code_segment() -> None:
    scene = Scene("protected", "0f 0b", idt=True)
    scene.descriptor(8, 0x0040_9B00_0000_8FFF)
    assert scene.found()[0] == "gate-handler"


def test_a_gate_that_ring_3_may_not_use() -> None:
    scene = ring3("cd 80")
    scene.gate(13, bytes(16))
    scene.gate(8, bytes(16))
    finds(scene, "gate-privilege", "DPL 0")


def test_a_handler_in_a_32_bit_code_segment_of_long_mode() -> None:
    scene = Scene("long", "0f 0b", idt=True)
    scene.gate(6, Gate("interrupt", HANDLER, modes.CODE32_SELECTOR).to_bytes())
    scene.gate(13, bytes(16))
    scene.gate(8, bytes(16))
    finds(scene, "gate-selector", "not 64-bit code")


def test_the_nested_task_flag() -> None:
    scene = Scene("long", "48 cf")
    scene.regs.rflags |= Rflags.NT
    finds(scene, "nested-task-flag", "NT")


def test_a_double_fault_handler_on_the_broken_stack() -> None:
    scene = Scene("long", "50", idt=True)
    scene.regs.rsp = 0x50_0000_0000
    mentions(scene, "double-fault-stack", Weight.REMARK)
    assert scene.found()[0] == "stack-not-mapped"
    scene.gate(8, Gate("interrupt", HANDLER, ist=1).to_bytes())
    assert "double-fault-stack" not in scene.found()


# Paging and segments


def test_a_page_table_that_is_not_in_memory() -> None:
    scene = Scene("long", "48 8b 18")
    scene.regs.rax = 0x4000_0000
    scene.memory.write(TABLES + 0x5008, (MEMORY | P | RW).to_bytes(8, "little"))
    finds(scene, "page-table-outside-memory", "PDE table outside memory")


def test_a_page_of_the_supervisor() -> None:
    scene = Scene("long", "48 8b 18", ring=3)
    scene.page(0x20_0000, P | RW)
    scene.regs.rax = 0x20_0000
    report = scene.report()
    assert [finding.id for finding in report.findings[:2]] == ["idt-not-loaded", "supervisor-page"]


def test_a_jump_out_of_the_code_segment() -> None:
    scene = Scene("protected", "e9 00 10 00 00")
    scene.sregs.cs = scene.sregs.cs.replace(limit=0x1FFF)
    finds(scene, "branch-beyond-segment", "0x2005")


def test_a_port_that_ring_3_may_not_use() -> None:
    scene = ring3("e6 80")
    scene.memory.write(TABLES + TSS + 0x68 + 0x80 // 8, b"\xff")
    scene.gate(13, bytes(16))
    scene.gate(8, bytes(16))
    mentions(scene, "port-denied", Weight.CAUSE)


# Modes


def test_paging_of_32_bits() -> None:
    scene = Scene("protected", "0f 22 c0")
    scene.regs.rax = 0x8000_0011
    finds(scene, "32-bit-paging", "32-bit paging begins", weight=Weight.POSSIBLE)


def test_an_instruction_that_real_mode_does_not_have() -> None:
    failure = InternalError(1, (), bytes.fromhex("0f 00 d8") + bytes(12))
    finds(Scene("real", "0f 00 d8"), "instruction-not-in-this-mode", end="failed", exit=failure)


def test_64_bit_code_after_the_far_jump_was_forgotten_and_lma_is_set() -> None:
    scene = Scene("long", "48 89 d8 48 83 c0 08 48 8d 48 08 48 31 d2 f4")
    scene.sregs.cs = scene.sregs.cs.replace(l=0, db=1)
    scene.regs.rip += 14
    finds(scene, "cs-not-64-bit", "L=0", end="timeout", exit=None)


# Waiting


def test_interrupts_that_are_off_while_one_waits() -> None:
    scene = Scene("protected", "eb fe")
    controllers = InterruptControllers(pics=(Pic(0x20, 1, 0, 0, True), PICS[1]), apic=APIC)
    mentions(scene, "interrupts-off", Weight.REMARK, end="timeout", exit=None, controllers=controllers)
    assert scene.found(end="timeout", exit=None, controllers=controllers)[0] == "endless-loop"


def test_a_loop_that_waits_for_a_device() -> None:
    scene = Scene("real", "ec a8 20 74 fb")  # in al, dx; test al, 0x20; jz
    scene.regs.rdx = 0x3FD
    finds(
        scene,
        "waits-for-device",
        "port 0x3fd of uart; it answered 0x0 last",
        weight=Weight.POSSIBLE,
        end="timeout",
        exit=None,
        devices=(("uart", "port", 0x3F8, 8),),
        exits=(DeviceAccess("port", "read", 0x3FD, 1, 0),),
    )


def test_a_local_apic_that_waits_for_eoi() -> None:
    scene = Scene("long", "f4 eb fd")
    scene.regs.rip += 1
    scene.regs.rflags |= Rflags.IF
    apic = LocalApic(0, True, (0x40,), (0x40,), 0x40, False, 1, 0)
    controllers = InterruptControllers(PICS, apic=apic)
    finds(scene, "eoi-missing", "local APIC", end="timeout", exit=None, halted=True, controllers=controllers)


def test_memory_mapped_registers_that_are_not_there() -> None:
    scene = Scene("protected", "a1 10 00 00 fe 85 c0 75 f7")  # mov eax, [0xfe000010]; test eax, eax; jnz
    unclaimed = (AccessCount("mmio", "read", 0xFE00_0010, 4, 1000),)
    finds(scene, "polls-absent-device", "1000 reads", end="timeout", exit=None, unclaimed=unclaimed)


# Ends that are no fault of an instruction


def test_a_state_that_cannot_be_entered() -> None:
    scene = Scene("long")
    scene.sregs.tr = Segment(0, 0, 0, type=3, s=0, present=0, unusable=1)
    finds(scene, "entry-rule", "vtx.tr", end="failed", exit=FailEntry(0x8000_0021))


def test_nothing_was_loaded() -> None:
    scene = Scene("real")
    scene.state.regs, scene.state.sregs = modes.reset_vector().regs, modes.reset_vector().sregs
    finds(scene, "nothing-loaded", end="failed", exit=InternalError(1, (0,)))


def test_registers_that_kvm_has_reset() -> None:
    scene = Scene("long", "0f 0b")
    report = scene.report(registers_lost=True)
    assert report.registers_lost
    assert [finding.id for finding in report.findings] == ["registers-lost"]
    assert "replay" in report.findings[0].remedy
    assert "reset it" in report.summary
    assert "these are the registers that the guest started with" in str(report)


def test_an_instruction_that_kvm_cannot_emulate() -> None:
    failure = InternalError(1, (), bytes.fromhex("0f 01 d0") + bytes(12))
    finds(Scene("long", "0f 01 d0"), "instruction-not-emulated", "0f 01 d0", end="failed", exit=failure)


def test_a_delivery_that_touches_what_is_no_memory() -> None:
    scene = Scene("long", "0f 0b", idt=True)
    scene.sregs.idt = DescriptorTable(MEMORY, 0xFFF)
    scene.page(0, P | RW, physical=0)
    mentions(scene, "delivery-touches-no-memory", Weight.CONTRIBUTES, end="failed", exit=InternalError(3, (1, 2)))
    scene = Scene("long", "0f 0b", idt=True)
    scene.regs.rsp = MEMORY + 0x1000
    assert scene.found(end="failed", exit=InternalError(3, (1, 2)))[0] == "stack-outside-memory"


def test_an_exit_that_nobody_handles() -> None:
    finds(Scene("long", "0f 32"), "exit-not-handled", "RdMsr", end="failed", exit=RdMsr(0x1234, 2))


# Innocence

GOOD = (
    ("real", "90 eb fd"),
    ("protected", "b8 01 00 00 00 bb 02 00 00 00 01 d8 89 05 00 20 00 00 f4"),
    ("long", "48 c7 c0 01 00 00 00 48 89 04 25 00 20 00 00 50 58 e8 00 00 00 00 f4"),
)


@pytest.mark.parametrize(("mode", "code"), GOOD)
@pytest.mark.parametrize("end", ["still running", "panic", "stopped"])
def test_a_guest_that_does_nothing_wrong_is_accused_of_nothing(mode: str, code: str, end: str) -> None:
    scene = Scene(mode, code, idt=mode != "real")
    report = scene.report(end=end, exit=None, entry_state=scene.state.copy(), controllers=InterruptControllers(PICS))
    assert [finding for finding in report.findings if finding.id not in ("endless-loop", "waits-for-device")] == []


@pytest.mark.parametrize(("mode", "code"), GOOD)
def test_code_of_the_right_width_is_not_taken_for_another(mode: str, code: str) -> None:
    scene = Scene(mode, code)
    for offset in range(len(bytes.fromhex(code))):
        scene.regs.rip = CODE + offset
        found = scene.found(end="timeout", exit=None, entry_state=Scene(mode, code).state)
        assert not {"code-width", "cs-not-64-bit"} & set(found)


def test_a_protected_mode_guest_with_real_mode_segments_of_its_own_is_not_accused() -> None:
    # A 16-bit segment at 0 that the GDT really has: base = selector * 16 by chance.
    scene = Scene("protected", "0f 0b")
    scene.descriptor(0x48, 0x0000_9B00_0480_FFFF)
    scene.sregs.cs = Segment(0x48, 0x480, 0xFFFF, type=11)
    scene.regs.rip = CODE - 0x480
    assert "missing-far-jump" not in scene.found()


# The table


def test_every_rule_says_what_it_is_where_it_is_written_and_what_to_do() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES) >= 80
    for rule in RULES:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.id), rule.id
        assert rule.title[0] == rule.title[0].upper(), rule.id
        assert not rule.title.endswith("."), rule.id
        assert rule.source, rule.id
        assert rule.remedy.endswith((".", "?", "!")), rule.id
        assert not rule.rule or rule.rule.endswith("."), rule.id


def test_every_rule_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "crash-reports.md").read_text("utf-8")
    listed = re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE)
    assert listed == [rule.id for rule in RULES]


def test_every_rule_is_shown_by_a_guest_of_the_gallery_or_by_a_state_here() -> None:
    in_gallery = {guest.finds for guest in GUESTS} | {guest.settings.get("contributes", "") for guest in GUESTS}
    here = set(re.findall(r'"([a-z0-9-]+)"', Path(__file__).read_text("utf-8")))
    assert {rule.id for rule in RULES} - in_gallery - here == set()


def test_a_check_that_fails_is_noted_and_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmpy._value import replace
    from kvmpy.debug.crash_report import findings

    def broken(case: object) -> None:
        raise RuntimeError("no luck")

    broken_rule = replace(RULES[0], check=broken)
    monkeypatch.setattr(findings, "RULES", (broken_rule, *RULES[1:]))
    report = Scene("long", "0f 0b").report()
    assert report.unavailable == {f"finding {RULES[0].id}": "RuntimeError: no luck"}
    assert report.cause is not None
    assert "no luck" in str(report)


def test_a_wrong_stack_pointer_is_only_worth_a_look_while_nothing_has_happened() -> None:
    scene = Scene("protected", "90")
    scene.regs.rsp = 0x8000_0000
    report = scene.report(end="still running", exit=None)
    assert [(finding.id, finding.weight) for finding in report.findings] == [("stack-outside-memory", Weight.REMARK)]


def test_efer_is_judged_by_its_bits() -> None:
    scene = Scene("long", "0f 05")
    assert scene.found()[0] == "feature-not-enabled"
    scene.sregs.efer |= Efer.SCE
    assert "feature-not-enabled" not in scene.found()


def test_ioin_is_shown_as_it_is() -> None:
    report = Scene("real", "ec").report(end="failed", exit=IoIn(0x60))
    assert report.cause is not None
    assert "IoIn(port=0x60" in report.cause.text
    assert report.state.regs.rsp == STACK
