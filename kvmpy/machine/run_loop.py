"""The one loop: KVM_RUN -> exit reason -> port or address -> device -> KVM_RUN.

`RunLoop.run` is the hot path, all of it. Each processor has its own loop with its own tables of resolved handlers, so
that an exit costs one dictionary look-up and the device's own method. What is not in a table (strings, accesses over a
border, ports that nobody claims, all other exits) takes the way below the loop.
"""

import ctypes

from kvmpy.errors import HandlerResultError
from kvmpy.kvm.exit_decoder import decode
from kvmpy.kvm.run_page import EXIT_REASON, NO_EXIT, NOT_FROM_THE_GUEST
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine.bus import Bus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmpy._exit import Exit
    from kvmpy.devices.device import Region

    Handler = Callable[..., Any]
    # Resolved access: the device's method, its offset, the size, where the data is, and how often it happened.
    Access = list[Any]

__all__ = ["RunLoop"]

IO, MMIO = 2, 6
_OUT = 1
_COUNT = 5
"""Index of the counter in a resolved access."""
_MAX_ACCESSES = 4096
"""A guest that touches more distinct addresses of MMIO devices starts with an empty table again."""


class RunLoop:
    """Runs one vCPU of a machine until `attend` says that it shall stop.

    `attend(errno)` is called between exits, when KVM_RUN came back with an error (EINTR after a kick or a tick), and
    `other(exit)` for exits that are neither port nor memory accesses; both answer True to leave the loop. `guard` wraps
    handlers where several vCPUs share them.
    """

    def __init__(
        self, vcpu: Vcpu, ports: Bus, mmio: Bus, *,
        attend: "Callable[[int], bool]", other: "Callable[[Exit], bool]", guard: "Callable[[Handler], Handler]",
    ) -> None:  # fmt: skip
        self.vcpu = vcpu
        self.ports = ports
        self.mmio = mmio
        self._attend = attend
        self._other = other
        self._guard = guard
        self._outs: dict[int, Access] = {}
        self._ins: dict[int, Access] = {}
        # By size, plus 16 for writes; MMIO data of other sizes takes the general way.
        self._mmio: list[dict[int, Access]] = [{} for _ in range(32)]
        self._seen = (0, 0)
        self.other_exits: dict[int, int] = {}
        """KVM_EXIT_* -> count, for what does not go through the tables."""
        self.settled_counts: dict[tuple[str, str, int, int], int] = {}
        """Counts of resolved accesses whose table was dropped: (kind, direction, address, size)."""

    def run(self) -> None:
        """Run until somebody says stop. An exit whose handler raises stays pending and is handled by the next run."""
        vcpu = self.vcpu
        page = vcpu.page
        enter = vcpu.enter
        fd, kvm_run, zero = vcpu.entry
        u8, u32, u64 = page.u8, page.u32, page.u64
        outs, ins, mmio = self._outs, self._ins, self._mmio
        buses_now = self._forget_old_handlers
        buses_now()
        pending = u32[2] not in NOT_FROM_THE_GUEST  # an exit whose handler raised, in an earlier run
        while True:
            if pending:
                pending = False
            elif enter(fd, kvm_run, zero) < 0:
                number = ctypes.get_errno()
                u32[2] = NO_EXIT
                if self._attend(number):
                    return
                buses_now()
                continue
            reason = u32[2]
            if reason == IO:
                key = u64[4]  # direction, size, port and count in one number
                access = outs.get(key)
                if access is not None:
                    write, offset, size, data, index, _ = access
                    write(offset, size, data[index])
                    u32[2] = NO_EXIT  # handled: see NO_EXIT
                    access[5] += 1
                    continue
                access = ins.get(key)
                if access is not None:
                    read, offset, size, data, index, _ = access
                    value = read(offset, size)
                    try:
                        data[index] = value
                    except (TypeError, ValueError):
                        raise HandlerResultError(_name(read), value, size) from None
                    u32[2] = NO_EXIT
                    access[5] += 1
                    continue
                self._port(key)
            elif reason == MMIO:
                access = mmio[u32[12] + 16 * u8[52]].get(u64[4])
                if access is not None:
                    call, offset, size, data, index, _ = access
                    if u8[52]:
                        call(offset, size, data[index])
                    else:
                        value = call(offset, size)
                        try:
                            data[index] = value
                        except (TypeError, ValueError):
                            raise HandlerResultError(_name(call), value, size) from None
                    u32[2] = NO_EXIT
                    access[5] += 1
                    continue
                self._memory()
            else:
                self.other_exits[reason] = self.other_exits.get(reason, 0) + 1
                page.runs[0] += 1  # replies to exits before this one come too late
                if self._other(decode(page)):
                    u32[2] = NO_EXIT
                    return
            u32[2] = NO_EXIT

    def dispatch(self) -> None:
        """Handle the access that the run page holds, the general way; other exits are nobody's here."""
        page = self.vcpu.page
        reason = page.u32[EXIT_REASON // 4]
        if reason == IO:
            self._port(page.u64[4])
        elif reason == MMIO:
            self._memory()
        page.u32[EXIT_REASON // 4] = NO_EXIT

    # The general way

    def _port(self, key: int) -> None:
        """A port access that no table has: resolve it for the next time, or handle it item by item."""
        page = self.vcpu.page
        out, size, port, count = key & 0xFF, key >> 8 & 0xFF, key >> 16 & 0xFFFF, key >> 32
        start = page.u64[5]
        if count == 1:
            region = self.ports.whole(port, size)
            if region is not None and (handler := region.write if out == _OUT else region.read) is not None:
                access = self._access(handler, region, port, size, start)
                (self._outs if out == _OUT else self._ins)[key] = access
        for at in range(start, start + size * count, size):
            if out == _OUT:
                value = int.from_bytes(page.u8[at : at + size], "little")
                self._guard(self.ports.write)(port, size, value)
            else:
                page.u8[at : at + size] = self._guard(self.ports.read)(port, size).to_bytes(size, "little")

    def _memory(self) -> None:
        """The same for a memory access."""
        page = self.vcpu.page
        address, size, write = page.u64[4], page.u32[12], page.u8[52]
        region = self.mmio.whole(address, size)
        if region is not None and size in (1, 2, 4, 8):
            handler = region.write if write else region.read
            table = self._mmio[size + 16 * write]
            if handler is not None:
                if len(table) >= _MAX_ACCESSES:
                    self._settle_counts()
                    table.clear()
                table[address] = self._access(handler, region, address, size, 40)
        if write:
            value = int.from_bytes(page.u8[40 : 40 + size], "little")
            self._guard(self.mmio.write)(address, size, value)
        else:
            page.u8[40 : 40 + size] = self._guard(self.mmio.read)(address, size).to_bytes(size, "little")

    def _access(self, handler: "Handler", region: "Region", address: int, size: int, start: int) -> "Access":
        page = self.vcpu.page
        view = {1: page.u8, 2: page.u16, 4: page.u32, 8: page.u64}[size]
        # The count starts at 1: the access that brought us here is handled by the caller.
        return [self._guard(handler), address - region.start + region.base, size, view, start // size, 1]

    def _forget_old_handlers(self) -> None:
        """Drop resolved handlers when devices have come or gone."""
        seen = (self.ports.changes, self.mmio.changes)
        if seen != self._seen:
            self._settle_counts()
            for table in (self._outs, self._ins, *self._mmio):
                table.clear()
            self._seen = seen

    # Statistics

    def counts(self) -> "dict[tuple[str, str, int, int], int]":
        """How often each resolved access happened: (kind, direction, address, size) -> count."""
        self._settle_counts()
        return dict(self.settled_counts)

    def _settle_counts(self) -> None:
        for direction, ports in (("write", self._outs), ("read", self._ins)):
            for key, access in list(ports.items()):
                self._settle("port", direction, key >> 16 & 0xFFFF, access)
        for index, table in enumerate(self._mmio):
            for address, access in list(table.items()):
                self._settle("mmio", "write" if index >= 16 else "read", address, access)

    def _settle(self, kind: str, direction: str, address: int, access: "Access") -> None:
        count, access[_COUNT] = access[_COUNT], 0
        if count:
            key = (kind, direction, address, access[2])
            self.settled_counts[key] = self.settled_counts.get(key, 0) + count


def _name(handler: "Handler") -> str:
    return getattr(handler, "__qualname__", repr(handler))
