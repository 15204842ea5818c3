"""The structs of the KVM interface as ctypes classes, under the kernel's names.

Classes are found by attribute (`from kvmpy.abi.structs import kvm_irqfd`) or by name (`struct("kvm_irqfd")`). A ctypes
class takes about 50 microseconds to build, so each theme is a module of its own that is loaded when one of its structs
is first asked for.

Padding has explicit fields, named as in the kernel, or `_pad...` where C inserts it silently. A struct that ends in a
flexible array is declared without it, which is what the ioctl numbers encode; `sized(kvm_cpuid2, 100)` is the class
with room for 100 entries.
"""

import ctypes
from ctypes import c_uint64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import _CData
    from typing import TypeVar

    from kvmpy.abi.structs.confidential import *  # noqa: F403
    from kvmpy.abi.structs.cpuid_msr import *  # noqa: F403
    from kvmpy.abi.structs.guest_interfaces import *  # noqa: F403
    from kvmpy.abi.structs.interrupts import *  # noqa: F403
    from kvmpy.abi.structs.machine import *  # noqa: F403
    from kvmpy.abi.structs.machine_start import *  # noqa: F403
    from kvmpy.abi.structs.memory import *  # noqa: F403
    from kvmpy.abi.structs.nested import *  # noqa: F403
    from kvmpy.abi.structs.registers import *  # noqa: F403
    from kvmpy.abi.structs.run import *  # noqa: F403
    from kvmpy.abi.structs.vcpu import *  # noqa: F403
    from kvmpy.abi.structs.withdrawn import *  # noqa: F403

    _S = TypeVar("_S", bound=ctypes.Structure)

__all__ = ["MODULES", "Structure", "names", "sized", "struct"]


class Structure(ctypes.Structure):
    """A struct of the kernel. Its repr shows the fields, in hex from 10 on, without padding, unions and long arrays."""

    def __repr__(self) -> str:
        fields = [
            (entry[0], getattr(self, entry[0]))
            for kind in reversed(type(self).__mro__)
            for entry in kind.__dict__.get("_fields_", ())
        ]
        shown = [
            f"{name}={_shown(value)}" for name, value in fields if not name.strip("_").startswith(("pad", "reserved"))
        ]
        return f"<{type(self).__name__.strip('_')} {' '.join(shown)}>"


def _shown(value: object) -> str:
    if isinstance(value, int):
        return f"{value:#x}" if value > 9 else str(value)
    if isinstance(value, ctypes.Array):
        return f"[{' '.join(map(_shown, value))}]" if len(value) <= 16 else f"[{len(value)} entries]"
    return repr(value) if isinstance(value, Structure) else "..."


