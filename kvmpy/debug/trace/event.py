"""What a trace tells: one value for each thing that happened."""

from __future__ import annotations

from kvmpy._value import field, frozen

__all__ = ["KINDS", "TraceEvent"]

KINDS = {
    "port": "a port was read or written",
    "mmio": "an address without memory was read or written",
    "irq": "a device raised or lowered its interrupt line",
    "msr": "an MSR access that KVM hands to user space",
    "hypercall": "KVM_EXIT_HYPERCALL",
    "hlt": "HLT, on a machine without irqchip",
    "shutdown": "a triple fault",
    "debug": "a breakpoint",
    "step": "an instruction was executed",
    "interrupted": "KVM_RUN was interrupted: a kick, a pause, a deadline, or the tick of kvmpy's own timer",
    "other": "any other exit",
}
"""The kinds of events."""


@frozen
class TraceEvent:
    """One event. Times are nanoseconds of a clock that only goes forward (CLOCK_MONOTONIC).

    `time` is when KVM came back from the guest, counted from the start of the trace. Before that the vCPU was inside
    KVM_RUN for `guest`, and after it the handler, a device's or kvmpy's own, took `duration`.
    """

    time: int
    guest: int
    duration: int
    vcpu: int | None
    """Its id. None for interrupt lines, which belong to no processor."""
    kind: str
    """One of KINDS."""
    name: str
    """What it was, in a few words: "out 0x3f8", "rdmsr 0x1b", "hlt"; of a step, the instruction."""
    direction: str | None = None
    """"read" or "write" of ports, memory and MSRs, "raise" or "lower" of interrupt lines."""
    address: int | None = None
    """The port, guest-physical address, MSR, hypercall number, interrupt input (GSI), or linear address of a step."""
    size: int | None = None
    """Bytes of one access, or of the instruction."""
    value: int | bytes | None = None
    """What was written, or what the device answered; bytes where one exit is a whole string (`rep outs`). Of a step,
    the bytes of the instruction."""
    device: str | None = None
    """Who answered; "nobody" where nobody claims the place."""
    queued: bool = False
    """Whether KVM had queued this write: it was no exit, and was handled with the next one."""
    text: str = ""
    """More about it: what a handler raised, the data of an exit, the symbol of a step."""
    registers: dict[str, int] = field(default_factory=dict)
    """Of a step: the registers that the instruction changed, with their new values."""

    def __str__(self) -> str:
        from kvmpy.debug.trace.text_form import event_line

        return event_line(self)
