"""Interrupt controllers and timers inside KVM, and the lines that lead to them (KVM API, 4.24 to 4.27, 4.52, 4.70)."""

from kvmpy.errors import UsageError
from kvmpy.kvm.checked_struct import filled, fits
from kvmpy.kvm.descriptor import Descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from kvmpy.abi.structs.interrupts import kvm_irqchip, kvm_pit_state2
    from kvmpy.kvm.vcpu import Vcpu

__all__ = ["IrqchipRoute", "MsiRoute", "VmInterrupts"]


class IrqchipRoute:
    """GSI `gsi` leads to pin `pin` of `chip`: 0 the first PIC, 1 the second, 2 the IOAPIC (KVM_IRQCHIP_*)."""

    __slots__ = __match_args__ = ("gsi", "chip", "pin")

    def __init__(self, gsi: int, chip: int, pin: int) -> None:
        self.gsi = fits("gsi", gsi, 32)
        self.chip = fits("chip", chip, 32)
        self.pin = fits("pin", pin, 32)

    def __repr__(self) -> str:
        return f"IrqchipRoute(gsi={self.gsi}, chip={self.chip}, pin={self.pin})"


class MsiRoute:
    """GSI `gsi` sends the message `data` to `address` (SDM vol. 3, 10.11)."""

    __slots__ = __match_args__ = ("gsi", "address", "data")

    def __init__(self, gsi: int, address: int, data: int) -> None:
        self.gsi = fits("gsi", gsi, 32)
        self.address = fits("MSI address", address, 64)
        self.data = fits("MSI data", data, 32)

    def __repr__(self) -> str:
        return f"MsiRoute(gsi={self.gsi}, address={self.address:#x}, data={self.data:#x})"


class VmInterrupts(Descriptor):
    """Interrupt controllers of a VM. Mixed into `Vm`."""

    vcpus: "tuple[Vcpu, ...]"
    irqchip = ""
    """What is inside KVM: "" nothing, "full" PICs, IOAPIC and local APICs, "split" only local APICs."""

    # Controllers

    def create_irqchip(self) -> None:
        """Both PICs, the IOAPIC, and a local APIC for each vCPU to come (KVM_CREATE_IRQCHIP, section 4.24)."""
        self._before_vcpus("create_irqchip")
        self.ioctl("KVM_CREATE_IRQCHIP")
        self.irqchip = "full"

    def create_split_irqchip(self, ioapic_pins: int = 24) -> None:
        """Only local APICs; PIC and IOAPIC are the caller's, which learns of EOIs by `IoapicEoi` (section 7.5)."""
        from kvmpy.abi.capabilities import Cap
        from kvmpy.kvm.capability import enable_cap

        self._before_vcpus("create_split_irqchip")
        enable_cap(self, Cap.SPLIT_IRQCHIP, (ioapic_pins,), 0)
        self.irqchip = "split"

    def create_pit(self, *, speaker_port: bool = True) -> None:
        """The 8254 timer at ports 0x40 to 0x43, and port 0x61 with `speaker_port` (KVM_CREATE_PIT2, section 4.71)."""
        from kvmpy.abi.structs import kvm_pit_config

        self.ioctl("KVM_CREATE_PIT2", filled(kvm_pit_config, flags=1 if speaker_port else 0))

    def set_tss_address(self, address: int) -> None:
        """Three free pages below 4 GiB that VT-x without unrestricted guest needs (KVM_SET_TSS_ADDR, section 4.36)."""
        self.ioctl("KVM_SET_TSS_ADDR", address)

    def set_identity_map_address(self, address: int) -> None:
        """One free page below 4 GiB for VT-x without unrestricted guest (KVM_SET_IDENTITY_MAP_ADDR, section 4.42).

        Before the first vCPU.
        """
        import ctypes

        self._before_vcpus("set_identity_map_address")
        self.ioctl("KVM_SET_IDENTITY_MAP_ADDR", ctypes.c_uint64(fits("identity map address", address, 64)))

    def get_irqchip(self, chip: int) -> "kvm_irqchip":
        """State of a controller: 0 and 1 the PICs, 2 the IOAPIC (section 4.26)."""
        from kvmpy.abi.structs import kvm_irqchip

        state = filled(kvm_irqchip, chip_id=chip)
        self.ioctl("KVM_GET_IRQCHIP", state)
        return state

    def set_irqchip(self, state: "kvm_irqchip") -> None:
        """Set a controller's state (section 4.27)."""
        self.ioctl("KVM_SET_IRQCHIP", state)

    def get_pit(self) -> "kvm_pit_state2":
        """State of the 8254 (KVM_GET_PIT2, section 4.73)."""
        from kvmpy.abi.structs import kvm_pit_state2

        state = kvm_pit_state2()
        self.ioctl("KVM_GET_PIT2", state)
        return state

    def set_pit(self, state: "kvm_pit_state2") -> None:
        """Set the 8254's state (section 4.74)."""
        self.ioctl("KVM_SET_PIT2", state)

    # Lines and messages

    def set_irq_line(self, gsi: int, level: int) -> None:
        """Drive an interrupt line high (1) or low (0) (KVM_IRQ_LINE, section 4.25)."""
        from kvmpy.abi.structs import kvm_irq_level

        request = filled(kvm_irq_level, level=level)
        request.irq = fits("gsi", gsi, 32)
        self.ioctl("KVM_IRQ_LINE", request)

    def set_irq_line_status(self, gsi: int, level: int) -> int:
        """Drive an interrupt line, and say what became of it (KVM_IRQ_LINE_STATUS, section 4.25).

        1: delivered; 0: coalesced with one that waits; -1: masked.
        """
        from kvmpy.abi.structs import kvm_irq_level

        request = filled(kvm_irq_level, level=level)
        request.irq = fits("gsi", gsi, 32)
        self.ioctl("KVM_IRQ_LINE_STATUS", request)
        return int(request.status)

    def signal_msi(self, address: int, data: int) -> bool:
        """Send a message-signalled interrupt; False when the guest blocked it (KVM_SIGNAL_MSI, section 4.70)."""
        from kvmpy.abi.structs import kvm_msi

        message = filled(kvm_msi, address_lo=address & 0xFFFF_FFFF, address_hi=address >> 32, data=data)
        return self.ioctl("KVM_SIGNAL_MSI", message) > 0

    def set_gsi_routing(self, routes: "Iterable[IrqchipRoute | MsiRoute]") -> None:
        """Replace the whole table of what each GSI leads to (KVM_SET_GSI_ROUTING, section 4.52)."""
        from kvmpy.abi.structs import kvm_irq_routing, sized

        table = list(routes)
        request = sized(kvm_irq_routing, len(table))(nr=len(table))
        for slot, route in zip(request.entries, table, strict=True):
            slot.gsi = route.gsi
            self._fill_route(slot, route)
        self.ioctl("KVM_SET_GSI_ROUTING", request)

    @staticmethod
    def _fill_route(slot: "Any", route: IrqchipRoute | MsiRoute) -> None:
        if isinstance(route, IrqchipRoute):
            slot.type = 1  # KVM_IRQ_ROUTING_IRQCHIP
            slot.u.irqchip.irqchip, slot.u.irqchip.pin = route.chip, route.pin
        else:
            slot.type = 2  # KVM_IRQ_ROUTING_MSI
            slot.u.msi.address_lo, slot.u.msi.address_hi = route.address & 0xFFFF_FFFF, route.address >> 32
            slot.u.msi.data = route.data

    def _before_vcpus(self, what: str) -> None:
        if self.vcpus:
            raise UsageError(f"{what}() must come before the first create_vcpu()")
