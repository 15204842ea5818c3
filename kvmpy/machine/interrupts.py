"""KVM's in-kernel controllers: where they answer, and interrupt lines that lead to them."""

import threading

from kvmpy.devices.device import Region
from kvmpy.errors import OverlapError
from kvmpy.kvm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    LevelObserver = Callable[[int, int], None]

__all__ = ["InterruptPin", "KvmInterruptLine", "check_not_in_kernel"]

_IN_KERNEL = tuple(
    Region(kind, start, length, f"KVM's {name}", None, None)
    for kind, start, length, name in (
        ("port", 0x20, 2, "PIC"),
        ("port", 0xA0, 2, "PIC"),
        ("port", 0x4D0, 2, "PIC"),
        ("port", 0x40, 4, "PIT"),
        ("port", 0x61, 1, "PIT"),
        ("mmio", 0xFEC0_0000, 0x100, "IOAPIC"),
        ("mmio", 0xFEE0_0000, 0x1000, "local APIC"),
    )
)
"""What a machine with irqchip answers inside the kernel (KVM API, sections 4.24 and 4.71): it never becomes an exit."""


def check_not_in_kernel(region: Region) -> None:
    """Raise OverlapError for a region whose handlers would never be called, because KVM answers there by itself."""
    for owner in _IN_KERNEL:
        if region.kind == owner.kind and region.overlaps(owner):
            raise OverlapError(repr(region), f"{owner!r}; Machine(irqchip=False) has none")


class InterruptPin:
    """One input of the in-kernel PIC and IOAPIC (KVM_IRQ_LINE, KVM API 4.25): high while any line to it is high."""

    __slots__ = ("_vm", "gsi", "lock", "observer", "raised")

    def __init__(self, vm: Vm, gsi: int, observer: "LevelObserver | None" = None) -> None:
        self._vm = vm
        self.gsi = gsi
        self.observer = observer
        """Told of every new level, with the GSI before it."""
        self.lock = threading.Lock()
        self.raised = 0
        """How many lines hold it high."""

    def drive(self, change: int) -> None:
        """One line more (1) or one less (-1) is high. With `lock` held."""
        before = self.raised
        # First here, then in KVM: the guest's handler may run, and lower the line from another thread, before the
        # ioctl that raised it has returned. It must find the new level and wait, not see "low already".
        self.raised = before + change
        if bool(before) != bool(self.raised):
            try:
                self._vm.set_irq_line(self.gsi, int(self.raised > 0))
            except BaseException:
                self.raised = before
                raise
            if (observer := self.observer) is not None:
                observer(self.gsi, int(self.raised > 0))

    def again(self) -> None:
        """Another edge, if it is high."""
        with self.lock:
            if self.raised:
                self._vm.set_irq_line(self.gsi, 0)
                self._vm.set_irq_line(self.gsi, 1)


class KvmInterruptLine:
    """One device's wire to a pin: a level that stays until it is lowered.

    Raising a line that is high, or lowering one that is low, costs no ioctl.
    """

    __slots__ = ("_pin", "level")

    def __init__(self, pin: InterruptPin) -> None:
        self._pin = pin
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
        with self._pin.lock:
            before = self.level
            if before == level:
                return
            self.level = level
            try:
                self._pin.drive(1 if level else -1)
            except BaseException:
                self.level = before
                raise
