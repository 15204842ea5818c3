"""Events between guest and host that are neither exits nor ioctls: guest writes as eventfds, interrupts by eventfds."""

import os
from contextlib import suppress

from kvmpy.errors import KvmError, UsageError
from kvmpy.kvm import Vm
from kvmpy.machine.host_events import HostEvents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmpy.machine.interrupts import LevelObserver

__all__ = ["IoEvent", "IrqEvent"]

_FLAGS = os.EFD_NONBLOCK | os.EFD_CLOEXEC


class IoEvent:
    """Guest writes of `value` to a register signal an eventfd, at which the host input thread calls `call()`.

    Several writes may be one call (ioeventfd; KVM API, section 4.59).
    """

    def __init__(
        self, vm: Vm, host_events: HostEvents, kind: str, address: int, size: int, value: int,
        call: "Callable[[], object]",
    ) -> None:  # fmt: skip
        self._vm, self._host_events, self._call = vm, host_events, call
        self._place = (address, size, kind == "port", value)
        self._fd = os.eventfd(0, _FLAGS)
        try:
            vm.add_ioeventfd(self._fd, address, size, port=kind == "port", match=value)
            host_events.add(self)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._fd

    def ready(self) -> bool:
        """The guest wrote. What `call` raises is kept with the errors of host input; the next write calls it again."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return True
        try:
            self._call()
        except Exception as error:
            self._host_events.errors.append((self, error))
        return True

    def close(self) -> None:
        """Such writes are exits again."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        self._host_events.remove(self)
        address, size, port, value = self._place
        with suppress(KvmError, UsageError):  # the VM is closed, or was never told
            self._vm.remove_ioeventfd(fd, address, size, port=port, match=value)
        os.close(fd)


class IrqEvent:
    """Raises an interrupt input by an edge (irqfd; KVM API, section 4.75)."""

    def __init__(self, vm: Vm, gsi: int, observer: "Callable[[], LevelObserver | None]") -> None:
        self._vm, self._gsi, self._observer = vm, gsi, observer
        self.raised: Callable[[], bool] = lambda: False
        self._fd = os.eventfd(0, _FLAGS)
        try:
            vm.add_irqfd(self._fd, gsi)
        except BaseException:
            os.close(self._fd)
            raise

    def signal(self) -> None:
        """Raise the input and lower it."""
        os.eventfd_write(self._fd, 1)
        observer = self._observer()
        if observer is not None:
            observer(self._gsi, 1)
            observer(self._gsi, 0)

    def again(self) -> None:
        """Another edge, if the device still has a cause."""
        if self._fd >= 0 and self.raised():
            self.signal()

    def close(self) -> None:
        """Disconnect."""
        self.raised = lambda: False  # the device's: without it there is no circle
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        with suppress(KvmError, UsageError):
            self._vm.remove_irqfd(fd, self._gsi)
        os.close(fd)
