"""Every exception that kvmpy raises.

The tree says whose fault it is::

    KvmpyError
    ├── UsageError (ValueError)      the caller asked for something that cannot be
    │   ├── ClosedError              a file descriptor was used after close()
    │   ├── ForkedError              a VM was used in a child of the process that made it
    │   ├── VcpuBusyError            a vCPU was used while another thread runs it
    │   ├── GuestMemoryError         an access left guest RAM
    │   ├── OverlapError             two owners for one address range
    │   ├── RegisterValueError       a value does not fit its register
    │   ├── ReplyError               an answer to an exit that cannot be given (any more)
    │   ├── HandlerResultError       a device answered a read with something unfit
    │   ├── ImageError               a guest image is truncated, lying or too large
    │   ├── UnknownSymbolError       a name that no symbol has (in kvmpy.debug.symbols)
    │   └── SourceError              as or gcc refused a guest's source (in kvmpy.guest.toolchain)
    ├── KvmError (OSError)           the kernel refused an ioctl
    │   ├── KvmUnavailableError      /dev/kvm is missing or may not be opened
    │   ├── KvmVersionError          the kernel speaks another KVM API version
    │   ├── CapabilityError          this host's KVM lacks a feature
    │   └── EntryRefusedError        the vCPU state breaks rules of KVM or of the processor
    ├── ToolMissingError             as, ld or gcc is not installed (in kvmpy.guest.toolchain)
    ├── GuestFailed                  the guest ended badly and run(check=True) was asked for
    └── ExpectTimeout (TimeoutError) a console did not print what was waited for (in kvmpy.devices)

What a guest does wrong is no exception: it is an outcome (`kvmpy.machine.outcome`) or an exit.
"""

import errno as _errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmpy.machine.outcome import Outcome
    from kvmpy.x86.entry_rules import Violation

__all__ = [
    "CapabilityError",
    "ClosedError",
    "EntryRefusedError",
    "ForkedError",
    "GuestFailed",
    "GuestMemoryError",
    "HandlerResultError",
    "ImageError",
    "KvmError",
    "KvmUnavailableError",
    "KvmVersionError",
    "KvmpyError",
    "OverlapError",
    "RegisterValueError",
    "ReplyError",
    "UsageError",
    "VcpuBusyError",
]


class KvmpyError(Exception):
    """The root: `except KvmpyError` catches all that the library raises on purpose."""


class UsageError(KvmpyError, ValueError):
    """The caller asked for something that cannot be done."""


class ClosedError(UsageError):
    """A descriptor was used after it was closed."""


class ForkedError(UsageError):
    """A VM was used in a child process. KVM binds a VM to the address space that created it (KVM API, section 4.1)."""


class VcpuBusyError(UsageError):
    """A vCPU was used while another thread runs it. Its ioctls would block until that thread leaves KVM_RUN."""


class GuestMemoryError(UsageError):
    """An access of `length` bytes at guest-physical `address` is not (wholly) inside guest RAM."""

    def __init__(self, message: str, address: int, length: int) -> None:
        super().__init__(message)
        self.address = address
        self.length = length


class OverlapError(UsageError):
    """Two owners claim one range. `new` and `existing` name them, with their ranges."""

    def __init__(self, new: str, existing: str) -> None:
        super().__init__(f"{new} overlaps {existing}")
        self.new = new
        self.existing = existing


class RegisterValueError(UsageError):
    """`value` does not fit `register`, which is `bits` wide."""

    def __init__(self, register: str, value: object, bits: int) -> None:
        shown = hex(value) if isinstance(value, int) else repr(value)
        super().__init__(f"{register} is {bits} bits wide and unsigned; {shown} does not fit")
        self.register = register
        self.value = value
        self.bits = bits


class ReplyError(UsageError):
    """An exit cannot be answered so: wrong size, not a read, or the vCPU has run on since."""


class HandlerResultError(UsageError):
    """A read handler answered with `value`, which is not an unsigned integer of `size` bytes."""

    def __init__(self, handler: str, value: object, size: int) -> None:
        super().__init__(
            f"{handler} answered a read of {size} bytes with {value!r}; "
            f"it must be an int from 0 to {(1 << 8 * size) - 1:#x}"
        )
        self.handler = handler
        self.value = value
        self.size = size


class ImageError(UsageError):
    """A guest image cannot be loaded. `offset` is where in the file the trouble is, when it has a place."""

    def __init__(self, message: str, image: str = "", offset: int | None = None) -> None:
        where = image
        if offset is not None:
            where += f" at offset {offset:#x}"
        super().__init__(f"{where.strip()}: {message}" if where else message)
        self.image = image
        self.offset = offset


class KvmError(KvmpyError, OSError):
    """The kernel refused `ioctl` with `errno`; `advice` says what to do, where the cause is known."""

    def __init__(self, ioctl: str, errno: int, advice: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        text = f"{ioctl} failed with {name} ({os.strerror(errno)})"
        if advice:
            text += f": {advice}"
        super().__init__(errno, text)
        self.ioctl = ioctl
        self.advice = advice

    def __str__(self) -> str:
        return str(self.strerror)


class KvmUnavailableError(KvmError):
    """/dev/kvm cannot be opened: no such device, or no permission. `advice` says which remedy fits."""


class KvmVersionError(KvmError):
    """KVM_GET_API_VERSION did not answer 12, the only version since Linux 2.6.22 (KVM API, section 4.1)."""


class CapabilityError(KvmError):
    """The feature needs a capability (KVM API, section 4.4) that this host's KVM does not report."""


class EntryRefusedError(KvmError):
    """KVM or the processor refused the vCPU state. `violations` lists the rules it breaks, with their sources."""

    def __init__(self, ioctl: str, errno: int, violations: "Sequence[Violation]", advice: str = "") -> None:
        lines = "".join(f"\n  - {violation}" for violation in violations)
        super().__init__(ioctl, errno, (advice or "the vCPU state breaks these rules") + lines)
        self.violations = tuple(violations)


class GuestFailed(KvmpyError):
    """The guest ended badly; `outcome` says how."""

    def __init__(self, outcome: "Outcome") -> None:
        super().__init__(str(outcome))
        self.outcome = outcome
