"""How a run of a machine ended."""

from enum import StrEnum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy._exit import Exit
    from kvmpy.debug.crash_report import CrashReport

__all__ = ["CRASHES", "End", "Outcome"]


class End(StrEnum):
    """The ways a run can end."""

    HALTED = "halted"  # every processor executed HLT and nothing can wake one
    SHUTDOWN = "shutdown"  # the guest switched itself off
    RESET = "reset"  # the guest asked for a reset
    EXITED = "exited"  # the guest wrote an exit code to a debug-exit port
    PANIC = "panic"  # the guest reported that it crashed
    TRIPLE_FAULT = "triple fault"
    FAILED = "failed"  # KVM gave up, or an exit came that nobody handles
    TIMEOUT = "timeout"  # the guest goes on where it was with the next run
    STOPPED = "stopped"  # by Machine.stop(); goes on with the next run
    BREAKPOINT = "breakpoint"  # a breakpoint or watchpoint without a handler; goes on with the next run


_WELL = frozenset((End.HALTED, End.SHUTDOWN, End.RESET, End.STOPPED, End.BREAKPOINT))

CRASHES = frozenset((End.TRIPLE_FAULT, End.FAILED, End.PANIC, End.TIMEOUT))
"""The ends after which somebody will want to know where the guest was."""


class Outcome:
    """How a run ended: `end` is an `End`, `message` says it in a sentence, `code` is the exit code after End.EXITED.

    `exit` is the KVM exit that ended the run, and `vcpu` the id of the processor it came from, where there was one.
    `console` is what a kernel that panicked printed last (see `Machine.watch_for_panic`), or empty.
    `completed` counts the instructions that KVM gave up on and that were done in software, by name.
    `report` explains a bad end: `print(outcome.report)`.
    """

    __match_args__ = ("end", "message", "code", "exit", "vcpu")
    __slots__ = (*__match_args__, "completed", "console", "report")

    def __init__(
        self,
        end: End,
        message: str = "",
        *,
        code: int | None = None,
        exit: "Exit | None" = None,
        vcpu: int | None = None,
        console: str = "",
    ) -> None:
        self.end = end
        self.message = message
        self.code = code
        self.exit = exit
        self.vcpu = vcpu
        self.console = console
        self.completed: dict[str, int] = {}
        self.report: CrashReport | None = None

    @property
    def ok(self) -> bool:
        """Whether the guest ended well: halted, shut down, reset, was stopped, or exited having written 0.

        A debug-exit port turns the value v that the guest writes into the code (v << 1) | 1, so 0 arrives as 1.
        """
        return self.end in _WELL or (self.end is End.EXITED and self.code in (0, 1))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Outcome):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__match_args__)

    def __hash__(self) -> int:
        return hash((self.end, self.message, self.code, self.vcpu))

    def __str__(self) -> str:
        code = f" with code {self.code}" if self.code is not None else ""
        return f"{self.end}{code}" + (f": {self.message}" if self.message else "")

    def __repr__(self) -> str:
        return f"<Outcome {self}>"

    def _repr_html_(self) -> str:
        """For notebooks: how the run ended, and the crash report, if there is one."""
        from kvmpy.x86.html_text import preformatted

        report = "" if self.report is None else self.report._repr_html_()
        return preformatted(str(self), () if self.ok else (str(self.end),)) + report
