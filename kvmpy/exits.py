"""What a vCPU can exit with: one small class per x86 exit reason of KVM_RUN (KVM API, chapter 5).

Exits are values: they carry their own data, compare by it, and match by position or keyword::

    match event:
        case IoOut(port=0x3F8, data=data): ...
        case MmioRead(address=address): event.reply(0x1234)
        case Hlt(): ...

An exit that asks for something (`IoIn`, `MmioRead`, `RdMsr`, `WrMsr`, `Hypercall`) is answered with `reply` (or
`reject`) before the vCPU runs again. A read that nobody answers gives all ones, like a bus where nothing is plugged in.
"""

from kvmpy._exit import Answer, Answered, Exit
from kvmpy.errors import ReplyError

__all__ = [
    "ApResetHold", "BusLock", "Debug", "DirtyRingFull", "ExceptionExit", "Exit", "FailEntry", "Hlt", "Hypercall",
    "HypervExit", "InternalError", "Interrupted", "IoIn", "IoOut", "IoapicEoi", "IrqWindowOpen", "MemoryFault",
    "MmioRead", "MmioWrite", "Nmi", "Notify", "RdMsr", "SetTpr", "Shutdown", "SystemEvent", "TdxExit", "TprAccess",
    "UnknownExit", "UnknownHardwareExit", "WrMsr", "XenExit",
]  # fmt: skip


class IoOut(Exit):
    """The guest wrote to a port: `count` items of `size` bytes each (`rep outs` gives more than one), all in `data`."""

    __slots__ = __match_args__ = ("port", "data", "size", "count")
    reason = 2

    def __init__(self, port: int, data: bytes, size: int = 1, count: int = 1) -> None:
        self.port = port
        self.data = data
        self.size = size
        self.count = count

    @property
    def value(self) -> int:
        """The (first) item as a number."""
        return int.from_bytes(self.data[: self.size], "little")


class IoIn(Answered):
    """The guest reads a port: `count` items of `size` bytes each (`rep ins`). A reply covers all of them."""

    __slots__ = __match_args__ = ("port", "size", "count")
    reason = 2

    def __init__(self, port: int, size: int = 1, count: int = 1, answer: Answer | None = None) -> None:
        self.port = port
        self.size = size
        self.count = count
        self._answer = answer


class MmioWrite(Exit):
    """The guest wrote `data` (1 to 8 bytes) to a guest-physical `address` where there is no memory slot."""

    __slots__ = __match_args__ = ("address", "data")
    reason = 6

    def __init__(self, address: int, data: bytes) -> None:
        self.address = address
        self.data = data

    @property
    def size(self) -> int:
        """Bytes written."""
        return len(self.data)

    @property
    def value(self) -> int:
        """The data as a number."""
        return int.from_bytes(self.data, "little")


class MmioRead(Answered):
    """The guest reads `size` bytes (1 to 8) from a guest-physical `address` where there is no memory slot."""

    __slots__ = __match_args__ = ("address", "size")
    reason = 6

    def __init__(self, address: int, size: int, answer: Answer | None = None) -> None:
        self.address = address
        self.size = size
        self._answer = answer


class UnknownHardwareExit(Exit):
    """KVM_EXIT_UNKNOWN: the processor left the guest for a reason that KVM does not know; `hardware_reason` is it."""

    __slots__ = __match_args__ = ("hardware_reason",)
    reason = 0

    def __init__(self, hardware_reason: int) -> None:
        self.hardware_reason = hardware_reason


class ExceptionExit(Exit):
    """KVM_EXIT_EXCEPTION: an exception that KVM reports instead of injecting (not used on current x86 hosts)."""

    __slots__ = __match_args__ = ("exception", "error_code")
    reason = 1

    def __init__(self, exception: int, error_code: int) -> None:
        self.exception = exception
        self.error_code = error_code


class Hypercall(Answered):
    """KVM_EXIT_HYPERCALL: the guest made hypercall `number` with six `arguments`. `reply` gives it its RAX."""

    __slots__ = __match_args__ = ("number", "arguments", "flags")
    reason = 3

    def __init__(
        self, number: int, arguments: tuple[int, ...] = (), flags: int = 0, answer: Answer | None = None
    ) -> None:
        self.number = number
        self.arguments = arguments
        self.flags = flags
        self._answer = answer