MODULES = {
    "registers": (
        "kvm_regs",
        "kvm_segment",
        "kvm_dtable",
        "kvm_sregs",
        "kvm_vcpu_events",
        "kvm_sync_regs",
        "kvm_userspace_memory_region",
    ),
    "run": (
        "kvm_debug_exit_arch",
        "kvm_hyperv_exit",
        "kvm_xen_exit",
        "kvm_run",
    ),
    "cpuid_msr": (
        "kvm_cpuid_entry",
        "kvm_cpuid",
        "kvm_cpuid_entry2",
        "kvm_cpuid2",
        "kvm_msr_entry",
        "kvm_msrs",
        "kvm_msr_list",
        "kvm_msr_filter_range",
        "kvm_msr_filter",
    ),
    "vcpu": (
        "kvm_sregs2",
        "kvm_fpu",
        "kvm_xsave",
        "kvm_xcr",
        "kvm_xcrs",
        "kvm_lapic_state",
        "kvm_interrupt",
        "kvm_signal_mask",
        "kvm_translation",
        "kvm_debugregs",
        "kvm_guest_debug_arch",
        "kvm_guest_debug",
        "kvm_tpr_access_ctl",
        "kvm_vapic_addr",
        "kvm_x86_mce",
        "kvm_one_reg",
        "kvm_reg_list",
    ),
    "nested": (
        "kvm_vmx_nested_state_data",
        "kvm_vmx_nested_state_hdr",
        "kvm_svm_nested_state_data",
        "kvm_svm_nested_state_hdr",
        "kvm_nested_state",
    ),
    "memory": (
        "kvm_userspace_memory_region2",
        "kvm_memory_attributes",
        "kvm_create_guest_memfd",
        "kvm_pre_fault_memory",
        "kvm_enc_region",
        "kvm_dirty_log",
        "kvm_clear_dirty_log",
        "kvm_dirty_gfn",
        "kvm_coalesced_mmio",
        "kvm_coalesced_mmio_ring",
    ),
    "interrupts": (
        "kvm_irq_level",
        "kvm_pic_state",
        "kvm_ioapic_state",
        "kvm_irqchip",
        "kvm_pit_channel_state",
        "kvm_pit_state",
        "kvm_pit_state2",
        "kvm_reinject_control",
        "kvm_irqfd",
        "kvm_ioeventfd",
        "kvm_msi",
        "kvm_irq_routing_irqchip",
        "kvm_irq_routing_msi",
        "kvm_irq_routing_s390_adapter",
        "kvm_irq_routing_hv_sint",
        "kvm_irq_routing_xen_evtchn",
        "kvm_irq_routing_entry",
        "kvm_irq_routing",
    ),
    "machine_start": (
        "kvm_pit_config",
        "kvm_mp_state",
        "kvm_coalesced_mmio_zone",
    ),
    "machine": (
        "kvm_enable_cap",
        "kvm_clock_data",
        "kvm_create_device",
        "kvm_device_attr",
        "kvm_vfio_spapr_tce",
        "kvm_pmu_event_filter",
        "kvm_stats_header",
        "kvm_stats_desc",
    ),
    "guest_interfaces": (
        "kvm_hyperv_eventfd",
        "kvm_xen_hvm_config",
        "kvm_xen_hvm_attr",
        "kvm_xen_vcpu_attr",
    ),
    "confidential": (
        "kvm_sev_cmd",
        "kvm_sev_init",
        "kvm_sev_launch_start",
        "kvm_sev_launch_update_data",
        "kvm_sev_launch_secret",
        "kvm_sev_launch_measure",
        "kvm_sev_guest_status",
        "kvm_sev_dbg",
        "kvm_sev_attestation_report",
        "kvm_sev_send_start",
        "kvm_sev_send_update_data",
        "kvm_sev_receive_start",
        "kvm_sev_receive_update_data",
        "kvm_sev_snp_launch_start",
        "kvm_sev_snp_launch_update",
        "kvm_sev_snp_launch_finish",
        "kvm_tdx_cmd",
        "kvm_tdx_capabilities",
        "kvm_tdx_init_vm",
        "kvm_tdx_init_mem_region",
    ),
    "withdrawn": (
        "kvm_memory_region",
        "kvm_memory_alias",
        "kvm_user_trace_setup",
        "kvm_breakpoint",
        "kvm_debug_guest",
        "kvm_assigned_pci_dev",
        "kvm_assigned_irq",
        "kvm_assigned_msix_nr",
        "kvm_assigned_msix_entry",
    ),
}
"""Which module of this package holds which structs."""

_FOUND: "dict[str, type[_CData]]" = {"__u64": c_uint64, "unsigned long": c_uint64}
"""C types that were asked for, the plain ones from the start."""

_WHERE = {name: module for module, members in MODULES.items() for name in members}
_SIZED: "dict[tuple[type, int], type]" = {}


def names() -> tuple[str, ...]:
    """All struct names, grouped by theme."""
    return tuple(_WHERE)


def struct(name: str) -> "type[_CData]":
    """The ctypes class of the C type `name`, a KVM struct or "__u64". Raises KeyError for a name that is none."""
    found = _FOUND.get(name)
    if found is None:
        module = __import__(f"{__name__}.{_WHERE[name]}", fromlist=[name])
        found = getattr(module, name)
        globals()[name] = _FOUND[name] = found  # the next attribute access does not come here
    return found


def __getattr__(name: str) -> "type[_CData]":
    try:
        return struct(name)
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})


def sized(base: "type[_S]", entries: int) -> "type[_S]":
    """`base` with its flexible array, `entries` long; the same class for the same arguments.

    `base._flexible_` names the array and its element type. Raises TypeError when `base` has no flexible array and
    ValueError when `entries` is negative.
    """
    key = (base, entries)
    found = _SIZED.get(key)
    if found is None:
        flexible = getattr(base, "_flexible_", None)
        if flexible is None:
            raise TypeError(f"{base.__name__} has no flexible array")
        if entries < 0:
            raise ValueError(f"an array cannot have {entries} entries")
        array, element = flexible
        found = type(f"{base.__name__}[{entries}]", (base,), {"_fields_": [(array, element * entries)]})
        _SIZED[key] = found
    return found
