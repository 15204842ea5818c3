"""The one loop: KVM_RUN -> exit reason -> port or address -> device -> KVM_RUN.

`RunLoop.run` is the hot path, all of it. Each processor has its own loop with its own tables of resolved handlers, so
that an exit costs one dictionary look-up and the device's own method. What is not in a table (strings, accesses over a
border, ports that nobody claims, all other exits) takes the way below the loop.
"""

import ctypes
from collections import deque
from itertools import islice

from kvmpy.errors import HandlerResultError
from kvmpy.kvm.exit_decoder import decode
from kvmpy.kvm.run_page import EXIT_REASON, NO_EXIT, NOT_FROM_THE_GUEST
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine.bus import Bus
from kvmpy.machine.recent_exits import KEPT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmpy._exit import Exit
    from kvmpy.kvm.coalesced_ring import CoalescedRing

    Handler = Callable[..., Any]
    Place = tuple[str, str, int, int]
    # Resolved access: the device's method, its offset, the size, where the data is (view and index), whether it is a
    # write, its place (kind, direction, address, size), and how often it happened.
    Access = list[Any]

__all__ = ["IO", "MMIO", "RunLoop", "handler_name"]

IO, MMIO = 2, 6
_OUT = 1
_MAX_ACCESSES = 4096
"""A guest that touches more distinct addresses of devices starts with empty tables again."""


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
        self.attend = attend
        self.other = other
        self.guard = guard
        # By u64[4] of the run page: direction, size, port and count in one number.
        self.port_accesses: dict[int, Access] = {}
        # By u64[6] and u64[4]: size and direction (with three bytes of padding that KVM leaves as they are); address.
        self.memory_accesses: dict[int, dict[int, Access]] = {}
        self._resolved = 0
        self._seen = (0, 0)
        self.queue: CoalescedRing | None = None
        """Writes that KVM queued instead of exiting; they come before whatever ended KVM_RUN."""
        self.take_queued = guard(self._handle_queued)
        self.items_done = 0
        """Items of the string in the run page that were handled before the handler of the next one raised."""
        self.after_access: Callable[[], object] | None = None
        """Called after each access, while somebody steps the guest; see `tell_accesses`."""
        self.other_exits: dict[int, int] = {}
        """KVM_EXIT_* -> count, for what does not go through the tables."""
        self.settled_counts: dict[Place, int] = {}
        """Counts of resolved accesses whose table was dropped."""
        self.without_exit = 0
        """Of the accesses in `counts`, those that came without an exit of their own: further items of strings, and
        queued writes; less the exits that are in no count, because nobody is there."""
        self.recent: deque[tuple[Place | None, Any]] = deque(maxlen=KEPT)
        """The last exits that were handled, for reports; see `kvmpy.machine.recent_exits`."""

    def run(self) -> None:
        """Run until somebody says stop. An exit whose handler raises stays pending and is handled by the next run.

        After an exit the processor's caches are cold, so what counts here is how few bytecodes there are: constants in
        local variables, arguments in a tuple that is made once, one table for both directions, no second look.
        """
        vcpu = self.vcpu
        enter, entry = vcpu.enter, vcpu.entry
        u32, u64 = vcpu.page.u32, vcpu.page.u64
        ports, memory = self.port_accesses, self.memory_accesses
        io, mmio, no_exit = IO, MMIO, NO_EXIT
        note = self.recent.append
        queue = self.queue is not None
        first = 0 if self.queue is None else self.queue.head
        last = first + 1
        self.forget_old_handlers()
        if u32[2] in NOT_FROM_THE_GUEST:
            self.items_done = 0
        elif self.handle():  # an exit whose handler raised, in an earlier run
            return
        while True:
            if enter(*entry) < 0:
                number = ctypes.get_errno()
                if queue and u32[first] != u32[last]:
                    self.take_queued()
                leave = self.attend(number)
                u32[2] = no_exit  # not before: a memory fault comes with an errno and is an exit nevertheless
                if leave:
                    return
                self.forget_old_handlers()
                continue
            if queue and u32[first] != u32[last]:  # they were written before what ended KVM_RUN
                self.take_queued()
            reason = u32[2]
            try:
                if reason == io:
                    access = ports[u64[4]]
                elif reason == mmio:
                    access = memory[u64[6]][u64[4]]
                else:
                    access = None
            except KeyError:
                access = None
            if access is None:
                if self.handle():
                    return
                continue
            call, offset, size, data, index, write, place, count = access
            if write:
                value = data[index]
                call(offset, size, value)
            else:
                value = call(offset, size)
                try:
                    data[index] = value
                except (TypeError, ValueError):
                    raise HandlerResultError(handler_name(call), value, size) from None
            u32[2] = no_exit  # handled: see NO_EXIT
            access[7] = count + 1
            note((place, value))

    def detach(self) -> None:
        """Never to run again: let go of `attend` and `other`, whose owner usually refers to this loop in a circle."""
        self.attend = lambda number: True
        self.other = lambda event: True

    def dispatch(self) -> None:
        """Handle the access that the run page holds, the general way; other exits are nobody's here."""
        reason = self.vcpu.page.exit_reason
        if reason == IO:
            self._port()
        elif reason == MMIO:
            self._memory()
        self.vcpu.page.u32[EXIT_REASON // 4] = NO_EXIT

    # The general way

    def handle(self) -> bool:
        """Handle the exit that the run page holds, whatever it is. True: leave the loop."""
        page = self.vcpu.page
        if self.queue is not None:  # what came before an exit whose handler raised, in an earlier run
            self.take_queued()
        reason = page.exit_reason
        leave = False
        if reason == IO:
            self._port()
        elif reason == MMIO:
            self._memory()
        else:
            self.other_exits[reason] = self.other_exits.get(reason, 0) + 1
            page.runs[0] += 1  # replies to exits before this one come too late
            event = decode(page)
            self.recent.append((None, event))
            leave = self.other(event)
        page.u32[EXIT_REASON // 4] = NO_EXIT
        if self.after_access is not None and reason in (IO, MMIO):
            self.after_access()
        return leave

    def _handle_queued(self) -> None:
        """Give the queued writes to their devices."""
        if self.queue is not None:
            self.queue.take(self.queued_write)

    def queued_write(self, port: bool, address: int, size: int, value: int) -> None:
        """Give one queued write to its device."""
        bus = self.ports if port else self.mmio
        region = bus.whole(address, size)
        if region is not None and region.write is not None:
            region.write(address - region.start + region.base, size, value)
        else:
            bus.write(address, size, value)
        place = ("port" if port else "mmio", "write", address, size)
        self.settled_counts[place] = self.settled_counts.get(place, 0) + 1
        self.without_exit += 1
        self.recent.append((place, value))

    def _port(self) -> None:
        """A port access that no table has: resolve it for the next time, and handle it item by item."""
        page = self.vcpu.page
        key, start = page.u64[4], page.u64[5]
        out, size, port, count = key & 0xFF, key >> 8 & 0xFF, key >> 16 & 0xFFFF, key >> 32
        if count > 1 and out != _OUT and self._read_string(port, size, start, count):
            return
        for at in range(start + size * self.items_done, start + size * count, size):
            if out == _OUT:
                value = int.from_bytes(page.u8[at : at + size], "little")
                self.guard(self.ports.write)(port, size, value)
            else:
                value = self.guard(self.ports.read)(port, size)
                page.u8[at : at + size] = value.to_bytes(size, "little")
            self.items_done += 1
            self.recent.append((("port", "write" if out == _OUT else "read", port, size), value))
        self.items_done = 0
        if count == 1:
            self._resolve(self.port_accesses, key, self.ports, port, size, start, out == _OUT)
        else:
            self._count(self.ports, port, size, out == _OUT, count)

    def _read_string(self, port: int, size: int, start: int, count: int) -> bool:
        """Have a device that can do so answer all items of a string at once. False: it cannot, or has begun already."""
        region = self.ports.whole(port, size)
        if region is None or region.read_string is None or self.items_done:
            return False
        data = self.guard(region.read_string)(port - region.start + region.base, size, count)
        try:
            self.vcpu.page.u8[start : start + size * count] = data
        except (TypeError, ValueError):
            raise HandlerResultError(handler_name(region.read_string), data, size * count) from None
        self.recent.append((("port", "read", port, size), int.from_bytes(data[-size:], "little")))
        self._count(self.ports, port, size, False, count)
        return True

    def _memory(self) -> None:
        """The same for a memory access."""
        page = self.vcpu.page
        address, size, write, kind = page.u64[4], page.u32[12], page.u8[52], page.u64[6]
        if write:
            value = int.from_bytes(page.u8[40 : 40 + size], "little")
            self.guard(self.mmio.write)(address, size, value)
        else:
            value = self.guard(self.mmio.read)(address, size)
            page.u8[40 : 40 + size] = value.to_bytes(size, "little")
        self.recent.append((("mmio", "write" if write else "read", address, size), value))
        if size in (1, 2, 4, 8):
            if self._resolved >= _MAX_ACCESSES:
                self._forget()
            table = self.memory_accesses.setdefault(kind, {})
            self._resolve(table, address, self.mmio, address, size, 40, bool(write))
        else:
            self.without_exit -= 1

    def _resolve(
        self, table: "dict[int, Access]", key: int, bus: Bus, address: int, size: int, start: int, write: bool
    ) -> None:
        """Note for the next time who handles an access, if one device does, and count this one."""
        region = bus.whole(address, size)
        if region is None or self.after_access is not None:
            self._count(bus, address, size, write)
            return
        if (handler := region.write if write else region.read) is None:
            self.without_exit -= 1
            return
        if key not in table:
            page = self.vcpu.page
            view = {1: page.u8, 2: page.u16, 4: page.u32, 8: page.u64}[size]
            offset = address - region.start + region.base
            place = (bus.kind, "write" if write else "read", address, size)
            table[key] = [self.guard(handler), offset, size, view, start // size, write, place, 0]
            self._resolved += 1
        table[key][7] += 1

    def _count(self, bus: Bus, address: int, size: int, write: bool, times: int = 1) -> None:
        """Count what no table does: strings, and what several devices answer, as accesses where they begin."""
        self.without_exit -= 1
        region = bus.find(address)
        if region is not None and (region.write if write else region.read) is not None:
            place, counts = (bus.kind, "write" if write else "read", address, size), self.settled_counts
            if len(counts) < _MAX_ACCESSES or place in counts:
                counts[place] = counts.get(place, 0) + times
                self.without_exit += times

    def forget_old_handlers(self) -> None:
        """Drop resolved handlers when devices have come or gone."""
        seen = (self.ports.changes, self.mmio.changes)
        if seen != self._seen:
            self._forget()
            self._seen = seen

    def _forget(self) -> None:
        # The first that were seen stay listed: a guest that scans a large device must not fill the host's memory.
        counts = self.counts()
        self.settled_counts = dict(islice(counts.items(), _MAX_ACCESSES))
        self.without_exit -= sum(counts.values()) - sum(self.settled_counts.values())
        self.port_accesses.clear()
        self.memory_accesses.clear()
        self._resolved = 0

    def tell_accesses(self, call: "Callable[[], object] | None") -> None:
        """Call `call` after each access, or no longer. All accesses go the general way meanwhile."""
        if call is not self.after_access:
            self.after_access = call
            self._forget()

    # Statistics

    def counts(self) -> "dict[Place, int]":
        """How often each resolved access happened: (kind, direction, address, size) -> count."""
        counts = dict(self.settled_counts)
        for table in (self.port_accesses, *list(self.memory_accesses.values())):
            for access in list(table.values()):
                place, count = access[6:]
                counts[place] = counts.get(place, 0) + count
        return counts


def handler_name(handler: "Handler") -> str:
    """What errors call a handler."""
    return getattr(handler, "__qualname__", repr(handler))
