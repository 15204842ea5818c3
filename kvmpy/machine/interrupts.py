"""Interrupt lines that lead to KVM's in-kernel controllers."""

import threading

from kvmpy.kvm import Vm

__all__ = ["KvmInterruptLine"]


class KvmInterruptLine:
    """One input of the in-kernel PIC and IOAPIC: a level that stays until it is lowered (KVM_IRQ_LINE, KVM API 4.25).

    Raising a line that is high, or lowering one that is low, costs no ioctl.
    """

    __slots__ = ("_lock", "_vm", "gsi", "level")

    def __init__(self, vm: Vm, gsi: int) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self.gsi = gsi
        self.level = 0

    def raise_line(self) -> None:
        """Drive the line high."""
        self._set(1)

    def lower_line(self) -> None:
        """Drive the line low."""
        self._set(0)

    def pulse(self) -> None:
        """High and low again: an edge."""
        self.raise_line()
        self.lower_line()

    def _set(self, level: int) -> None:
        if self.level == level:
            return
        with self._lock:
            before = self.level
            if before == level:
                return
            # First here, then in KVM: the guest's handler may run, and lower the line from another thread, before the
            # ioctl that raised it has returned. It must find the new level and wait, not see "low already".
            self.level = level
            try:
                self._vm.set_irq_line(self.gsi, level)
            except BaseException:
                self.level = before
                raise
