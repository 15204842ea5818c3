"""The state of a vCPU beyond its general and system registers: one get and set method per ioctl (KVM API, chapter 4).

Structures are the kernel's, as ctypes classes from `kvmpy.abi.structs`: get one, change a field, set it.
"""

import errno

from kvmpy.errors import ClosedError, KvmError, UsageError
from kvmpy.kvm.checked_struct import filled, fits
from kvmpy.kvm.descriptor import Descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from kvmpy.abi.structs.registers import kvm_vcpu_events
    from kvmpy.abi.structs.vcpu import (
        kvm_debugregs,
        kvm_fpu,
        kvm_lapic_state,
        kvm_sregs2,
        kvm_translation,
        kvm_xcrs,
    )
    from kvmpy.kvm.run_page import RunPage
    from kvmpy.kvm.statistics import Statistics
    from kvmpy.kvm.vm import Vm
    from kvmpy.x86.cpuid import CpuidTable

__all__ = ["VcpuState"]

_MSRS_AT_ONCE = 255  # MAX_IO_MSRS is 256, and KVM answers E2BIG from there on


class VcpuState(Descriptor):
    """The get and set ioctls of a vCPU. Mixed into `Vcpu`."""

    _vm: "Vm | None" = None
    id: int
    page: "RunPage"

    @property
    def vm(self) -> "Vm":
        """The VM that this vCPU belongs to. Raises ClosedError after close."""
        vm = self._vm
        if vm is None:
            raise ClosedError(f"{self!r} was used after it was closed")
        return vm

    def _get(self, ioctl: str) -> "Any":
        """Call an ioctl that fills a structure, and answer the structure."""
        from kvmpy.abi.ioctls import IOCTLS

        kind = IOCTLS[ioctl].argument_type
        if kind is None:
            raise UsageError(f"{ioctl} fills no structure")
        structure = kind()
        self.ioctl(ioctl, structure)
        return structure

    # Processor state

    def get_sregs2(self) -> "kvm_sregs2":
        """System registers with the PDPTEs (section 4.131); needs KVM_CAP_SREGS2."""
        return self._get("KVM_GET_SREGS2")  # type: ignore[no-any-return]

    def set_sregs2(self, sregs: "kvm_sregs2") -> None:
        """The counterpart of `get_sregs2`."""
        self.ioctl("KVM_SET_SREGS2", sregs)

    def get_fpu(self) -> "kvm_fpu":
        """x87 and SSE state in FXSAVE form (section 4.22)."""
        return self._get("KVM_GET_FPU")  # type: ignore[no-any-return]

    def set_fpu(self, fpu: "kvm_fpu") -> None:
        """Set x87 and SSE state (section 4.23).

        Some hosts ignore it before the guest has used SSE (XSTATE_BV is 0 then): `set_xsave` with XSTATE_BV bits 0
        and 1 set always takes effect.
        """
        self.ioctl("KVM_SET_FPU", fpu)

    def get_xsave(self) -> bytes:
        """The XSAVE area (sections 4.42 and 4.134): 4096 bytes, or more where dynamic features such as AMX need it."""
        from kvmpy.abi.capabilities import Cap
        from kvmpy.abi.structs import kvm_xsave, sized

        size = self.vm.check_extension(Cap.XSAVE2)
        if size <= 0x1000:
            return bytes(self._get("KVM_GET_XSAVE"))
        area = sized(kvm_xsave, (size - 0x1000) // 4)()
        self.ioctl("KVM_GET_XSAVE2", area)
        return bytes(area)

    def set_xsave(self, area: bytes) -> None:
        """Set the XSAVE area, as long as `get_xsave` gave it (section 4.43)."""
        from kvmpy.abi.structs import kvm_xsave, sized

        if len(area) < 0x1000 or len(area) % 4:
            raise UsageError(f"an XSAVE area has 4096 bytes or more, not {len(area)}")
        kind = sized(kvm_xsave, (len(area) - 0x1000) // 4)
        self.ioctl("KVM_SET_XSAVE", kind.from_buffer_copy(area))

    def get_xcrs(self) -> "kvm_xcrs":
        """Extended control registers, XCR0 first (section 4.44)."""
        return self._get("KVM_GET_XCRS")  # type: ignore[no-any-return]

    def set_xcrs(self, xcrs: "kvm_xcrs") -> None:
        """Set the extended control registers (section 4.45)."""
        self.ioctl("KVM_SET_XCRS", xcrs)

    def get_debug_registers(self) -> "kvm_debugregs":
        """DR0 to DR3, DR6, DR7 (section 4.33)."""
        return self._get("KVM_GET_DEBUGREGS")  # type: ignore[no-any-return]

    def set_debug_registers(self, registers: "kvm_debugregs") -> None:
        """Set the debug registers (section 4.34)."""
        self.ioctl("KVM_SET_DEBUGREGS", registers)

    def get_msrs(self, indices: "Iterable[int]") -> dict[int, int]:
        """MSR values by index (section 4.18). Raises KvmError naming the first index that KVM does not have."""
        from kvmpy.abi.structs import kvm_msrs, sized

        wanted = list(indices)
        values: dict[int, int] = {}
        for start in range(0, len(wanted), _MSRS_AT_ONCE):
            part = wanted[start : start + _MSRS_AT_ONCE]
            table = sized(kvm_msrs, len(part))(nmsrs=len(part))
            for entry, index in zip(table.entries, part, strict=True):
                entry.index = fits("MSR number", index, 32)
            done = self.ioctl("KVM_GET_MSRS", table)
            if done < len(part):
                raise KvmError(
                    "KVM_GET_MSRS", errno.EINVAL, f"MSR {part[done]:#x} is not one that KVM lets user space read here"
                )
            values.update((entry.index, entry.data) for entry in table.entries)
        return values

    def set_msrs(self, values: "Mapping[int, int]") -> None:
        """Set MSRs, in the mapping's order (section 4.19). Raises KvmError naming the first that KVM refuses."""
        wanted = list(values.items())
        done = self.set_msrs_until_refused(wanted)
        if done < len(wanted):
            index, value = wanted[done]
            raise KvmError(
                "KVM_SET_MSRS", errno.EINVAL, f"MSR {index:#x} does not take {value:#x} (set CPUID before MSRs)"
            )

    def set_msrs_until_refused(self, values: "Sequence[tuple[int, int]]") -> int:
        """Set MSRs from (index, value) pairs; answers how many were set before KVM refused one."""
        from kvmpy.abi.structs import kvm_msrs, sized

        for start in range(0, len(values), _MSRS_AT_ONCE):
            part = values[start : start + _MSRS_AT_ONCE]
            table = sized(kvm_msrs, len(part))(nmsrs=len(part))
            for entry, (index, value) in zip(table.entries, part, strict=True):
                entry.index, entry.data = fits("MSR number", index, 32), fits(f"MSR {index:#x}", value, 64)
            done = self.ioctl("KVM_SET_MSRS", table)
            if done < len(part):
                return start + done
        return len(values)

    def get_msr(self, index: int) -> int:
        """One MSR."""
        return self.get_msrs((index,))[index]

    def set_msr(self, index: int, value: int) -> None:
        """Set one MSR."""
        self.set_msrs({index: value})

    def get_events(self) -> "kvm_vcpu_events":
        """Pending exceptions, interrupts, NMIs, SMIs (section 4.31)."""
        return self._get("KVM_GET_VCPU_EVENTS")  # type: ignore[no-any-return]

    def set_events(self, events: "kvm_vcpu_events") -> None:
        """Set or inject events (section 4.32)."""
        self.ioctl("KVM_SET_VCPU_EVENTS", events)

    def forget_events(self) -> None:
        """Drop exceptions, interrupts and NMIs that wait to be delivered: another guest is about to start here."""
        from kvmpy.abi.flags import KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW
        from kvmpy.abi.structs import kvm_vcpu_events

        valid = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW
        self.set_events(filled(kvm_vcpu_events, flags=valid))

    def inject_exception(self, vector: int, error_code: int | None = None) -> None:
        """Have the guest take exception `vector` when it runs next, as if its next instruction had caused it."""
        events = self.get_events()
        events.exception.injected = 1
        events.exception.nr = fits("exception vector", vector, 5)
        events.exception.has_error_code = error_code is not None
        events.exception.error_code = fits("error code", error_code or 0, 32)
        self.set_events(events)

    # CPUID

    def get_cpuid(self) -> "CpuidTable":
        """The CPUID table that was set (KVM_GET_CPUID2, section 4.61)."""
        from kvmpy.kvm.cpuid import read_table

        return read_table(self, "KVM_GET_CPUID2")

    def set_cpuid(self, table: "CpuidTable") -> None:
        """Set what CPUID answers (KVM_SET_CPUID2, section 4.20).

        Before system registers and MSRs, whose reserved bits depend on it, and before the first run: KVM refuses a
        change afterwards, which raises UsageError here.
        """
        from kvmpy.kvm.cpuid import to_struct

        try:
            self.ioctl("KVM_SET_CPUID2", to_struct(table))
        except KvmError as error:
            if self.page.runs[0]:
                raise UsageError(
                    "CPUID cannot change after the vCPU has run; set it right after create_vcpu"
                ) from error
            raise

    # Interrupts

    def get_lapic(self) -> "kvm_lapic_state":
        """The in-kernel local APIC's 1 KiB of registers (section 4.57)."""
        return self._get("KVM_GET_LAPIC")  # type: ignore[no-any-return]

    def set_lapic(self, lapic: "kvm_lapic_state") -> None:
        """Set the local APIC's registers (section 4.58)."""
        self.ioctl("KVM_SET_LAPIC", lapic)

    def get_mp_state(self) -> int:
        """KVM_MP_STATE_*: 0 runnable, 1 uninitialized, 2 INIT received, 3 halted, 4 SIPI received (section 4.38)."""
        return int(self._get("KVM_GET_MP_STATE").mp_state)

    def set_mp_state(self, state: int) -> None:
        """Set the multiprocessing state (section 4.39)."""
        from kvmpy.abi.structs import kvm_mp_state

        self.ioctl("KVM_SET_MP_STATE", kvm_mp_state(mp_state=fits("MP state", state, 32)))

    def interrupt(self, vector: int) -> None:
        """Queue hardware interrupt `vector` (KVM_INTERRUPT, section 4.16), without an in-kernel irqchip.

        Only when `page.ready_for_interrupt_injection`: KVM delivers it even if the guest has interrupts off.
        """
        from kvmpy.abi.structs import kvm_interrupt

        self.ioctl("KVM_INTERRUPT", kvm_interrupt(irq=fits("interrupt vector", vector, 8)))

    def nmi(self) -> None:
        """Send a non-maskable interrupt (section 4.64)."""
        self.ioctl("KVM_NMI")

    def smi(self) -> None:
        """Send a system management interrupt (section 4.95)."""
        self.ioctl("KVM_SMI")

    # Debugging

    def set_guest_debug(self, control: int, breakpoints: "Iterable[int]" = (), dr7: int = 0) -> None:
        """KVM_SET_GUEST_DEBUG (section 4.87): `control` is KVM_GUESTDBG_*; `breakpoints` are DR0 to DR3, with `dr7`."""
        from kvmpy.abi.structs import kvm_guest_debug

        debug = filled(kvm_guest_debug, control=control)
        addresses = list(breakpoints)
        if len(addresses) > 4:
            raise UsageError(f"there are four breakpoint registers, not {len(addresses)}")
        for index, address in enumerate(addresses):
            debug.arch.debugreg[index] = fits(f"breakpoint {index}", address, 64)
        debug.arch.debugreg[7] = fits("dr7", dr7, 64)
        self.ioctl("KVM_SET_GUEST_DEBUG", debug)

    def single_step(self, on: bool = True) -> None:
        """Have every run come back with a `Debug` exit after one instruction, or stop doing so."""
        from kvmpy.abi.flags import KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP

        self.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP if on else 0)

    def translate(self, virtual_address: int) -> "kvm_translation":
        """KVM's own walk of the page tables (KVM_TRANSLATE, section 4.15): `.valid` and `.physical_address`.

        `kvmpy.x86.page_walk` walks them in Python and says why an address is not mapped.
        """
        from kvmpy.abi.structs import kvm_translation

        translation = kvm_translation(linear_address=fits("virtual address", virtual_address, 64))
        self.ioctl("KVM_TRANSLATE", translation)
        return translation

    # Time and the rest

    def get_tsc_khz(self) -> int:
        """The guest's TSC frequency in kHz (section 4.56)."""
        return self.ioctl("KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """Set the guest's TSC frequency in kHz (section 4.55); needs KVM_CAP_TSC_CONTROL to differ from the host's."""
        self.ioctl("KVM_SET_TSC_KHZ", khz)

    def kvmclock_paused(self) -> None:
        """Tell the guest that it was paused, so that its watchdogs forgive (KVM_KVMCLOCK_CTRL, section 4.69)."""
        self.ioctl("KVM_KVMCLOCK_CTRL")

    def enable_cap(self, capability: int, *arguments: int, flags: int = 0) -> None:
        """Enable a capability for this vCPU (section 4.37)."""
        from kvmpy.kvm.capability import enable_cap

        enable_cap(self, capability, arguments, flags)

    def statistics(self) -> "Statistics":
        """KVM's counters of this vCPU (KVM_GET_STATS_FD, section 4.133): close it after use."""
        from kvmpy.kvm.statistics import Statistics

        return Statistics(self.ioctl("KVM_GET_STATS_FD"))
