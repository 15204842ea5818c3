# ruff: noqa: N801  these classes carry the kernel's names
"""Interrupt controllers and timers in the kernel, routes to them, and eventfds that raise or report."""

from ctypes import Union, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64

from kvmpy.abi.structs import Structure

__all__ = [
    "kvm_ioapic_state",
    "kvm_ioeventfd",
    "kvm_irq_level",
    "kvm_irq_routing",
    "kvm_irq_routing_entry",
    "kvm_irq_routing_hv_sint",
    "kvm_irq_routing_irqchip",
    "kvm_irq_routing_msi",
    "kvm_irq_routing_s390_adapter",
    "kvm_irq_routing_xen_evtchn",
    "kvm_irqchip",
    "kvm_irqfd",
    "kvm_msi",
    "kvm_pic_state",
    "kvm_pit_channel_state",
    "kvm_pit_state",
    "kvm_pit_state2",
    "kvm_reinject_control",
]


class _irq_or_status(Union):
    _fields_ = [("irq", c_uint32), ("status", c_int32)]


class kvm_irq_level(Structure):
    """Drives input `irq` to `level` 0 or 1; KVM_IRQ_LINE_STATUS answers in `status` (KVM_IRQ_LINE, 4.25)."""

    _anonymous_ = ("_u",)
    _fields_ = [("_u", _irq_or_status), ("level", c_uint32)]


class kvm_pic_state(Structure):
    """One of the two 8259A (in kvm_irqchip, 4.26)."""

    _fields_ = [
        ("last_irr", c_uint8),
        ("irr", c_uint8),
        ("imr", c_uint8),
        ("isr", c_uint8),
        ("priority_add", c_uint8),
        ("irq_base", c_uint8),
        ("read_reg_select", c_uint8),
        ("poll", c_uint8),
        ("special_mask", c_uint8),
        ("init_state", c_uint8),
        ("auto_eoi", c_uint8),
        ("rotate_on_auto_eoi", c_uint8),
        ("special_fully_nested_mode", c_uint8),
        ("init4", c_uint8),
        ("elcr", c_uint8),
        ("elcr_mask", c_uint8),
    ]


class _redirect_fields(Structure):
    _fields_ = [
        ("vector", c_uint8),
        ("delivery_mode", c_uint8, 3),
        ("dest_mode", c_uint8, 1),
        ("delivery_status", c_uint8, 1),
        ("polarity", c_uint8, 1),
        ("remote_irr", c_uint8, 1),
        ("trig_mode", c_uint8, 1),
        ("mask", c_uint8, 1),
        ("reserve", c_uint8, 7),
        ("reserved", c_uint8 * 4),
        ("dest_id", c_uint8),
    ]


class _redirect(Union):
    _fields_ = [("bits", c_uint64), ("fields", _redirect_fields)]


class kvm_ioapic_state(Structure):
    """The I/O APIC with its 24 pins (in kvm_irqchip, 4.26)."""

    _fields_ = [
        ("base_address", c_uint64),
        ("ioregsel", c_uint32),
        ("id", c_uint32),
        ("irr", c_uint32),
        ("pad", c_uint32),
        ("redirtbl", _redirect * 24),
    ]


class _chip(Union):
    _fields_ = [("dummy", c_uint8 * 512), ("pic", kvm_pic_state), ("ioapic", kvm_ioapic_state)]


class kvm_irqchip(Structure):
    """State of the controller `chip_id`, KVM_IRQCHIP_* (KVM_GET_IRQCHIP, 4.26)."""

    _fields_ = [("chip_id", c_uint32), ("pad", c_uint32), ("chip", _chip)]


class kvm_pit_channel_state(Structure):
    """One counter of the 8254; `count_load_time` is the host's monotonic clock in ns (4.72)."""

    _fields_ = [
        ("count", c_uint32),
        ("latched_count", c_uint16),
        ("count_latched", c_uint8),
        ("status_latched", c_uint8),
        ("status", c_uint8),
        ("read_state", c_uint8),
        ("write_state", c_uint8),
        ("write_latch", c_uint8),
        ("rw_mode", c_uint8),
        ("mode", c_uint8),
        ("bcd", c_uint8),
        ("gate", c_uint8),
        ("count_load_time", c_int64),
    ]


