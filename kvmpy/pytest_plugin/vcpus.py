"""The fixture `kvm_vcpu`: a vCPU and some RAM, whose runs end with the test's time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmpy.exits import Exit, Interrupted
from kvmpy.kvm import Kvm, Vcpu

if TYPE_CHECKING:
    from kvmpy.pytest_plugin.guests import Guests

__all__ = ["ENTRY", "RAM", "bare_vcpu"]

RAM = 1 << 20
"""Bytes, from address 0."""
ENTRY = 0x1000
"""The first instruction; the stack grows down from there."""


@contextmanager
def bare_vcpu(guests: Guests) -> Iterator[Vcpu]:
    """A vCPU about to run what is at `ENTRY` in real mode, in a VM of its own."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=RAM)
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(kvm.supported_cpuid())
        vcpu.set_real_mode(entry=ENTRY)

        def run(timeout: float | None = None) -> Exit:
            __tracebackhide__ = True
            limit, cut = guests.deadline.shorten(timeout)
            event = Vcpu.run(vcpu, limit)
            if cut and isinstance(event, Interrupted) and event.timed_out:
                guests.deadline.fail()
            return event

        # In this one object, so that exits() is limited, too; taken back below, for it makes a circle.
        vcpu.run = run  # type: ignore[method-assign]
        guests.add_vcpu(vcpu)
        try:
            yield vcpu
        finally:
            del vcpu.run
