"""What a failure looks like. Its name keeps this file out of the default run; to see it:

    pytest examples/kernel_tests/broken_kernel.py

One test in the guest has a wrong expectation. The next one loads an interrupt table that is too short and then faults:
the processor finds no gate, then none for the fault that this is, and shuts down (a triple fault). The report shows
the console up to there, and how the guest died.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpy.pytest_plugin import KvmBoot, KvmGuestC, KvmTap


def test_a_kernel_with_mistakes(kvm_guest_c: KvmGuestC, kvm_boot: KvmBoot, kvm_tap: KvmTap) -> None:
    result = kvm_boot(kvm_guest_c("kernel/interrupts.c", "kernel/entries.S", "guest_tests/broken_interrupts.c"))
    kvm_tap(result)
    assert result.exit_code == 0