class kvm_pit_state(Structure):
    """The three counters (KVM_GET_PIT); superseded by kvm_pit_state2."""

    _fields_ = [("channels", kvm_pit_channel_state * 3)]


class kvm_pit_state2(Structure):
    """The three counters and KVM_PIT_FLAGS_* (KVM_GET_PIT2, 4.72)."""

    _fields_ = [("channels", kvm_pit_channel_state * 3), ("flags", c_uint32), ("reserved", c_uint32 * 9)]


class kvm_reinject_control(Structure):
    """Whether missed ticks of the 8254 are made up for: `pit_reinject` 1 or 0 (KVM_REINJECT_CONTROL, 4.99)."""

    _fields_ = [("pit_reinject", c_uint8), ("reserved", c_uint8 * 31)]


class kvm_irqfd(Structure):
    """An eventfd that raises `gsi`, and one that reports its end (KVM_IRQFD, 4.75)."""

    _fields_ = [
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    ]


class kvm_ioeventfd(Structure):
    """An eventfd that a guest write signals; `len` 0, 1, 2, 4 or 8 bytes (KVM_IOEVENTFD, 4.59)."""

    _fields_ = [
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    ]


class kvm_msi(Structure):
    """A message-signalled interrupt to deliver now (KVM_SIGNAL_MSI, 4.71)."""

    _fields_ = [
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    ]


class kvm_irq_routing_irqchip(Structure):
    """A GSI that leads to a pin of KVM_IRQCHIP_* (4.52)."""

    _fields_ = [("irqchip", c_uint32), ("pin", c_uint32)]


class _pad_or_devid(Union):
    _fields_ = [("pad", c_uint32), ("devid", c_uint32)]


class kvm_irq_routing_msi(Structure):
    """A GSI that sends a message (4.52)."""

    _anonymous_ = ("_u",)
    _fields_ = [("address_lo", c_uint32), ("address_hi", c_uint32), ("data", c_uint32), ("_u", _pad_or_devid)]


class kvm_irq_routing_s390_adapter(Structure):
    """Not for x86; here because the union of kvm_irq_routing_entry has it (4.52)."""

    _fields_ = [
        ("ind_addr", c_uint64),
        ("summary_addr", c_uint64),
        ("ind_offset", c_uint64),
        ("summary_offset", c_uint32),
        ("adapter_id", c_uint32),
    ]


class kvm_irq_routing_hv_sint(Structure):
    """A GSI that leads to a Hyper-V synthetic interrupt of a vCPU (4.52)."""

    _fields_ = [("vcpu", c_uint32), ("sint", c_uint32)]


class kvm_irq_routing_xen_evtchn(Structure):
    """A GSI that leads to a Xen event channel (4.52; also KVM_XEN_HVM_EVTCHN_SEND)."""

    _fields_ = [("port", c_uint32), ("vcpu", c_uint32), ("priority", c_uint32)]


class _route(Union):
    _fields_ = [
        ("irqchip", kvm_irq_routing_irqchip),
        ("msi", kvm_irq_routing_msi),
        ("adapter", kvm_irq_routing_s390_adapter),
        ("hv_sint", kvm_irq_routing_hv_sint),
        ("xen_evtchn", kvm_irq_routing_xen_evtchn),
        ("pad", c_uint32 * 8),
    ]


class kvm_irq_routing_entry(Structure):
    """Where `gsi` leads; `type` is KVM_IRQ_ROUTING_* (4.52)."""

    _fields_ = [("gsi", c_uint32), ("type", c_uint32), ("flags", c_uint32), ("pad", c_uint32), ("u", _route)]


class kvm_irq_routing(Structure):
    """The whole table of `nr` routes, which replaces the old one (KVM_SET_GSI_ROUTING, 4.52)."""

    _fields_ = [("nr", c_uint32), ("flags", c_uint32)]
    _flexible_ = ("entries", kvm_irq_routing_entry)
