"""Mistakes in what is executed: no code at all, undefined or privileged instructions, divisions, loops."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.control_flow import ways_out
from kvmpy.debug.crash_report.findings.devices import polled
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, by_cause, cause, contributes, possible
from kvmpy.debug.crash_report.findings.halting import waits_in_hlt
from kvmpy.debug.crash_report.first_event import Cause, read_linear
from kvmpy.exits import InternalError

__all__ = ["RULES"]

_RUN = 16
"""Bytes that must all be the same to count as empty memory."""


def _empty_at(case: Case, byte: int) -> str:
    """Where memory around RIP is filled with one byte, said for a reader; nothing when it is not.

    Zeros behind RIP alone are nothing: they follow the last instruction of many a program.
    """
    if case.halted or case.evidence.registers_lost or case.blamed_instruction != case.rip:
        return ""
    ahead = read_linear(case.memory, case.state, case.rip, _RUN)
    mask = 0xFFFF_FFFF_FFFF_FFFF if case.execution.bits == 64 else 0xFFFF_FFFF
    before = read_linear(case.memory, case.state, case.rip - _RUN & mask, _RUN) if case.rip >= _RUN else b""
    filled = bytes([byte])
    physical = case.physical(case.rip)
    in_code = physical is not None and any(
        case.loaded_range(near) not in ("", "tables") for near in (physical, physical - 1)
    )
    if ahead == filled * _RUN and (before.endswith(filled * 4) or not in_code):
        return f"At {case.describe(case.rip)} memory holds"
    if before == filled * _RUN and case.evidence.ranges and not in_code:
        return f"Before {case.describe(case.rip)} memory holds"
    return ""


def _runs_through_zeroes(case: Case) -> Suspicion | None:
    where = _empty_at(case, 0)
    if not where:
        return None
    return cause(f"{where} only zeros; 00 00 is ADD [..], AL, so the processor runs on through it")


def _executes_ones(case: Case) -> Suspicion | None:
    where = _empty_at(case, 0xFF)
    if not where:
        return None
    return cause(f"{where} only ff, which is no instruction")


def _fetch_outside_memory(case: Case) -> Suspicion | None:
    if not case.fetch_failed:
        return None
    physical = case.physical(case.rip)
    if physical is not None and case.memory.contains(physical):
        return None
    where = f"physical {physical:#x}" if physical is not None else "no physical address"
    return cause(f"RIP is {case.describe(case.rip)}, which is {where}: there is no guest memory")


def _not_emulated(case: Case) -> Suspicion | None:
    event = case.evidence.exit
    if not case.emulation_failed or not isinstance(event, InternalError) or not event.instruction:
        return None
    decoded = case.execution.decoded
    data = decoded.data if decoded is not None else event.instruction[:8]
    text = (
        f"KVM executes this code in software and does not know the instruction {data.hex(' ')} at "
        f"{case.describe(case.rip)}"
    )
    asked = case.blamed(Cause.SOFTWARE_INTERRUPT, Cause.BREAKPOINT) is not None
    return contributes(text) if asked else cause(text)


def _delivery_interrupted(case: Case) -> Suspicion | None:
    if not case.delivery_failed:
        return None
    return contributes(
        "While the processor delivered an interrupt or exception it touched memory that is none: IDT, GDT, TSS or "
        "stack lie outside of RAM"
    )


def _plain_loop(case: Case) -> str:
    """The loop that the guest is in, said for a reader; nothing when there is none, or other rules know better."""
    if not case.timed_out or waits_in_hlt(case) or not case.loop or polled(case) is not None:
        return ""
    if len(case.loop) == 1:
        return f"The instruction at {case.describe(case.rip)} jumps to itself"
    base = case.rip - case.regs.rip
    offsets = [located.offset for located in case.loop]
    first, last = case.describe(base + min(offsets)), case.describe(base + max(offsets))
    return f"The guest goes round {len(case.loop)} instructions between {first} and {last}"


def _endless_loop(case: Case) -> Suspicion | None:
    text = _plain_loop(case)
    if not text or ways_out(case.execution, case.loop):
        return None
    return cause(f"{text}, and nothing in this loop leads out of it")


def _busy_loop(case: Case) -> Suspicion | None:
    text = _plain_loop(case)
    out = ways_out(case.execution, case.loop) if text else ()
    if not out:
        return None
    base = case.rip - case.regs.rip
    places = ", ".join(case.describe(base + located.offset) for located in out)
    return possible(f"{text}; it ends when the branch at {places} decides so")


def _nobody_handles(case: Case) -> Suspicion | None:
    event = case.evidence.exit
    if case.evidence.end != "failed" or event is None or case.emulation_failed or case.delivery_failed:
        return None
    if case.entry_failed is not None or isinstance(event, InternalError):
        return None
    return cause(f"KVM came out of the guest with {event!r}, and nobody handles such exits")


RULES = (
    Rule(
        "runs-through-zeroes",
        "The processor runs through empty memory",
        "Memory of zeros decodes as valid instructions, so a jump to a wrong place goes on until something else "
        "happens.",
        "SDM vol. 2, ADD",
        "Look where control left the code: a jump, call or return to a wrong address, a missing loop or HLT at the end "
        "of the program, an image that was loaded elsewhere than where it was linked.",
        _runs_through_zeroes,
    ),
    Rule(
        "executes-ff",
        "The processor executes memory of all ones",
        "ff ff is no instruction; memory that reads as all ones is an erased ROM, or nothing at all.",
        "SDM vol. 2, table A-6",
        "Look where control left the code, and whether something is loaded at this address.",
        _executes_ones,
    ),
    Rule(
        "fetch-outside-memory",
        "The processor went to where there is no memory",
        "Code can be executed from RAM and ROM only.",
        "KVM API, chapter 5, KVM_EXIT_INTERNAL_ERROR",
        "Look at the stack and the last exits for where it came from: a jump through a wrong pointer, an image linked "
        "for another address, or a machine with too little memory.",
        _fetch_outside_memory,
    ),
    Rule(
        "divide-error",
        "A division cannot be done",
        "DIV and IDIV raise #DE when the divisor is 0 or the quotient does not fit its register.",
        "SDM vol. 2, DIV and IDIV",
        "Check the divisor, and clear or sign-extend the upper half of the dividend (XOR EDX, EDX; CDQ) before.",
        by_cause(Cause.DIVIDE),
    ),
    Rule(
        "sse-not-enabled",
        "SSE is used before it is switched on",
        "SSE instructions raise #UD unless CR4.OSFXSR=1 and CR0.EM=0.",
        "SDM vol. 3, 13.1.3",
        "Clear CR0.EM, set CR0.MP, CR4.OSFXSR and CR4.OSXMMEXCPT at the start, or compile with -mgeneral-regs-only.",
        by_cause(Cause.SSE_OFF),
    ),
    Rule(
        "fpu-switched-off",
        "The FPU is switched off",
        "x87 and SSE instructions raise #NM while CR0.TS=1, x87 ones also while CR0.EM=1.",
        "SDM vol. 3, 2.5",
        "Execute CLTS, or handle #NM by restoring the registers of the task.",
        by_cause(Cause.FPU_OFF),
    ),
    Rule(
        "feature-not-enabled",
        "A feature is used before it is switched on",
        "SYSCALL needs EFER.SCE, AVX and XSETBV need CR4.OSXSAVE, else #UD.",
        "SDM vol. 2, SYSCALL, XSETBV",
        "Switch the feature on first, if CPUID reports it.",
        by_cause(Cause.FEATURE_OFF),
    ),
    Rule(
        "misaligned-operand",
        "An operand in memory is not aligned",
        "MOVAPS, MOVDQA, FXSAVE and CMPXCHG16B need addresses that are multiples of 16, else #GP(0).",
        "SDM vol. 1, 10.4.1.1",
        "Align the data (.balign 16), or use MOVUPS and MOVDQU.",
        by_cause(Cause.MISALIGNED),
    ),
    Rule(
        "privileged-instruction",
        "Ring 3 executes a privileged instruction",
        "HLT, MOV CR, LGDT, WRMSR and their like raise #GP(0) outside ring 0; CLI and STI need CPL <= IOPL.",
        "SDM vol. 3, 5.9",
        "Ask the kernel to do it, or check how the processor came to ring 3.",
        by_cause(Cause.PRIVILEGED),
    ),
    Rule(
        "undefined-instruction",
        "There is no such instruction",
        "Bytes that are no instruction of the mode raise #UD.",
        "SDM vol. 3, 6.15",
        "If the bytes are not what was assembled, the processor is in data or in the middle of an instruction: look "
        "where it came from. UD2 is what compilers put where code must not come.",
        by_cause(Cause.UNDEFINED),
    ),
    Rule(
        "instruction-not-emulated",
        "This host's KVM cannot execute the instruction",
        "A KVM without VT-x or AMD-V below it executes ring 0 and real mode in software, and its emulator lacks "
        "instructions.",
        "KVM API, chapter 5, KVM_EXIT_INTERNAL_ERROR, suberror 1",
        "Avoid the instruction in ring 0 (-mgeneral-regs-only for compilers), or run on a host with VT-x or AMD-V; "
        "`kvmpy doctor` says which instructions.",
        _not_emulated,
    ),
    Rule(
        "delivery-touches-no-memory",
        "An event could not be delivered to memory",
        "The tables and the stack that delivery uses must be in RAM.",
        "KVM API, chapter 5, KVM_EXIT_INTERNAL_ERROR, suberror 3",
        "Check the bases of IDT, GDT and TSS and the stack pointer against the memory map below.",
        _delivery_interrupted,
    ),
    Rule(
        "endless-loop",
        "The guest is in an endless loop",
        "",
        "the code at RIP",
        "If it is meant to wait for interrupts, put HLT into the loop. If it is the end of the program, end the "
        "machine: HLT, a debug-exit port, or a timeout.",
        _endless_loop,
    ),
    Rule(
        "busy-loop",
        "The guest was in a loop when it was looked at",
        "",
        "the code at RIP",
        "Look at the condition, and whether it can come true; or give the guest more time.",
        _busy_loop,
    ),
    Rule(
        "exit-not-handled",
        "Nobody handles an exit of the guest",
        "What KVM cannot do by itself it asks user space for.",
        "KVM API, chapter 5",
        "Machine.on_exit(class, handler) takes exits of this kind.",
        _nobody_handles,
    ),
)
