"""What CPUID answers in a machine's guest, and which model-specific registers begin with another value than KVM's.

The template says what the processors are (`kvmpy.x86.cpu_templates`); the machine says how many there are, whether they
have local APICs, how fast their clocks are, and what of KVM's services works on this host.
"""

import errno
import functools
from ctypes import sizeof

from kvmpy.abi.structs import kvm_cpuid2, sized
from kvmpy.errors import KvmError
from kvmpy.kvm import Kvm, Vcpu
from kvmpy.x86.cpuid_leaves import ENTRY_SIZE, CpuidLeaves
from kvmpy.x86.cpuid_platform import (
    describe_clocks,
    has_hypercall_features,
    hide_hypercall_features,
    set_local_apic,
)
from kvmpy.x86.cpuid_topology import describe_processors, stamp_apic_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kvmpy.x86.cpu_templates import CpuTemplate
    from kvmpy.x86.cpuid import CpuidTable

    Cpu = str | CpuTemplate | Mapping[str, Any] | CpuidTable

__all__ = ["CpuModel"]

_CAP_TSC_DEADLINE_TIMER = 72
_APIC_KHZ = 1_000_000
"""The timer of KVM's local APIC counts nanoseconds, unless KVM_CAP_X86_APIC_BUS_CYCLES_NS says otherwise."""

_host: "list[tuple[bytes, bool, int]]" = []
"""The host's own table, whether it has the TSC deadline timer, and the TSC's kHz: asked once in a process, 300 us."""


class CpuModel:
    """The processors of one machine, all alike. Raises UsageError for what is neither template nor table."""

    def __init__(self, cpu: "Cpu") -> None:
        self.template: CpuTemplate | None = None
        """None: all that the host supports."""
        self.table: CpuidTable | None = None
        """What CPUID answers but for APIC ids, when the caller says it all."""
        self.msrs: dict[int, int] = {}
        """MSRs that begin with another value than KVM's."""
        if isinstance(cpu, str) and cpu == "host":
            return
        from kvmpy.x86 import cpuid

        if isinstance(cpu, cpuid.CpuidTable):
            self.table = cpu
            return
        from kvmpy.x86.cpu_templates import HOST, cpu_template

        template = cpu_template(cpu)
        self.template = None if template == HOST else template
        self.msrs = dict(template.msrs)

    def set_up(self, vcpu: Vcpu, count: int, irqchip: bool) -> None:
        """Give a vCPU, one of `count`, its CPUID and MSRs. KvmError for an MSR that KVM refuses."""
        vcpu.ioctl("KVM_SET_CPUID2", self._cpuid(vcpu, count, irqchip))
        if self.msrs:
            vcpu.set_msrs(self.msrs)

    def _cpuid(self, vcpu: Vcpu, count: int, irqchip: bool) -> "kvm_cpuid2":
        if self.table is not None:
            return _stamped(self.table, vcpu.id)
        supported, tsc_deadline, tsc_khz = _host[0] if _host else _ask_host(vcpu)
        hypercalls = count > 1 and _hypercalls_wanted_and_returning(vcpu.vm.kvm, supported, self.template, irqchip)
        return _tables(supported, self.template, count, irqchip, tsc_deadline, tsc_khz, hypercalls)[vcpu.id]


def _stamped(table: "CpuidTable", apic_id: int) -> "kvm_cpuid2":
    leaves = CpuidLeaves((e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in table)
    stamp_apic_id(leaves, apic_id)
    return _to_struct(leaves.pack(zeros=True))


def _to_struct(entries: bytes) -> "kvm_cpuid2":
    count = len(entries) // ENTRY_SIZE
    header = bytes(kvm_cpuid2(nent=count))
    return sized(kvm_cpuid2, count).from_buffer_copy(header + entries)


def _leaves(
    supported: bytes, template: "CpuTemplate | None", count: int, irqchip: bool, tsc_deadline: bool
) -> CpuidLeaves:
    leaves = CpuidLeaves.unpack(supported)
    set_local_apic(leaves, irqchip, tsc_deadline)
    if template is not None:
        leaves = template.apply(leaves)
    describe_processors(leaves, count)
    return leaves


@functools.lru_cache(64)
def _hypercalls_wanted(supported: bytes, template: "CpuTemplate | None", irqchip: bool) -> tuple[bool, bool]:
    """Whether CPUID would ask a guest for hypercalls, and whether by AMD's instruction."""
    leaves = _leaves(supported, template, 2, irqchip, False)
    return has_hypercall_features(leaves), leaves.of_amd


def _hypercalls_wanted_and_returning(kvm: Kvm, supported: bytes, template: "CpuTemplate | None", irqchip: bool) -> bool:
    """The features are about other processors: a machine with one never gets here, and needs no probe."""
    wanted, of_amd = _hypercalls_wanted(supported, template, irqchip)
    if not wanted:
        return False
    from kvmpy.machine.hypercall_probe import hypercalls_return

    return hypercalls_return(kvm, of_amd)


@functools.lru_cache(64)
def _tables(
    supported: bytes, template: "CpuTemplate | None", count: int, irqchip: bool, tsc_deadline: bool, tsc_khz: int,
    hypercalls: bool,
) -> "tuple[kvm_cpuid2, ...]":  # fmt: skip
    """The tables of a machine's processors. They only differ in the APIC id; nobody changes them."""
    leaves = _leaves(supported, template, count, irqchip, tsc_deadline)
    describe_clocks(leaves, tsc_khz, _APIC_KHZ if irqchip else 0)
    if not hypercalls:
        hide_hypercall_features(leaves)
    tables = []
    for apic_id in range(count):
        stamp_apic_id(leaves, apic_id)
        tables.append(_to_struct(leaves.pack()))
    return tuple(tables)


def _ask_host(vcpu: Vcpu) -> tuple[bytes, bool, int]:
    kvm = vcpu.vm.kvm
    try:
        tsc_khz = vcpu.get_tsc_khz()
    except KvmError:  # EIO: the host's TSC does not keep its rate
        tsc_khz = 0
    _host.append((_supported(kvm), kvm.check_extension(_CAP_TSC_DEADLINE_TIMER) > 0, tsc_khz))
    return _host[0]


def _supported(kvm: Kvm) -> bytes:
    room = 128
    while True:
        table = sized(kvm_cpuid2, room)(nent=room)
        try:
            kvm.ioctl("KVM_GET_SUPPORTED_CPUID", table)
        except KvmError as error:
            if error.errno != errno.E2BIG or room > 1 << 14:
                raise
            room *= 2
            continue
        header = sizeof(kvm_cpuid2)
        return bytes(table)[header : header + table.nent * ENTRY_SIZE]