class Debug(Exit):
    """KVM_EXIT_DEBUG: a breakpoint or single step that KVM_SET_GUEST_DEBUG asked for.

    `exception` is 1 (#DB) or 3 (#BP), `pc` the linear address, `dr6` and `dr7` say which breakpoint.
    """

    __slots__ = __match_args__ = ("exception", "pc", "dr6", "dr7")
    reason = 4

    def __init__(self, exception: int, pc: int, dr6: int = 0, dr7: int = 0) -> None:
        self.exception = exception
        self.pc = pc
        self.dr6 = dr6
        self.dr7 = dr7


class Hlt(Exit):
    """The guest executed HLT, and there is no in-kernel interrupt controller to wait for. RIP is behind the HLT."""

    __slots__ = ()
    reason = 5


class IrqWindowOpen(Exit):
    """The guest can take an interrupt now, which `request_interrupt_window` asked to be told."""

    __slots__ = ()
    reason = 7


class Shutdown(Exit):
    """The guest shut down by a triple fault. On AMD-V the registers are those after a reset: the cause is gone."""

    __slots__ = ()
    reason = 8


class FailEntry(Exit):
    """The processor refused to enter the guest; `hardware_reason` is its own code, on host CPU `cpu`.

    `Vcpu.explain_entry_failure` names the entry rules that the present state breaks.
    """

    __slots__ = __match_args__ = ("hardware_reason", "cpu")
    reason = 9

    def __init__(self, hardware_reason: int, cpu: int = 0xFFFF_FFFF) -> None:
        self.hardware_reason = hardware_reason
        self.cpu = cpu


class Interrupted(Exit):
    """KVM_RUN came back with EINTR: a kick, a signal, or the timeout of `run`. The guest goes on with the next run.

    `timed_out` says that it was the timeout.
    """

    __slots__ = __match_args__ = ("timed_out",)
    reason = 10

    def __init__(self, timed_out: bool = False) -> None:
        self.timed_out = timed_out


class SetTpr(Exit):
    """The guest lowered its task priority with a local APIC in user space."""

    __slots__ = ()
    reason = 11


class TprAccess(Exit):
    """The guest touched the TPR at `rip`, which KVM_TPR_ACCESS_REPORTING asked to be told."""

    __slots__ = __match_args__ = ("rip", "is_write")
    reason = 12

    def __init__(self, rip: int, is_write: bool) -> None:
        self.rip = rip
        self.is_write = is_write


class Nmi(Exit):
    """KVM_EXIT_NMI."""

    __slots__ = ()
    reason = 16


class InternalError(Exit):
    """KVM gave up: `suberror` says why (1: it could not emulate an instruction), `data` is up to 16 numbers about it.

    `instruction` holds the bytes from RIP on that KVM fetched (up to 15, more than one instruction), where it gives
    them: KVM_INTERNAL_ERROR_EMULATION with the flag INSTRUCTION_BYTES.
    """

    __slots__ = __match_args__ = ("suberror", "data", "instruction")
    reason = 17
    NAMES = {1: "EMULATION", 2: "SIMUL_EX", 3: "DELIVERY_EV", 4: "UNEXPECTED_EXIT_REASON"}

    def __init__(self, suberror: int, data: tuple[int, ...] = (), instruction: bytes = b"") -> None:
        self.suberror = suberror
        self.data = data
        self.instruction = instruction

    @property
    def name(self) -> str:
        """The suberror by its kernel name, without KVM_INTERNAL_ERROR_."""
        return self.NAMES.get(self.suberror, f"suberror {self.suberror}")


class SystemEvent(Exit):
    """KVM_EXIT_SYSTEM_EVENT: `type` is KVM_SYSTEM_EVENT_* (1 shutdown, 2 reset, 3 crash), `data` up to 16 numbers."""

    __slots__ = __match_args__ = ("type", "data")
    reason = 24

    def __init__(self, type: int, data: tuple[int, ...] = ()) -> None:
        self.type = type
        self.data = data


