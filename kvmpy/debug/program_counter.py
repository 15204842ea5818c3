"""Where a processor is, as a linear address."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu

__all__ = ["linear_pc"]


def linear_pc(vcpu: Vcpu) -> int:
    """The linear address of the next instruction: RIP, plus the base of CS outside 64-bit mode (SDM vol. 1, 3.3.4)."""
    cs = vcpu.sregs.cs
    rip: int = vcpu.regs.rip
    return rip if cs.l else (cs.base + rip) & 0xFFFF_FFFF
