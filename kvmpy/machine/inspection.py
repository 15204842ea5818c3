"""What one sees of a machine: counts, the last exits, symbols, breakpoints, steps, traces, crash reports, gdb.

Mixed into `Machine`. The tools themselves are in `kvmpy.debug`, the layer above: a method imports its tool when it is
called, so that a machine that nobody looks into pays nothing. This is the one module with such doors.
"""

from kvmpy.errors import UsageError
from kvmpy.machine.recent_exits import recent_exits
from kvmpy.machine.run_control import RunControl

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any, Literal

    from kvmpy._exit import Exit
    from kvmpy.boot.image import Image
    from kvmpy.debug.breakpoint import Breakpoint, Condition, Handler, Watchpoint
    from kvmpy.debug.coverage import Coverage
    from kvmpy.debug.crash_report import CrashReport
    from kvmpy.debug.debugger import Debugger
    from kvmpy.debug.gdb.server import GdbServer
    from kvmpy.debug.profile import Profile
    from kvmpy.debug.symbols import LineTable, SymbolTable
    from kvmpy.debug.trace import Tracer
    from kvmpy.kvm import Vm
    from kvmpy.machine.bus import Bus
    from kvmpy.machine.outcome import Outcome
    from kvmpy.machine.recent_exits import DeviceAccess
    from kvmpy.machine.statistics import Statistics
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["Inspection"]


