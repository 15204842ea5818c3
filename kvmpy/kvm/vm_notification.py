"""Guest accesses that do not end KVM_RUN, and interrupts without an ioctl: eventfds and coalesced rings."""

from kvmpy.kvm.checked_struct import filled, fits
from kvmpy.kvm.descriptor import Descriptor

__all__ = ["VmNotification"]

_DATAMATCH, _PIO, _DEASSIGN = 1, 2, 4  # KVM_IOEVENTFD_FLAG_*
_IRQFD_DEASSIGN, _IRQFD_RESAMPLE = 1, 2  # KVM_IRQFD_FLAG_*


class VmNotification(Descriptor):
    """ioeventfd, irqfd and coalesced writes. Mixed into `Vm`."""

    def add_ioeventfd(
        self, eventfd: int, address: int, size: int = 0, *, port: bool = False, match: int | None = None
    ) -> None:
        """Have guest writes of `size` bytes at `address` signal an eventfd instead of exiting (section 4.59).

        `size` 0 takes every width (MMIO only); `match` takes only that value; `port` says that the address is a port.
        """
        self._ioeventfd(eventfd, address, size, port, match, 0)

    def remove_ioeventfd(
        self, eventfd: int, address: int, size: int = 0, *, port: bool = False, match: int | None = None
    ) -> None:
        """Undo `add_ioeventfd` with the same arguments."""
        self._ioeventfd(eventfd, address, size, port, match, _DEASSIGN)

    def _ioeventfd(self, eventfd: int, address: int, size: int, port: bool, match: int | None, flags: int) -> None:
        from kvmpy.abi.structs import kvm_ioeventfd

        if match is not None:
            fits("match", match, 8 * size if size in (1, 2, 4) else 64)
        flags |= (_PIO if port else 0) | (0 if match is None else _DATAMATCH)
        request = filled(kvm_ioeventfd, addr=address, len=size, fd=eventfd, flags=flags, datamatch=match or 0)
        self.ioctl("KVM_IOEVENTFD", request)

    def add_irqfd(self, eventfd: int, gsi: int, *, resample: int | None = None) -> None:
        """Have a write to `eventfd` raise interrupt `gsi` (KVM_IRQFD, section 4.75).

        With `resample`, another eventfd, the line is a level: high until the guest's EOI, which signals that one.
        """
        from kvmpy.abi.structs import kvm_irqfd

        request = filled(kvm_irqfd, fd=eventfd, gsi=gsi)
        if resample is not None:
            request.flags, request.resamplefd = _IRQFD_RESAMPLE, resample
        self.ioctl("KVM_IRQFD", request)

    def remove_irqfd(self, eventfd: int, gsi: int) -> None:
        """Undo `add_irqfd`."""
        from kvmpy.abi.structs import kvm_irqfd

        self.ioctl("KVM_IRQFD", filled(kvm_irqfd, fd=eventfd, gsi=gsi, flags=_IRQFD_DEASSIGN))

    def coalesce_writes(self, address: int, size: int, *, port: bool = False) -> None:
        """Queue guest writes to a range instead of exiting (KVM_REGISTER_COALESCED_MMIO, section 4.116).

        `kvmpy.kvm.coalesced_ring.CoalescedRing(vcpu)` reads the queue. A full queue is an ordinary exit.
        """
        self._coalesce("KVM_REGISTER_COALESCED_MMIO", address, size, port)

    def stop_coalescing_writes(self, address: int, size: int, *, port: bool = False) -> None:
        """Undo `coalesce_writes`."""
        self._coalesce("KVM_UNREGISTER_COALESCED_MMIO", address, size, port)

    def _coalesce(self, ioctl: str, address: int, size: int, port: bool) -> None:
        from kvmpy.abi.structs import kvm_coalesced_mmio_zone

        zone = filled(kvm_coalesced_mmio_zone, addr=address, size=size)
        zone.pio = port
        self.ioctl(ioctl, zone)
