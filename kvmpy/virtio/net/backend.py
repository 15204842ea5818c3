"""Where the frames of a network device come from and go to: what all such things have in common."""

from __future__ import annotations

import errno
import select
from abc import ABC, abstractmethod
from collections import Counter

from kvmpy.errors import ClosedError

__all__ = ["DescriptorBackend", "NetBackend"]


class NetBackend(ABC):
    """The host's end of a guest's network cable. Frames are Ethernet frames without preamble and checksum.

    A `VirtioNet` owns it, calls it with its lock held, and closes it. Nothing here blocks. `counters`, which are those
    of the device, say what was lost, by a short name; `connected` turns False for good when the other end has gone.
    """

    name = "network"
    mtu: int | None = None
    """The longest packet, without Ethernet header, if the other end says so."""
    connected = True
    in_use = False
    """Whether a device owns it."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that can be read (epoll(7)) while there is something to do: `flush`, then `receive`."""

    @abstractmethod
    def receive(self) -> bytes | memoryview | None:
        """The next frame, or None: there is none now. What it gives is valid until it is called again."""

    @abstractmethod
    def send(self, views: list[memoryview]) -> bool:
        """Send a frame that consists of these parts. False: it is lost, and counted."""

    @abstractmethod
    def watch_arrivals(self, watch: bool) -> None:
        """Whether `fileno()` is to tell of frames that arrive: not while nobody can take them."""

    def flush(self) -> None:  # noqa: B027 most send at once or never
        """Send what `send` could not send at once."""

    @property
    def full(self) -> bool:
        """Whether `send` must wait until a `flush` was able to send more."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Let the other end go."""


class DescriptorBackend(NetBackend):
    """One that has a descriptor `fd`, which is not blocking.

    `fileno()` is an epoll instance with that descriptor in it, and readable itself when the descriptor is ready for
    what is waited for at the moment: so the machine's one thread, which waits for "readable" alone, is woken by room
    for what could not be sent, too, and not woken by frames that nobody can take.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._arrivals = True
        self._watched = 0
        self._epoll = select.epoll()
        self._watch()

    def fileno(self) -> int:
        if self._epoll.closed:
            raise ClosedError(f"{self!r} was used after it was closed")
        return self._epoll.fileno()

    def watch_arrivals(self, watch: bool) -> None:
        self._arrivals = watch
        self._watch()

    def _waits_for_room(self) -> bool:
        """Whether there is something that could not be sent yet."""
        return False

    def _watch(self) -> None:
        """Wait for what is to be waited for now. Hang-ups are not told when that is nothing, so nothing spins."""
        wanted = 0
        if self.connected:
            wanted = select.EPOLLIN * self._arrivals | select.EPOLLOUT * self._waits_for_room()
        if wanted == self._watched:
            return
        if not wanted:
            self._epoll.unregister(self._fd)
        elif self._watched:
            self._epoll.modify(self._fd, wanted)
        else:
            self._epoll.register(self._fd, wanted)
        self._watched = wanted

    def _lost(self, cause: str) -> None:
        """The other end has gone, or cannot be understood any more."""
        if self.connected:
            self.counters[cause] += 1
            self.connected = False
            self._watch()

    def _failed(self, error: OSError) -> None:
        """An error that only takes a frame is counted by its name."""
        self.counters["host_" + errno.errorcode.get(error.errno or 0, "error")] += 1

    def close(self) -> None:
        self.connected = False
        self._epoll.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}{'' if self.connected else ', disconnected'}>"
