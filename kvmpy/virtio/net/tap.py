"""Frames over a TAP interface of the host (Linux: Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import ctypes
import errno
import os

from kvmpy.errors import UsageError
from kvmpy.virtio.net.backend import DescriptorBackend
from kvmpy.virtio.net.format import LONGEST_FRAME

__all__ = ["Tap"]

_TUNSETIFF = 0x4004_54CA  # _IOW('T', 202, int) of <linux/if_tun.h>
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000  # frames without 4 bytes of packet information before them
_NAME_BYTES = 16  # IFNAMSIZ

_MOST_VIEWS = 1000

_GONE = (errno.EBADFD, errno.ENODEV, errno.ENXIO)
"""What a read or write answers when somebody has deleted the interface."""


class _InterfaceRequest(ctypes.Structure):
    """struct ifreq of <linux/if.h>."""

    _fields_ = (("name", ctypes.c_char * _NAME_BYTES), ("flags", ctypes.c_short), ("_rest", ctypes.c_char * 22))


class Tap(DescriptorBackend):
    """The TAP interface `name`, which is made if it is not there; a `%d` in the name becomes a number.

    Making one needs CAP_NET_ADMIN. One that root has made for a user works without:
    `ip tuntap add tap0 mode tap user NAME`. Address, bridge and "up" are the host's matter (`ip link set tap0 up`):
    while the interface is down, frames that the guest sends are lost ("host_EIO"). `interface` is its name.

    While the guest has no buffers, frames wait in the interface's queue (txqueuelen), and the host drops what is more.

    Raises OSError, which says what to do.
    """

    name = "TAP interface"

    def __init__(self, name: str = "kvmpy%d") -> None:
        encoded = os.fsencode(name)
        if not 0 < len(encoded) < _NAME_BYTES or b"/" in encoded or b"\0" in encoded:
            raise UsageError(f"an interface has a name of 1 to {_NAME_BYTES - 1} bytes, not {name!r}")
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            advice = {
                errno.ENOENT: ": the module tun of the kernel makes it (modprobe tun)",
                errno.ENODEV: ": the module tun of the kernel is not there (modprobe tun)",
                errno.EACCES: ": where udev makes it, all may open it (chmod 666 /dev/net/tun)",
            }.get(error.errno or 0, "")
            raise OSError(error.errno, f"{error.strerror}{advice}", "/dev/net/tun") from None
        try:
            self.interface = _set_interface(fd, encoded)
            self._buffer = memoryview(bytearray(LONGEST_FRAME + 1))
            super().__init__(fd)
        except BaseException:
            os.close(fd)
            raise

    def receive(self) -> memoryview | None:
        if not self.connected:
            return None
        try:
            length = os.readv(self._fd, [self._buffer])
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            self._error(error)
            return None
        return self._buffer[:length]

    def send(self, views: list[memoryview]) -> bool:
        if not self.connected:
            self.counters["link_down"] += 1
            return False
        try:
            os.writev(self._fd, views if len(views) <= _MOST_VIEWS else [b"".join(views)])
        except OSError as error:
            self._error(error)
            return False
        return True

    def _error(self, error: OSError) -> None:
        if error.errno in _GONE:
            self._lost("interface_gone")
        else:  # EIO: the interface is down; EAGAIN: its queue is full
            self._failed(error)

    def close(self) -> None:
        if not self._epoll.closed:
            super().close()
            os.close(self._fd)


def _set_interface(fd: int, name: bytes) -> str:
    """TUNSETIFF: make `fd` the other end of the interface; answers its name."""
    request = _InterfaceRequest(name, _IFF_TAP | _IFF_NO_PI)
    # The kernel reads the second argument as an unsigned long, and the variable one as a pointer.
    if ctypes.CDLL(None, use_errno=True).ioctl(fd, ctypes.c_ulong(_TUNSETIFF), ctypes.byref(request)) < 0:
        number = ctypes.get_errno()
        shown = os.fsdecode(name)
        advice = {
            errno.EPERM: f"only root may make it. Once: sudo ip tuntap add {shown} mode tap user $USER",
            errno.EBUSY: "another program uses it",
            errno.EINVAL: "it exists, but is no TAP interface of a single queue",
        }.get(number)
        raise OSError(number, os.strerror(number) + (f": {advice}" if advice else ""), shown)
    return os.fsdecode(request.name)
