"""Everything that makes up one processor, taken from a vCPU and given to another one, in the order KVM wants.

Order of a restore: CPUID (it decides which bits and MSRs exist), MP state, general and system registers, XCRs before
the XSAVE area that they size, debug registers, local APIC, MSRs with the TSC before TSC_DEADLINE (which is measured by
it), and events last, because setting registers drops pending ones (KVM API, section 4.32).
"""

import errno

from kvmpy.errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmpy._exit import Exit
    from kvmpy.kvm.vcpu import Vcpu
    from kvmpy.x86.cpuid import CpuidTable
    from kvmpy.x86.registers import Registers, SystemRegisters

__all__ = ["FullState"]

_TSC, _TSC_DEADLINE = 0x10, 0x6E0


class FullState:
    """The state of one vCPU as plain values that compare, copy and pickle, and know nothing of the VM they came from.

    `xcrs`, `xsave`, `debug_registers`, `lapic` and `events` are the kernel's structures as bytes, `xcrs` and `lapic`
    None where the host or the VM has none. `msrs` holds those of `Kvm.msr_indices()` that can be read, by index.
    """

    __slots__ = (
        "cpuid", "debug_registers", "events", "lapic", "mp_state", "msrs", "regs", "sregs", "xcrs", "xsave",
    )  # fmt: skip

    def __init__(
        self,
        *,
        cpuid: "CpuidTable",
        mp_state: int,
        regs: "Registers",
        sregs: "SystemRegisters",
        xcrs: bytes | None,
        xsave: bytes,
        debug_registers: bytes,
        lapic: bytes | None,
        msrs: dict[int, int],
        events: bytes,
    ) -> None:
        self.cpuid = cpuid
        self.mp_state = mp_state
        self.regs = regs
        self.sregs = sregs
        self.xcrs = xcrs
        self.xsave = xsave
        self.debug_registers = debug_registers
        self.lapic = lapic
        self.msrs = msrs
        self.events = events

    def __eq__(self, other: object) -> bool:
        return not self.differences(other) if isinstance(other, FullState) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def capture(cls, vcpu: "Vcpu", handle: "Callable[[Exit], object] | None" = None) -> "FullState":
        """The state of `vcpu` now, between two instructions.

        A pending access is completed first: answer the last exit before, and give `handle` for the exits that may still
        come (the rest of a wide access), see `Vcpu.settle`. Nothing else of the vCPU changes.
        """
        vcpu.settle(handle)
        return cls(
            cpuid=vcpu.get_cpuid(),
            mp_state=vcpu.get_mp_state(),
            regs=vcpu.regs.copy(),
            sregs=vcpu.sregs.copy(),
            xcrs=_xcrs(vcpu),
            xsave=vcpu.get_xsave(),
            debug_registers=bytes(vcpu.get_debug_registers()),
            lapic=bytes(vcpu.get_lapic()) if vcpu.vm.irqchip else None,
            msrs=_readable_msrs(vcpu, vcpu.vm.kvm.msr_indices()),
            events=bytes(vcpu.get_events()),
        )

    def apply(self, vcpu: "Vcpu") -> None:
        """Give `vcpu` this state. Its VM has the same memory and the same kind of interrupt controller.

        A vCPU that has run keeps its CPUID, which KVM does not let change: it must have the same one.
        """
        from kvmpy.abi.structs import kvm_debugregs, kvm_lapic_state, kvm_vcpu_events, kvm_xcrs

        vcpu.settle()
        if _as_set(vcpu.get_cpuid()) != _as_set(self.cpuid):
            vcpu.set_cpuid(self.cpuid)
        vcpu.set_mp_state(self.mp_state)
        vcpu.regs.assign(self.regs)
        vcpu.sregs.assign(self.sregs)
        if self.xcrs is not None:
            vcpu.set_xcrs(kvm_xcrs.from_buffer_copy(self.xcrs))
        vcpu.set_xsave(self.xsave)
        vcpu.set_debug_registers(kvm_debugregs.from_buffer_copy(self.debug_registers))
        if self.lapic is not None:
            vcpu.set_lapic(kvm_lapic_state.from_buffer_copy(self.lapic))
        _restore_msrs(vcpu, [(index, self.msrs[index]) for index in sorted(self.msrs, key=_restore_rank)])
        vcpu.set_events(kvm_vcpu_events.from_buffer_copy(self.events))

    def differences(self, other: "FullState") -> list[str]:
        """The names of the fields that differ; MSRs as `msrs[0x10]`. The TSC differs unless time stood still."""
        names = [name for name in self.__slots__ if name != "msrs" and getattr(self, name) != getattr(other, name)]
        here, there = self.msrs, other.msrs
        changed = sorted(index for index in here.keys() | there.keys() if here.get(index) != there.get(index))
        return names + [f"msrs[{index:#x}]" for index in changed]


_KEPT_BY_KVM = {
    (0x1, 0): {"ecx": 1 << 27 | 1 << 3, "edx": 1 << 9},  # OSXSAVE (CR4), MWAIT (MISC_ENABLE), APIC (APIC base)
    (0x7, 0): {"ecx": 1 << 4},  # OSPKE (CR4)
    (0xD, 0): {"ebx": 0xFFFF_FFFF},  # size of the area for the features in XCR0
    (0xD, 1): {"ebx": 0xFFFF_FFFF},
}
"""CPUID bits that KVM keeps in step with registers (Linux arch/x86/kvm/cpuid.c, kvm_update_cpuid_runtime)."""


def _as_set(table: "CpuidTable") -> "CpuidTable":
    """A CPUID table without what follows from other registers."""
    from kvmpy._value import replace

    table = table.copy()
    for (function, index), registers in _KEPT_BY_KVM.items():
        entry = table.find(function, index)
        if entry is not None:
            kept = {name: getattr(entry, name) & ~bits for name, bits in registers.items()}
            table.put(replace(entry, **kept))
    return table


def _restore_rank(index: int) -> int:
    return {_TSC: 0, _TSC_DEADLINE: 2}.get(index, 1)


def _restore_msrs(vcpu: "Vcpu", values: list[tuple[int, int]]) -> None:
    """Set MSRs. One that KVM does not let user space write may be skipped if it has its value already."""
    while (done := vcpu.set_msrs_until_refused(values)) < len(values):
        index, value = values[done]
        if vcpu.get_msr(index) != value:
            vcpu.set_msr(index, value)  # refused again, with the error that says which
        values = values[done + 1 :]


def _xcrs(vcpu: "Vcpu") -> bytes | None:
    from kvmpy.abi.capabilities import Cap

    return bytes(vcpu.get_xcrs()) if vcpu.vm.check_extension(Cap.XCRS) else None


def _readable_msrs(vcpu: "Vcpu", indices: "Iterable[int]") -> dict[int, int]:
    """All MSRs that can be read: in one go, or one by one around those that cannot."""
    wanted = list(indices)
    try:
        return vcpu.get_msrs(wanted)
    except KvmError as error:
        if error.errno != errno.EINVAL:
            raise
    values = {}
    for index in wanted:
        try:
            values[index] = vcpu.get_msr(index)
        except KvmError as error:
            if error.errno != errno.EINVAL:
                raise
    return values
