"""Small guests that find out what this host can do, and the kicks that come while they run."""

from __future__ import annotations

from kvmpy.exits import Exit, Interrupted
from kvmpy.kvm.vcpu import Vcpu

__all__ = ["first_exit"]


def first_exit(vcpu: Vcpu, seconds: float) -> Exit:
    """Run the guest up to its first exit, or until it has run for so long.

    Such a guest is asked for while another one runs in the same thread, whose kick it may get: that is no answer.
    """
    while (event := vcpu.run(seconds)) == Interrupted(False):
        pass
    return event
