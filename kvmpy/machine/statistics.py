"""What a machine's guest did so far: exits by reason, accesses by port and address, and what nobody claimed."""

from kvmpy.abi.exit_reasons import EXIT_REASONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmpy.machine.bus import Bus
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["AccessCount", "Statistics", "collect"]


class AccessCount:
    """`count` accesses of `size` bytes: `kind` is "port" or "mmio", `direction` "read" or "write"."""

    __slots__ = __match_args__ = ("kind", "direction", "address", "size", "count")

    def __init__(self, kind: str, direction: str, address: int, size: int, count: int) -> None:
        self.kind = kind
        self.direction = direction
        self.address = address
        self.size = size
        self.count = count

    def line(self) -> str:
        """One line of a table: count, bus, direction, address, width in bits."""
        place = f"{self.kind} {self.direction:<5} {self.address:#x}"
        return f"{self.count:>10}  {place:<20} {8 * self.size:>3} bits"

    def __repr__(self) -> str:
        return f"<{self.count} x {self.kind} {self.direction} {self.address:#x}, {self.size} bytes>"


class Statistics:
    """`accesses` that devices answered, `unclaimed` ones, and all other `exits` by KVM_EXIT_ name.

    `completed` are instructions that KVM gave up on and that were done in software, by name. `total` is how often the
    guest left for an exit, whatever it was: a string instruction, which is many accesses, leaves once for a piece of
    it, a write that KVM queued does not leave at all, and what KVM does by itself is not seen here.
    """

    __slots__ = ("accesses", "completed", "exits", "total", "unclaimed")

    def __init__(
        self,
        accesses: tuple[AccessCount, ...],
        unclaimed: tuple[AccessCount, ...],
        exits: dict[str, int],
        completed: dict[str, int] | None = None,
        total: int = 0,
    ) -> None:
        self.accesses = accesses
        self.completed = completed or {}
        self.unclaimed = unclaimed
        self.exits = exits
        self.total = total

    def count(self, kind: str, address: int, direction: str | None = None) -> int:
        """How often devices were accessed at one port or address."""
        return sum(
            access.count
            for access in self.accesses
            if access.kind == kind and access.address == address and direction in (None, access.direction)
        )

    def __str__(self) -> str:
        lines = [access.line() for access in self.accesses]
        lines += [f"{count:>10}  {name}" for name, count in self.exits.items()]
        lines += [f"{count:>10}  {name} done in software" for name, count in self.completed.items()]
        lines += [f"{access.line()}  (nobody there)" for access in self.unclaimed]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from kvmpy.x86.html_text import preformatted

        return preformatted(str(self) or "nothing so far")


def collect(runners: "Iterable[VcpuRunner]", buses: "Iterable[Bus]") -> Statistics:
    """Add up the counts of all vCPUs. Those of a vCPU that runs at this moment may be a few behind."""
    completed: dict[str, int] = {}
    totals: dict[tuple[str, str, int, int], int] = {}
    others: dict[str, int] = {}
    total = 0
    for runner in runners:
        if runner.completion is not None:
            for name, count in list(runner.completion.counts.items()):
                completed[name] = completed.get(name, 0) + count
        loop = runner.loop
        total -= loop.without_exit
        for key, count in loop.counts().items():
            totals[key] = totals.get(key, 0) + count
            total += count
        for reason, count in loop.other_exits.items():
            name = EXIT_REASONS.get(reason, f"exit {reason}").removeprefix("KVM_EXIT_")
            others[name] = others.get(name, 0) + count
            total += count
    accesses = tuple(AccessCount(*key, count) for key, count in sorted(totals.items()))
    unclaimed = tuple(
        AccessCount(bus.kind, *key, count) for bus in buses for key, count in sorted(bus.unclaimed.items())
    )
    return Statistics(accesses, unclaimed, others, completed, total)