class IoapicEoi(Exit):
    """The guest ended interrupt `vector` whose source is an IOAPIC in user space (split irqchip)."""

    __slots__ = __match_args__ = ("vector",)
    reason = 26

    def __init__(self, vector: int) -> None:
        self.vector = vector


class HypervExit(Exit):
    """KVM_EXIT_HYPERV: `type` is KVM_EXIT_HYPERV_*, `data` the rest of the structure as raw bytes."""

    __slots__ = __match_args__ = ("type", "data")
    reason = 27

    def __init__(self, type: int, data: bytes) -> None:
        self.type = type
        self.data = data


class _MsrExit(Answered):
    """An MSR access that KVM hands to user space (KVM_CAP_X86_USER_SPACE_MSR)."""

    __slots__ = ("_error",)
    _error: Answer | None

    def reject(self) -> None:
        """Give the guest a #GP for this access."""
        if self._error is None:
            raise ReplyError("this exit did not come from a vCPU")
        self._error.give(1)


class RdMsr(_MsrExit):
    """The guest reads MSR `index`; `cause` is KVM_MSR_EXIT_REASON_* (1 invalid, 2 unknown, 4 filtered).

    Unanswered, it gets a #GP, as for an MSR that does not exist.
    """

    __slots__ = __match_args__ = ("index", "cause")
    reason = 29

    def __init__(self, index: int, cause: int, answer: Answer | None = None, error: Answer | None = None) -> None:
        self.index = index
        self.cause = cause
        self._answer = answer
        self._error = error

    def reply(self, value: "int | bytes") -> None:
        """Answer with the MSR's 64-bit value."""
        super().reply(value)
        if self._error is not None:
            self._error.give(0)


class WrMsr(_MsrExit):
    """The guest writes `value` to MSR `index`. Accepted unless it is rejected."""

    __slots__ = __match_args__ = ("index", "value", "cause")
    reason = 30

    def __init__(self, index: int, value: int, cause: int, error: Answer | None = None) -> None:
        self.index = index
        self.value = value
        self.cause = cause
        self._answer = None
        self._error = error

    def reply(self, value: "int | bytes" = 0) -> None:
        """A write takes no value: this accepts it, which is also what happens when nothing is said."""
        if self._error is not None:
            self._error.give(0)


class DirtyRingFull(Exit):
    """The dirty ring reached its soft limit: collect and reset it, then go on."""

    __slots__ = ()
    reason = 31


class ApResetHold(Exit):
    """An SEV-ES guest's processor waits for SIPI."""

    __slots__ = ()
    reason = 32


class BusLock(Exit):
    """The guest took a split lock and KVM_CAP_X86_BUS_LOCK_EXIT is on."""

    __slots__ = ()
    reason = 33


class XenExit(Exit):
    """KVM_EXIT_XEN: `type` is KVM_EXIT_XEN_*, `data` the rest of the structure as raw bytes."""

    __slots__ = __match_args__ = ("type", "data")
    reason = 34

    def __init__(self, type: int, data: bytes) -> None:
        self.type = type
        self.data = data


class Notify(Exit):
    """The guest took no event for a whole notify window (KVM_CAP_X86_NOTIFY_VMEXIT)."""

    __slots__ = __match_args__ = ("flags",)
    reason = 37

    def __init__(self, flags: int) -> None:
        self.flags = flags


class MemoryFault(Exit):
    """KVM_RUN could not resolve a fault on `size` bytes at guest-physical `address` (KVM_CAP_MEMORY_FAULT_INFO)."""

    __slots__ = __match_args__ = ("address", "size", "flags")
    reason = 39

    def __init__(self, address: int, size: int, flags: int) -> None:
        self.address = address
        self.size = size
        self.flags = flags


class TdxExit(Exit):
    """KVM_EXIT_TDX: a TDX guest called the VMM; `number` is the TDVMCALL, `data` the rest as raw bytes."""

    __slots__ = __match_args__ = ("number", "flags", "data")
    reason = 40

    def __init__(self, number: int, flags: int, data: bytes) -> None:
        self.number = number
        self.flags = flags
        self.data = data


class UnknownExit(Exit):
    """A reason that this version of kvmpy has no class for; `number` is the KVM_EXIT_* number."""

    __slots__ = __match_args__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number
