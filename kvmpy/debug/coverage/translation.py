"""From linear to guest-physical addresses, quickly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.x86.flags import Cr0

if TYPE_CHECKING:
    from kvmpy.kvm import Vcpu

__all__ = ["physical_address"]

_PG = int(Cr0.PG)
"""A plain number: `&` with a flag costs half a microsecond."""


def physical_address(vcpu: Vcpu, linear: int) -> int | None:
    """Where a linear address leads, or None. KVM's own walk of the page tables costs a third of one in Python."""
    if not vcpu.sregs.cr0 & _PG:
        return linear
    translation = vcpu.translate(linear & 0xFFFF_FFFF_FFFF_FFFF)
    return int(translation.physical_address) if translation.valid else None
