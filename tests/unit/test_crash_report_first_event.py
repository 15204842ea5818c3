"""What an instruction raises in a state, deduced as the processor would judge it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from crash_states import CODE, HANDLER, MEMORY, STACK, TABLES, Scene
from kvmpy.debug.crash_report.evidence import InterruptControllers, Pic, RecordedException
from kvmpy.debug.crash_report.first_event import Candidate, Cause
from kvmpy.exits import InternalError, Shutdown
from kvmpy.x86.descriptor_tables import TSS
from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags
from kvmpy.x86.paging import PageFlag
from kvmpy.x86.registers import DescriptorTable

DE, DB, BP, OF, UD, NM, TS, NP, SS, GP, PF = 0, 1, 3, 4, 6, 7, 10, 11, 12, 13, 14
NON_CANONICAL = 0x8000_0000_0000
P, RW, US = int(PageFlag.P), int(PageFlag.RW), int(PageFlag.US)
XD = 1 << 63

Change = Callable[[Scene], object]


def candidates(scene: Scene, **other: object) -> list[Candidate]:
    return [one.candidate for one in scene.case(**other).explanations]


def only(scene: Scene, **other: object) -> Candidate:
    (candidate,) = candidates(scene, **other)
    return candidate


def regs(**values: int) -> Change:
    def change(scene: Scene) -> None:
        for name, value in values.items():
            setattr(scene.regs, name, value)

    return change


def sregs(**values: object) -> Change:
    def change(scene: Scene) -> None:
        for name, value in values.items():
            setattr(scene.sregs, name, value)

    return change


def segment(name: str, **fields: int) -> Change:
    return lambda scene: setattr(scene.sregs, name, getattr(scene.sregs, name).replace(**fields))


def memory(address: int, data: bytes) -> Change:
    return lambda scene: scene.memory.write(address, data)


def page(virtual: int, flags: int) -> Change:
    def change(scene: Scene) -> None:
        scene.page(virtual, flags)

    return change


def push(*values: int, size: int = 8) -> Change:
    def change(scene: Scene) -> None:
        scene.push(*values, size=size)

    return change


def descriptor(selector: int, value: int) -> Change:
    def change(scene: Scene) -> None:
        scene.descriptor(selector, value)

    return change


def both(*changes: Change) -> Change:
    return lambda scene: [change(scene) for change in changes]


def nothing(scene: Scene) -> None:
    pass


REAL = [
    ("f7 f1", regs(rcx=0), DE, None, Cause.DIVIDE),  # div cx
    ("f6 f9", regs(rax=0x8000, rcx=0xFF), DE, None, Cause.DIVIDE),  # idiv cl: -0x8000 / -1
    ("d4 00", nothing, DE, None, Cause.DIVIDE),  # aam 0
    ("cd 21", nothing, 0x21, None, Cause.SOFTWARE_INTERRUPT),
    ("cc", nothing, BP, None, Cause.BREAKPOINT),
    ("ce", regs(rflags=0x802), OF, None, Cause.SOFTWARE_INTERRUPT),  # into
    ("f1", nothing, DB, None, Cause.BREAKPOINT),
    ("0f 0b", nothing, UD, None, Cause.UNDEFINED),
    ("0f 00 d8", nothing, UD, None, Cause.NOT_IN_THIS_MODE),  # ltr ax
    ("8b 07", regs(rbx=0xFFFF), GP, 0, Cause.SEGMENT_LIMIT),  # mov ax, [bx]
    ("50", regs(rsp=1), SS, 0, Cause.SEGMENT_LIMIT),  # push ax
    ("0f 22 c0", regs(rax=0x8000_0000), GP, 0, Cause.CONTROL_REGISTER),  # mov cr0, eax: PG without PE
    ("f0 90", nothing, UD, None, Cause.UNDEFINED),  # lock nop
    ("c5 f8 77", nothing, UD, None, Cause.FEATURE_OFF),  # vzeroupper
]

PROTECTED = [
    ("8e d8", regs(rax=0x100), GP, 0x100, Cause.SELECTOR_BEYOND_LIMIT),  # mov ds, eax
    ("8e d8", regs(rax=0x14), GP, 0x14, Cause.NO_LDT),
    ("8e d8", regs(rax=0x30), GP, 0x30, Cause.DESCRIPTOR_TYPE),
    ("8e d8", both(regs(rax=0x10), descriptor(0x10, 0)), GP, 0x10, Cause.DESCRIPTOR_EMPTY),
    ("8e d8", both(regs(rax=0x10), descriptor(0x10, 0x00CF_1200_0000_FFFF)), NP, 0x10,
     Cause.DESCRIPTOR_NOT_PRESENT),
    ("8e d8", regs(rax=0x13), GP, 0x10, Cause.DESCRIPTOR_PRIVILEGE),
    ("8e d0", regs(rax=0), GP, 0, Cause.SELECTOR_NULL),  # mov ss, eax
    ("8e d0", regs(rax=8), GP, 8, Cause.DESCRIPTOR_TYPE),
    ("8e d0", regs(rax=0x23), GP, 0x20, Cause.DESCRIPTOR_PRIVILEGE),
    ("8e d0", both(regs(rax=0x10), descriptor(0x10, 0x00CF_1200_0000_FFFF)), SS, 0x10,
     Cause.DESCRIPTOR_NOT_PRESENT),
    ("8e c8", nothing, UD, None, Cause.UNDEFINED),  # mov cs, eax
    ("1f", push(0x100, size=4), GP, 0x100, Cause.SELECTOR_BEYOND_LIMIT),  # pop ds
    ("0f b2 00", regs(rax=0x2000), GP, 0, Cause.SELECTOR_NULL),  # lss eax, [eax]
    ("ea 00 10 00 00 10 00", nothing, GP, 0x10, Cause.DESCRIPTOR_TYPE),  # jmp 0x10:0x1000
    ("ea 00 10 00 00 00 00", nothing, GP, 0, Cause.SELECTOR_NULL),
    ("ea 00 10 00 00 1b 00", nothing, GP, 0x18, Cause.DESCRIPTOR_PRIVILEGE),
    ("9a 00 00 10 00 48 00", nothing, GP, 0, Cause.TARGET_BEYOND_LIMIT),  # call 0x48:0x100000, a 64 KiB segment
    ("ff 28", regs(rax=0x2000), GP, 0, Cause.SELECTOR_NULL),  # jmp far [eax]
    ("cb", push(0x10, 0x1000, size=4), GP, 0x10, Cause.DESCRIPTOR_TYPE),  # retf
    ("cf", push(2, 0x100, 0x1000, size=4), GP, 0x100, Cause.SELECTOR_BEYOND_LIMIT),  # iret
    ("cf", regs(rflags=0x4002), TS, 0, Cause.NESTED_TASK),
    ("0f 00 d8", regs(rax=0), GP, 0, Cause.SELECTOR_NULL),  # ltr ax
    ("0f 00 d8", regs(rax=0x30), GP, 0x30, Cause.TSS_BUSY),
    ("0f 00 d8", regs(rax=0x10), GP, 0x10, Cause.DESCRIPTOR_TYPE),
    ("0f 00 d0", regs(rax=0x10), GP, 0x10, Cause.DESCRIPTOR_TYPE),  # lldt ax
    ("2e c7 00 01 00 00 00", regs(rax=0x2000), GP, 0, Cause.SEGMENT_NOT_WRITABLE),  # mov dword cs:[eax], 1
    ("8b 00", segment("ds", unusable=1), GP, 0, Cause.SEGMENT_NULL),
    ("8b 00", both(regs(rax=0x2000), segment("ds", limit=0x2001)), GP,
     0, Cause.SEGMENT_LIMIT),
    ("8b 00", both(regs(rax=0xFF), segment("ds", limit=0xFFF, type=7)),
     GP, 0, Cause.SEGMENT_LIMIT),  # expand-down: the limit is below the segment
    ("e9 00 00 00 00", segment("cs", limit=0x1004), GP, 0,
     Cause.TARGET_BEYOND_LIMIT),
    ("0f 22 c0", both(regs(rax=0x8000_0011), sregs(efer=int(Efer.LME))), GP, 0, Cause.PAE_OFF),
    ("0f 22 c0", both(regs(rax=0x8000_0011), sregs(cr4=int(Cr4.PAE), cr3=0x2000),
     memory(0x2000, b"\x03\x30")), GP, 0, Cause.LME_OFF),
    ("0f 22 c0", regs(rax=0x2000_0011), GP, 0, Cause.CONTROL_REGISTER),  # NW without CD
    ("0f 22 e0", regs(rax=1 << 31), GP, 0, Cause.CONTROL_REGISTER),  # mov cr4, eax
    ("0f 28 00", nothing, UD, None, Cause.SSE_OFF),  # movaps xmm0, [eax]: no OSFXSR
    ("d9 00", sregs(cr0=0x11 | int(Cr0.EM)), NM, None, Cause.FPU_OFF),  # fld
    ("9b", sregs(cr0=0x11 | int(Cr0.MP | Cr0.TS)), NM, None, Cause.FPU_OFF),  # wait
]  # fmt: skip

LONG = [
    ("48 8b 18", regs(rax=0x50_0000_0000), PF, 0, Cause.NOT_PRESENT),  # mov rbx, [rax]
    ("48 89 18", regs(rax=0x50_0000_0000), PF, 2, Cause.NOT_PRESENT),
    ("48 8b 18", regs(rax=NON_CANONICAL), GP, 0, Cause.NOT_CANONICAL),
    ("48 8b 44 24 08", regs(rsp=NON_CANONICAL), SS, 0, Cause.NOT_CANONICAL),  # mov rax, [rsp + 8]
    ("50", regs(rsp=NON_CANONICAL + 8), SS, 0, Cause.NOT_CANONICAL),  # push rax
    ("50", regs(rsp=0x50_0000_0000), PF, 2, Cause.NOT_PRESENT),
    ("48 89 18", both(regs(rax=0x20_0000), page(0x20_0000, P)), PF, 3, Cause.READ_ONLY),
    ("48 8b 18", both(regs(rax=0x20_0000), page(0x20_0000, P | RW | 0x2000)), PF, 9,
     Cause.RESERVED_BITS),
    ("48 8b 18", both(regs(rax=0x20_0000), sregs(cr4=0x6A0 | int(Cr4.SMAP)),
     page(0x20_0000, P | RW | US)), PF, 1, Cause.SMAP),
    ("f3 48 ab", both(regs(rdi=0x20_0000, rcx=1), page(0x20_0000, P)), PF, 3, Cause.READ_ONLY),
    ("0f 28 00", regs(rax=0x2008), GP, 0, Cause.MISALIGNED),
    ("0f ae 00", regs(rax=0x2008), GP, 0, Cause.MISALIGNED),  # fxsave [rax]
    ("48 0f c7 08", regs(rax=0x2008), GP, 0, Cause.MISALIGNED),  # cmpxchg16b [rax]
    ("ff e0", regs(rax=NON_CANONICAL), GP, 0, Cause.TARGET_NOT_CANONICAL),  # jmp rax
    ("c3", push(NON_CANONICAL), GP, 0, Cause.TARGET_NOT_CANONICAL),  # ret
    ("48 cf", push(0x10, STACK, 2, 8, 0), None, None, None),  # iretq of a good frame
    ("48 cf", push(0x10, STACK, 2, 0x10, 0), GP, 0x10, Cause.DESCRIPTOR_TYPE),
    ("48 cf", push(0x23, STACK, 2, 8, NON_CANONICAL), GP, 0, Cause.TARGET_NOT_CANONICAL),
    ("48 cf", push(0x10, STACK, 2, 0x2B, 0), GP, 0x10, Cause.DESCRIPTOR_PRIVILEGE),
    ("48 cf", regs(rflags=2 | int(Rflags.NT)), GP, 0, Cause.NESTED_TASK),
    ("48 cb", both(descriptor(8, 0x00EF_9A00_0000_FFFF), push(8, CODE)), GP, 8,
     Cause.DESCRIPTOR_L_AND_D),
    ("0f 05", nothing, UD, None, Cause.FEATURE_OFF),  # syscall without SCE
    ("0f 01 d1", nothing, UD, None, Cause.FEATURE_OFF),  # xsetbv without OSXSAVE
    ("0f 01 d1", both(sregs(cr4=0x6A0 | int(Cr4.OSXSAVE)), regs(rax=4)), GP, 0, Cause.CONTROL_REGISTER),
    ("0f 30", regs(rcx=0xC000_0082, rdx=0x8000), GP, 0, Cause.MSR),  # wrmsr of LSTAR
    ("0f 30", regs(rcx=0xC000_0080, rax=0x400), GP, 0, Cause.MSR),  # EFER.LME off
    ("0f 22 c0", regs(rax=1 << 32), GP, 0, Cause.CONTROL_REGISTER),
    ("0f 22 c0", regs(rax=0x11), GP, 0, Cause.CONTROL_REGISTER),  # paging off in 64-bit mode
    ("0f 22 e0", regs(rax=0x680), GP, 0, Cause.PAE_OFF),
    ("44 0f 22 c0", regs(rax=0x10), GP, 0, Cause.CONTROL_REGISTER),  # mov cr8, rax
    ("0f 01 10", both(regs(rax=0x2000), memory(0x2002, bytes(6) + b"\x00\x80")), GP, 0,
     Cause.NOT_CANONICAL),  # lgdt
    ("06", nothing, UD, None, Cause.UNDEFINED),  # push es
    ("0f 22 c8", nothing, UD, None, Cause.UNDEFINED),  # mov cr1, rax
    ("48 f7 f1", regs(rdx=1, rcx=1), DE, None, Cause.DIVIDE),
    ("48 f7 f1", regs(rdx=0, rcx=1), None, None, None),
    ("90", nothing, None, None, None),
    ("f3 48 ab", regs(rdi=0x50_0000_0000, rcx=0), None, None, None),  # rep stosq, zero times
    ("48 8d 00", regs(rax=NON_CANONICAL), None, None, None),  # lea
]  # fmt: skip

RING3 = [
    ("f4", nothing, GP, 0, Cause.PRIVILEGED),
    ("0f 20 c0", nothing, GP, 0, Cause.PRIVILEGED),
    ("0f 01 10", nothing, GP, 0, Cause.PRIVILEGED),  # lgdt
    ("0f 01 f8", nothing, GP, 0, Cause.PRIVILEGED),  # swapgs
    ("fa", nothing, GP, 0, Cause.PRIVILEGED),  # cli
    ("e4 60", memory(TABLES + TSS + 0x68 + 0x60 // 8, b"\xff"), GP, 0, Cause.PORT_DENIED),
    ("e4 60", segment("tr", limit=0x67), GP, 0, Cause.PORT_DENIED),
    ("e4 60", nothing, None, None, None),  # the bitmap of the prepared TSS allows it
    ("48 8b 18", both(regs(rax=0x20_0000), page(0x20_0000, P | RW)), PF, 5, Cause.SUPERVISOR_PAGE),
    ("0f 01 d0", nothing, None, None, None),  # xgetbv
]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "ring", "code", "change", "vector", "error_code", "cause"),
    [
        pytest.param(mode, ring, *case, id=f"{mode}{ring}-{case[0].replace(' ', '')}-{index}")
        for mode, ring, cases in (("real", 0, REAL), ("protected", 0, PROTECTED), ("long", 0, LONG), ("long", 3, RING3))
        for index, case in enumerate(cases)
    ],
)
def test_what_an_instruction_raises(
    mode: str, ring: int, code: str, change: Change, vector: int | None, error_code: int | None, cause: Cause | None
) -> None:
    scene = Scene(mode, code, ring=ring)
    change(scene)
    found = candidates(scene)
    if vector is None:
        assert found == []
        return
    (candidate,) = found
    assert (candidate.event.vector, candidate.cause) == (vector, cause), candidate
    if mode != "real":
        assert candidate.event.error_code == error_code, candidate
    assert candidate.text


@pytest.mark.parametrize(
    ("change", "error_code", "cause"),
    [
        (page(0, P | RW | XD), 0x11, Cause.NO_EXECUTE),
        (page(0, 0), 0x10, Cause.NOT_PRESENT),
        (both(page(0, P | RW | US), sregs(cr4=0x6A0 | int(Cr4.SMEP))), 0x11, Cause.SMEP),
        (sregs(cr3=MEMORY), 0x10, Cause.TABLE_OUTSIDE_MEMORY),
        (sregs(cr3=0x2000), 0x10, Cause.NOT_PRESENT),
    ],
)
def test_a_fetch_is_judged_before_the_instruction(change: Change, error_code: int, cause: Cause) -> None:
    scene = Scene("long", "0f 0b")
    change(scene)
    candidate = only(scene)
    assert candidate.cause is cause
    assert (candidate.event.vector, candidate.event.error_code) == (PF, error_code)
    assert candidate.values["fetch"] == 1


def test_an_instruction_that_reaches_into_a_page_that_is_not_there_faults_at_that_page() -> None:
    scene = Scene("long", memory=0x40_0000)
    scene.page(0, P | RW)
    scene.page(0x20_0000, 0)
    scene.regs.rip = 0x1F_FFFE
    scene.memory.write(0x1F_FFFE, b"\xb8\x01")  # mov eax, imm32, of which two bytes are here
    candidate = only(scene)
    assert candidate.cause is Cause.NOT_PRESENT
    assert candidate.event.address == 0x20_0000
    scene.memory.write(0x1F_FFFE, b"\x90\x90")
    assert candidates(scene) == []


def test_rip_beyond_the_segment_or_not_canonical() -> None:
    scene = Scene("real")
    scene.regs.rip = 0x1_0000
    assert only(scene).cause is Cause.TARGET_BEYOND_LIMIT
    scene = Scene("long")
    scene.regs.rip = NON_CANONICAL
    assert only(scene).cause is Cause.NOT_CANONICAL


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("0f 32", regs(rcx=0x1234)),  # rdmsr
        ("0f 30", regs(rcx=0x1234)),
        ("0f 22 e0", regs(rax=0x10_06A0)),  # SMEP, if there is one
    ],
)
def test_what_depends_on_the_processor_is_not_certain(code: str, change: Change) -> None:
    scene = Scene("long", code)
    change(scene)
    candidate = only(scene)
    assert not candidate.certain
    assert candidate.event.vector == GP


def test_an_interrupt_is_considered_when_the_instruction_raises_nothing_and_interrupts_are_on() -> None:
    controllers = InterruptControllers(pics=(Pic(0x20, 0, 0, 1, True), Pic(0x28, 2, 0, 0, True)))
    scene = Scene("protected", "90")
    scene.regs.rflags |= Rflags.IF
    assert [one.event.vector for one in candidates(scene, controllers=controllers)] == [0x20, 0x29]
    scene.regs.rflags &= ~int(Rflags.IF)
    assert candidates(scene, controllers=controllers) == []


def test_what_kvm_recorded_is_the_last_resort() -> None:
    scene = Scene("long", "90")
    candidate = only(scene, recorded=RecordedException(GP, 0x50))
    assert candidate.cause is Cause.RECORDED
    assert (candidate.event.vector, candidate.event.error_code) == (GP, 0x50)
    scene = Scene("long", "0f 0b")
    assert only(scene, recorded=RecordedException(GP, 0x50)).cause is Cause.UNDEFINED


def test_what_kvm_recorded_agrees_or_does_not() -> None:
    scene = Scene("long", "48 8b 18")
    scene.regs.rax = 0x50_0000_0000
    first = scene.case(recorded=RecordedException(PF, 0)).first
    assert first is not None
    assert first.agrees
    scene.regs.rax = NON_CANONICAL
    first = scene.case(recorded=RecordedException(PF, 0)).first
    assert first is not None
    assert not first.agrees


@pytest.mark.parametrize(("code", "vector"), [("cd 30", 0x30), ("cc", 3)])
def test_a_software_interrupt_that_was_completed_for_kvm_is_the_instruction_before_rip(code: str, vector: int) -> None:
    scene = Scene("long", code)
    length = len(bytes.fromhex(code))
    scene.regs.rip += length
    exits = (InternalError(1, (), bytes.fromhex(code) + bytes(13)), Shutdown())
    case = scene.case(exits=exits)
    first = case.first
    assert first is not None
    assert first.candidate.event.vector == vector
    assert first.candidate.event.software
    assert case.blamed_instruction == CODE
    assert candidates(scene, exits=exits[:1]) == []


def test_a_replay_of_delivery_leaves_the_guest_alone() -> None:
    scene = Scene("long", "0f 0b", idt=True)
    before, registers = bytes(scene.memory.data), scene.state.copy()
    (explanation,) = scene.case().explanations
    assert explanation.handled
    assert explanation.outcome.state is not None
    assert explanation.outcome.state.regs.rip == HANDLER
    assert bytes(scene.memory.data) == before
    assert scene.state == registers


def test_an_event_whose_handler_can_be_entered_does_not_explain_a_shutdown() -> None:
    case = Scene("long", "0f 0b", idt=True).case()
    assert len(case.explanations) == 1
    assert case.first is None


def test_lost_registers_explain_nothing() -> None:
    assert candidates(Scene("long", "0f 0b"), registers_lost=True) == []


def test_a_gdt_that_is_not_mapped_is_a_page_fault_of_the_processor() -> None:
    scene = Scene("long", "8e d8")
    scene.regs.rax = 0x10
    scene.sregs.gdt = DescriptorTable(0x50_0000_0000, 0x57)
    candidate = only(scene)
    assert candidate.cause is Cause.NOT_PRESENT
    assert candidate.event.address == 0x50_0000_0010
