"""Mistakes on the way between modes: far jumps, control registers, code of another width (SDM vol. 3, 9.8 and 9.9)."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings.code_width import looks_like
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, by_cause, cause
from kvmpy.debug.crash_report.findings.segmentation import is_real_mode_segment
from kvmpy.debug.crash_report.first_event import Cause
from kvmpy.x86.flags import Cr0, Efer

__all__ = ["RULES"]

_FAR_JUMPS = (0xEA, 0xCB, 0xCA, 0xCF)


def _missing_far_jump(case: Case) -> Suspicion | None:
    sregs, decoded = case.sregs, case.execution.decoded
    if not sregs.cr0 & Cr0.PE or sregs.efer & Efer.LMA or not is_real_mode_segment(case, "cs"):
        return None
    far = decoded is not None and (decoded.opcode in _FAR_JUMPS or (decoded.opcode == 0xFF and decoded.group == 5))
    if far and case.first is not None:
        return None  # it was about to do it
    cs = sregs.cs
    return cause(
        f"CR0.PE is 1, but CS still is the segment of real mode (selector {cs.selector:#06x}, base {cs.base:#x}, 16 "
        "bits): the processor takes the code for 16-bit code"
    )


def _code_width(case: Case) -> Suspicion | None:
    if case.timed_out and case.halted:
        return None
    other = looks_like(case)
    if other is None:
        return None
    bits = case.execution.bits
    if case.execution.long_mode and other == 64 and bits != 64:
        return None  # a rule of its own
    return cause(f"The processor takes the code for {bits}-bit code; read as {other}-bit code it makes sense")


def _cs_not_64_bit(case: Case) -> Suspicion | None:
    if not case.execution.long_mode or case.execution.bits == 64 or looks_like(case) != 64:
        return None
    cs = case.sregs.cs
    return cause(
        f"EFER.LMA is 1, but CS ({cs.selector:#06x}) has L=0, D={cs.db}: this is compatibility mode, and the code "
        "looks like 64-bit code"
    )


RULES = (
    Rule(
        "missing-far-jump",
        "No far jump after CR0.PE was set",
        "Setting CR0.PE does not change CS: the processor goes on with 16-bit code until CS is loaded with a selector "
        "by a far jump.",
        "SDM vol. 3, 9.9.1",
        "Right after MOV CR0 jump to a 32-bit code descriptor: `jmp 0x08:label`, and put the 32-bit code behind the "
        "label.",
        _missing_far_jump,
    ),
    Rule(
        "cs-not-64-bit",
        "64-bit code runs in a segment that is not 64-bit",
        "Long mode executes 64-bit code only while CS.L=1; with L=0 it is compatibility mode.",
        "SDM vol. 3, 5.2.1 and 9.8.5",
        "After switching paging on, jump far to a code descriptor with L=1 and D=0 (flags nibble 0xA, access 0x9A).",
        _cs_not_64_bit,
    ),
    Rule(
        "code-width",
        "The code is of another width than the segment",
        "The D and L bits of CS, not the code, say how wide the code is; real mode is 16 bits.",
        "SDM vol. 3, 5.2.1 and 3.4.5",
        "Assemble the code for the mode it runs in (.code16, .code32, .code64; bits 16/32/64), or start the guest in "
        "the mode that it was built for.",
        _code_width,
    ),
    Rule(
        "pae-not-set",
        "CR4.PAE is not set for long mode",
        "Long mode needs CR4.PAE=1 before CR0.PG is set, else MOV CR0 raises #GP(0); it cannot be cleared afterwards.",
        "SDM vol. 3, 9.8.5 and 2.5",
        "Set bit 5 of CR4 first: mov eax, cr4; or eax, 0x20; mov cr4, eax.",
        by_cause(Cause.PAE_OFF),
    ),
    Rule(
        "lme-not-set",
        "EFER.LME is not set when paging is switched on",
        "Long mode is activated by CR0.PG only while EFER.LME=1; without, paging of 32 bits begins, which reads other "
        "tables.",
        "SDM vol. 3, 9.8.5 and 4.1.1",
        "Set bit 8 of MSR 0xC0000080 before CR0.PG: mov ecx, 0xC0000080; rdmsr; or eax, 0x100; wrmsr.",
        by_cause(Cause.LME_OFF),
    ),
    Rule(
        "32-bit-paging",
        "Paging of 32 bits, which some hosts do not run",
        "32-bit and PAE paging exist on every processor, but a KVM that runs ring 0 in software has only long mode's.",
        "SDM vol. 3, 4.1.1; `kvmpy doctor`",
        "If long mode was meant, set EFER.LME and CR4.PAE first. Else run on a host with VT-x or AMD-V.",
        by_cause(Cause.NO_32_BIT_PAGING),
    ),
    Rule(
        "control-register-value",
        "A control register does not take the value",
        "Reserved bits of control registers must be 0, and some combinations are forbidden, else #GP(0).",
        "SDM vol. 3, 2.5; vol. 2, MOV to control registers, XSETBV",
        "Look at the bits that the text names; features must be reported by CPUID before they are switched on.",
        by_cause(Cause.CONTROL_REGISTER),
    ),
    Rule(
        "msr-refused",
        "An MSR does not exist, or does not take the value",
        "RDMSR and WRMSR raise #GP(0) for an MSR that the processor does not have, and for reserved bits.",
        "SDM vol. 2, RDMSR and WRMSR; vol. 4",
        "Check CPUID before using the MSR. Machine.on_exit(RdMsr, ...) with KVM_CAP_X86_USER_SPACE_MSR can answer it.",
        by_cause(Cause.MSR),
    ),
    Rule(
        "instruction-not-in-this-mode",
        "The instruction does not exist in this mode",
        "LLDT, LTR, SLDT, STR, VERR, VERW and ARPL are undefined in real mode.",
        "SDM vol. 2, LTR",
        "Switch to protected mode first.",
        by_cause(Cause.NOT_IN_THIS_MODE),
    ),
)
