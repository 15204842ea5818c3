"""The gdb server of a machine: `target remote :PORT` in gdb. See docs/gdb.md."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from kvmpy.debug.gdb.architecture import architecture_named
from kvmpy.debug.gdb.listening import LOOPBACK, Address
from kvmpy.debug.gdb.machine_target import MachineTarget
from kvmpy.debug.gdb.socket_server import SocketServer

if TYPE_CHECKING:
    from kvmpy.machine import Machine

__all__ = ["GdbServer"]


class _ClosedFirst:
    """Closes a server, if it is still there, when the machine is closed: before a vCPU's registers go away."""

    def __init__(self, server: GdbServer) -> None:
        self._server = weakref.ref(server)

    def close(self) -> None:
        server = self._server()
        if server is not None:
            server.close()


class GdbServer(SocketServer):
    """Lets a gdb debug `machine`, until `close` or the end of the machine. A context manager with a thread of its own.

    `address` is (host, port), where port 0 means any that is free, or the path of a UNIX socket; `.address` says what
    it became. Whoever can connect can read and change the guest and end its run: give an address other than loopback
    only where that is meant. `architecture` ("i386:x86-64", "i386", "i8086") is what gdb is told instead of what fits
    the mode of the guest.

    When gdb attaches all vCPUs stand; a run that begins later begins by standing. With `wait`, it stands even before a
    gdb is there, so that nothing is missed. When gdb leaves, in whatever way, its breakpoints go and the guest runs on.
    Raises UsageError when the address cannot be had, or, with `wait`, when the machine has another debugger attached.
    """

    def __init__(
        self, machine: Machine, address: Address = (LOOPBACK, 0), *, wait: bool = False, architecture: str | None = None
    ) -> None:
        self.machine = machine
        fixed = architecture_named(architecture) if architecture is not None else None
        self._machine_target = MachineTarget(machine)
        if wait:
            self._machine_target.hold()
        try:
            super().__init__(self._machine_target, address, architecture=fixed)
        except BaseException:
            self._machine_target.release()
            raise
        for vcpu in machine.vcpus:
            vcpu.attach(_ClosedFirst(self))

    def close(self) -> None:
        """End the session, telling gdb, and stop listening. The guest goes on, also one that waits for a gdb."""
        super().close()
        self._machine_target.release()
