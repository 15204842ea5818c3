"""Guests that wait for ever: HLT, interrupts that never come, missing EOI (SDM vol. 3, 6.8 and 10.8)."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.findings.finding import Rule, Suspicion, cause, possible, remark
from kvmpy.x86.flags import Rflags

__all__ = ["RULES", "waits_in_hlt"]

_HLT = 0xF4


def waits_in_hlt(case: Case) -> bool:
    """Whether the guest stands in HLT or goes round a loop with one."""
    return case.halted or any(located.decoded.opcode == _HLT for located in case.loop)


def _interrupts_on(case: Case) -> bool:
    return bool(case.regs.rflags & Rflags.IF)


def _halted_for_ever(case: Case) -> Suspicion | None:
    if not case.halted or _interrupts_on(case):
        return None
    return cause(
        f"HLT was executed with RFLAGS.IF=0 before {case.describe(case.rip)}: only an NMI, INIT or reset could wake "
        "the processor"
    )


def _eoi_missing(case: Case) -> Suspicion | None:
    controllers = case.evidence.controllers
    if controllers is None or not _interrupts_on(case) or not case.timed_out:
        return None
    vectors = controllers.pic_vectors_in_service
    apic = controllers.apic.in_service if controllers.apic is not None else ()
    if not vectors and not apic:
        return None
    if vectors:
        text = f"the PIC has vector {', '.join(f'{vector:#04x}' for vector in vectors)} in service"
    else:
        text = f"the local APIC has vector {', '.join(f'{vector:#04x}' for vector in apic)} in service"
    text = (
        f"{text[:1].upper()}{text[1:]}, although no handler runs (interrupts are on at {case.describe(case.rip)}): "
        "interrupts of the same or lower priority are held back for ever"
    )
    return cause(text) if waits_in_hlt(case) else possible(text)


def _no_interrupt_comes(case: Case) -> Suspicion | None:
    if not case.timed_out or not waits_in_hlt(case) or not _interrupts_on(case):
        return None
    controllers = case.evidence.controllers
    if controllers is None:
        return cause("The guest waits in HLT, and this machine has no interrupt controllers")
    if controllers.pic_vectors_in_service or (controllers.apic is not None and controllers.apic.in_service):
        return None
    sources = []
    if controllers.pics:
        masks = "/".join(f"{pic.masked:#04x}" for pic in controllers.pics)
        sources.append(f"PIC masks {masks}")
        sources.append(f"IOAPIC pins unmasked: {', '.join(str(pin) for pin, _ in controllers.ioapic) or 'none'}")
        sources.append(f"PIT {'programmed' if controllers.pit_programmed else 'never programmed'}")
    if controllers.apic is not None:
        apic = controllers.apic
        sources.append(f"local APIC timer {'masked' if apic.timer_masked else 'on'}, APIC {_switched(apic.enabled)}")
    return cause(f"The guest waits in HLT with interrupts on, and none comes: {'; '.join(sources)}")


def _switched(on: bool) -> str:
    return "on" if on else "off"


def _interrupts_off_in_loop(case: Case) -> Suspicion | None:
    controllers = case.evidence.controllers
    if not case.timed_out or case.halted or _interrupts_on(case) or controllers is None:
        return None
    waiting = [vector for vector in controllers.vectors if vector not in controllers.pic_vectors_in_service]
    if not waiting:
        return None
    return remark(f"Interrupts are off (RFLAGS.IF=0), while vector {waiting[0]:#04x} waits")


RULES = (
    Rule(
        "halt-with-interrupts-off",
        "HLT with interrupts off",
        "HLT stops the processor until an interrupt comes; with RFLAGS.IF=0 none is taken.",
        "SDM vol. 2, HLT; vol. 3, 6.8.1",
        "If the guest shall wait, execute STI right before HLT. If this is its end, all is well.",
        _halted_for_ever,
    ),
    Rule(
        "eoi-missing",
        "A handler did not send EOI",
        "An interrupt stays in service, and blocks its own and lower priorities, until the handler writes EOI: 0x20 to "
        "port 0x20 (and to 0xA0 for IRQ 8 to 15), or 0 to the local APIC at offset 0xB0.",
        "Intel 8259A data sheet, EOI; SDM vol. 3, 10.8.5",
        "Send EOI at the end of every handler of a hardware interrupt.",
        _eoi_missing,
    ),
    Rule(
        "no-interrupt-comes",
        "The guest waits for an interrupt that nothing sends",
        "HLT with interrupts on waits until a source that is programmed and not masked raises one.",
        "SDM vol. 2, HLT",
        "Program the timer or device, unmask its line (PIC port 0x21/0xA1, IOAPIC entry, LVT), and check its vector.",
        _no_interrupt_comes,
    ),
    Rule(
        "interrupts-off",
        "Interrupts are off for a long time",
        "With RFLAGS.IF=0 no maskable interrupt is delivered.",
        "SDM vol. 3, 6.8.1",
        "If the loop waits for an interrupt handler to change something, execute STI before.",
        _interrupts_off_in_loop,
    ),
)