class Inspection:
    """The methods of `Machine` through which one looks into the guest."""

    vm: "Vm"
    ports: "Bus"
    mmio: "Bus"
    image: "Image | None" = None
    """What `load` was given last."""
    _runners: "list[VcpuRunner]"
    _control: RunControl
    crash_reports = True
    """Whether a bad end is looked into at once, for `Outcome.report`; False saves some milliseconds then."""
    _debugger: "Debugger | None" = None
    _symbols: "SymbolTable | None" = None
    _lines: "LineTable | None" = None

    def _run_here(self, runners: "list[VcpuRunner]", timeout: float | None, check: bool) -> "Outcome":
        raise NotImplementedError

    @property
    def runners(self) -> "tuple[VcpuRunner, ...]":
        """What runs the vCPUs, in their order: for tools that need to be between two exits."""
        return tuple(self._runners)

    # What happened

    def statistics(self) -> "Statistics":
        """What the guest did so far."""
        from kvmpy.machine.statistics import collect

        return collect(self._runners, (self.ports, self.mmio))

    def recent_exits(self, vcpu: int = 0) -> "tuple[DeviceAccess | Exit, ...]":
        """The last exits of a vCPU, by its place in `vcpus`, that were handled; the oldest first."""
        return recent_exits(self._runners[vcpu].loop.recent)

    def crash_report(self, outcome: "Outcome | None" = None) -> "CrashReport":
        """Everything about the guest as it stands now, and what most likely went wrong; see `CrashReport`.

        After a bad end it is `outcome.report` already. No vCPU may run meanwhile.
        """
        from kvmpy.debug.crash_report import CrashReport

        return CrashReport.capture(self, outcome)  # type: ignore[arg-type]

    def trace(self, path: "str | os.PathLike[str] | None" = None, **options: "Any") -> "Tracer":
        """Record every exit while a `with` block lasts: to a file, or the last ones in memory.

        `with machine.trace("boot.html"): machine.run()`. `options` are those of `kvmpy.debug.trace.Tracer`: format,
        filters, ring, steps. Without a trace nothing of it costs anything.
        """
        from kvmpy.debug.trace import Tracer

        return Tracer(self, path, **options)  # type: ignore[arg-type]

    def coverage(self, method: "Literal['steps', 'breakpoints']" = "steps", **options: "Any") -> "Coverage":
        """Which code the guest executes while a `with` block lasts, as addresses, blocks, lines, lcov or drcov.

        By single steps, or by breakpoints that go when they are reached; `options` are those of
        `kvmpy.debug.coverage.Coverage`.
        """
        from kvmpy.debug.coverage import Coverage

        return Coverage(self, method, **options)  # type: ignore[arg-type]

    def profile(self, *, interval: float = 0.01, symbols: "SymbolTable | None" = None) -> "Profile":
        """Where the guest spends its time while a `with` block lasts, by function, and what Python takes of it.

        A sample every `interval` seconds. `symbols` are those of the image unless others are given. See
        `kvmpy.debug.profile.Profile`.
        """
        from kvmpy.debug.profile import Profile

        return Profile(self, interval=interval, symbols=symbols)  # type: ignore[arg-type]

    # Symbols

    @property
    def symbols(self) -> "SymbolTable":
        """Names of addresses: those of the image that was loaded, unless set to others. An empty table without."""
        if self._symbols is None:
            from kvmpy.debug.symbols import SymbolTable

            self._symbols = SymbolTable.of_image(self.image) if self.image is not None else SymbolTable.from_dict({})
        return self._symbols

    @symbols.setter
    def symbols(self, table: "SymbolTable") -> None:
        self._symbols = table

    @property
    def lines(self) -> "LineTable | None":
        """Source lines of addresses, from the DWARF of the loaded ELF file; None without."""
        if self._lines is None and self.image is not None:
            from kvmpy.debug.symbols import LineTable

            self._lines = LineTable.of_image(self.image)
        return self._lines

    # Stopping the guest

    @property
    def debugger(self) -> "Debugger":
        """The machine's debugger, made when it is first asked for; see `kvmpy.debug.debugger`."""
        if self._debugger is None:
            from kvmpy.debug.debugger import Debugger

            self._debugger = Debugger(self)  # type: ignore[arg-type]
        return self._debugger

    def breakpoint(
        self, where: int | str, handler: "Handler | None" = None, *, condition: "Condition | None" = None,
        hardware: bool | None = None, temporary: bool = False,
    ) -> "Breakpoint":  # fmt: skip
        """Call `handler(vcpu, breakpoint)` before the guest executes an instruction.

        `where` is its address, a symbol, or a source line as "main.c:12".

        Without a handler the run ends with End.BREAKPOINT, and the next one goes on. See `Debugger.breakpoint`.
        """
        return self.debugger.breakpoint(
            where, handler, condition=condition, hardware=hardware, temporary=temporary
        )  # fmt: skip

    def watchpoint(
        self, where: int | str, length: int = 1, handler: "Handler | None" = None, *, access: str = "write",
        condition: "Condition | None" = None, hardware: bool | None = None,
    ) -> "Watchpoint":  # fmt: skip
        """Call `handler(vcpu, watchpoint)` after the guest writes to (`access="access"`: or reads) memory.

        Without a handler the run ends with End.BREAKPOINT. See `Debugger.watchpoint`.
        """
        return self.debugger.watchpoint(
            where, length, handler, access=access, condition=condition, hardware=hardware
        )  # fmt: skip

    def step(self, count: int = 1, *, vcpu: int = 0, timeout: float | None = 10.0) -> "Outcome":
        """Run one vCPU, by its place in `vcpus`, for `count` instructions, the others stand.

        The outcome is End.STOPPED when they are done, or how the guest ended before; interrupts wait meanwhile where
        KVM can hold them back (KVM_GUESTDBG_BLOCKIRQ). In ring 3 of some hosts steps do not come out: a timeout.
        """
        if not isinstance(count, int) or count < 1:
            raise UsageError(f"a step is one instruction or more, not {count!r}")
        runner = self._runners[vcpu]
        self.debugger.plan_steps(runner.vcpu, count)
        try:
            return self._run_here([runner], timeout, False)
        finally:
            self.debugger.plan_steps(runner.vcpu, 0)

    def serve_gdb(
        self, address: "tuple[str, int] | str" = ("127.0.0.1", 1234), *, wait: bool = False,
        architecture: str | None = None,
    ) -> "GdbServer":  # fmt: skip
        """Let gdb debug this machine (`target remote :1234`) while a `with` block lasts, or until `close`.

        `address` is (host, port), with port 0 for any, or the path of a UNIX socket. With `wait` the guest stands until
        a gdb has attached and let it go. See `kvmpy.debug.gdb.server.GdbServer`.
        """
        from kvmpy.debug.gdb.server import GdbServer

        return GdbServer(self, address, wait=wait, architecture=architecture)  # type: ignore[arg-type]
