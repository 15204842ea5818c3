"""A guest that stands: why, where, and what changed since it went on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmpy.debug.prompt.source_text import line_text, short_path
from kvmpy.machine.outcome import CRASHES, End

if TYPE_CHECKING:
    from kvmpy.debug.prompt.register_changes import RegisterChange
    from kvmpy.debug.symbols import SourceLine
    from kvmpy.machine import Outcome
    from kvmpy.x86.registers import CpuState

__all__ = ["Place", "Stopped"]

_TOLD_BY_REPORT = CRASHES - {End.TIMEOUT}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one vCPU stands: at a linear `address`, before `instruction`.

    `symbol` is "main+0x12" or empty; `far` is "1000:2345" where the code segment has a base; `instruction` is empty
    when it cannot be read.
    """

    vcpu: int
    address: int
    symbol: str = ""
    far: str = ""
    source: SourceLine | None = None
    instruction: str = ""

    def __str__(self) -> str:
        words = [f"{self.address:#x}"]
        if self.symbol:
            words.append(f"<{self.symbol}>")
        if self.far:
            words.append(f"({self.far})")
        text = " ".join(words)
        if self.source is not None:
            text += f", {short_path(self.source.file)}:{self.source.line}"
            line = line_text(self.source)
            text += f"  {line}" if line else ""
        return f"{text}\n=> {self.instruction or 'no code can be read there'}"


@dataclass(frozen=True, slots=True)
class Stopped:
    """What a step or a run led to. `reason` says why the guest stands, empty after steps that went as asked.

    `outcome` is None for a guest that was not run, or that Ctrl-C stopped. `others`: the machine has more than one
    vCPU. Prints the reason, the place, and the registers that changed: old -> new.
    """

    place: Place
    state: CpuState
    changes: tuple[RegisterChange, ...] = ()
    reason: str = ""
    outcome: Outcome | None = None
    others: bool = False

    def __str__(self) -> str:
        return "\n".join([*self._head(), *(f"   {change}" for change in self.changes)])

    def _head(self) -> list[str]:
        lines = []
        if self.reason:
            lines.append(self.reason)
        if self.outcome is not None and self.outcome.end in _TOLD_BY_REPORT:
            lines.append("report() explains it")
        lines.append(f"vCPU {self.place.vcpu} at {self.place}" if self.others else str(self.place))
        return lines

    def _repr_html_(self) -> str:
        """The same, but with all general registers, the changed ones marked."""
        from kvmpy.x86.html_text import preformatted
        from kvmpy.x86.register_text import general_registers_text, rflags_text

        marked, rest = [], []
        for change in self.changes:
            if change.name == "rflags":
                marked.append(f"rflags {rflags_text(self.state.regs.rflags)}")
            elif hasattr(self.state.regs, change.name):
                marked.append(f"{change.name:<3} {change.after:016x}")
            else:
                rest.append(str(change))
        lines = [*self._head(), general_registers_text(self.state.regs), *rest]
        return preformatted("\n".join(lines), [*marked, *rest])
