"""What all KVM file descriptors share: ownership of one fd, the ioctl, and errors that say what to do."""

import ctypes
import errno
import os
import sys

from kvmpy.abi.ioctls import IOCTLS, Ioctl
from kvmpy.errors import CapabilityError, ClosedError, ForkedError, KvmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self

__all__ = ["Descriptor", "raw_ioctl"]

# Without argtypes ctypes passes prebuilt c_int, c_ulong and pointers straight through: 215 ns a call, with them 330.
raw_ioctl = ctypes.CDLL(None, use_errno=True).ioctl

_forks = 0
"""How often this process is a fork of one that had kvmpy loaded."""


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Descriptor:
    """Owns one file descriptor of KVM: a context manager that closes it once.

    Every use after close raises ClosedError, every use in a child process after fork ForkedError. One that is dropped
    without being closed is closed with a ResourceWarning.
    """

    kind = ""
    """Which ioctls it takes: "system", "vm", "vcpu" or "device"."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._forks = _forks

    def fileno(self) -> int:
        """The file descriptor's number, for select and the like. Raises ClosedError after close."""
        self._check_usable()
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the file descriptor. Calling it again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> "Self":
        self._check_usable()
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0 and not sys.is_finalizing():
            if not self._forked:
                import warnings

                warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"fd {self._fd}"
        return f"<{type(self).__name__} {state}>"

    @property
    def _forked(self) -> bool:
        """Whether this process is a child of the one that made the descriptor."""
        return self._forks != _forks

    def _check_usable(self) -> None:
        if self._fd < 0:
            raise ClosedError(f"{self!r} was used after it was closed")
        if self._forks != _forks:  # _forked, without the call
            raise ForkedError(
                f"{self!r} belongs to the process that created it: KVM ties a VM to one address space. "
                "Create the VM after fork(), or use multiprocessing with the 'spawn' method"
            )

    def ioctl(self, name: str, argument: "Any" = None) -> int:
        """Any ioctl of the table `kvmpy.abi.ioctls.IOCTLS` that this descriptor takes, by its kernel name.

        `argument` is what the table says: nothing, an int, or an instance of the ctypes class `argument_type` (which
        the kernel fills in place). Answers the kernel's return value; raises KvmError with the ioctl's name otherwise,
        UsageError for an ioctl of another descriptor or an argument of another type.
        """
        return self._call(*self._checked(name, argument))

    def prepared(self, name: str, argument: "Any" = None) -> "Callable[[], int]":
        """`ioctl` for one that is called often: a function without parameters, which looks nothing up again.

        A structure is filled in place, or read, at every call.
        """
        entry, checked = self._checked(name, argument)
        return lambda: self._call(entry, checked)

    def _checked(self, name: str, argument: "Any") -> "tuple[Ioctl, Any]":
        """The table's entry, and the argument as ctypes takes it. Raises UsageError for one that is not right."""
        entry = IOCTLS.get(name)
        if entry is None:
            raise UsageError(f"there is no ioctl {name!r} in kvmpy.abi.ioctls.IOCTLS")
        if self.kind not in entry.descriptors:
            raise UsageError(f"{name} is an ioctl of a {' or '.join(entry.descriptors)} descriptor, not of {self!r}")
        if entry.argument is None:
            if argument is not None:
                raise UsageError(f"{name} takes no argument")
            return entry, 0
        if entry.argument == "int":
            if not isinstance(argument, int) or not 0 <= argument < 1 << 64:
                raise UsageError(f"{name} takes an int of 64 bits, not {argument!r}")
            return entry, ctypes.c_void_p(argument)
        expected = entry.argument_type
        if expected is None or not isinstance(argument, expected):
            raise UsageError(f"{name} takes a {entry.argument}, not {argument!r}")
        _check_room(name, argument)
        return entry, ctypes.byref(argument)

    def _call(self, entry: Ioctl, argument: "Any" = 0) -> int:
        """The ioctl itself, without a look at the argument. EINTR and EAGAIN are errors like all others.

        `argument` is what ctypes makes 64 bits of: c_void_p, byref(), or bytes where the kernel only reads. It takes a
        plain int for 32 bits, which suits request numbers and 0.
        """
        self._check_usable()
        answer: int = raw_ioctl(self._fd, entry.number, argument)
        if answer < 0:
            raise self._error(entry, ctypes.get_errno())
        return answer

    def _error(self, entry: Ioctl, number: int) -> KvmError:
        """The exception for a refused ioctl, with the advice that fits."""
        from kvmpy.kvm.advice import advice_for

        if entry.capability is not None and number in (errno.ENOTTY, errno.EINVAL, errno.ENXIO, errno.EOPNOTSUPP):
            from kvmpy.abi.capabilities import Cap

            try:
                has = self._has_capability(Cap[entry.capability])
            except KvmError:  # not one of KVM's descriptors at all
                has = 1
            if not has:
                return CapabilityError(
                    entry.name, number, f"this host's KVM does not have KVM_CAP_{entry.capability}; see `kvmpy doctor`"
                )
        return KvmError(entry.name, number, advice_for(entry.name, number))

    def _has_capability(self, capability: int) -> int:
        """What KVM_CHECK_EXTENSION says where this descriptor can ask, else 1, so that nothing is blamed."""
        return 1


_COUNTS = {
    "kvm_cpuid": "nent", "kvm_cpuid2": "nent", "kvm_msrs": "nmsrs", "kvm_msr_list": "nmsrs", "kvm_irq_routing": "nr",
    "kvm_signal_mask": "len", "kvm_reg_list": "n", "kvm_pmu_event_filter": "nevents",
}  # fmt: skip
"""Which field of a struct with a flexible array says how many entries it has room for."""


def _check_room(name: str, argument: "Any") -> None:
    """Refuse a struct that promises more entries than it has: the kernel would write behind its end."""
    kind = next((base for base in type(argument).__mro__ if "_flexible_" in vars(base)), None)
    count = _COUNTS.get(kind.__name__) if kind is not None else None
    if kind is None or count is None:
        return
    room = (ctypes.sizeof(argument) - ctypes.sizeof(kind)) // ctypes.sizeof(kind._flexible_[1])  # type: ignore[attr-defined]
    if getattr(argument, count) > room:
        raise UsageError(
            f"{name}: {kind.__name__}.{count} is {getattr(argument, count)}, but there is room for {room} entries; "
            f"make it by kvmpy.abi.structs.sized({kind.__name__}, entries)"
        )
