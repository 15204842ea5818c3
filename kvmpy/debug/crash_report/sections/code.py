"""The instruction, what stands before and after it, and the last instructions of a replay."""

from __future__ import annotations

from typing import Any

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.first_event import Execution, read_linear
from kvmpy.debug.crash_report.sections.section import Contents, SectionBuilder
from kvmpy.debug.disassembly import BYTES, Disassembler, Instruction, annotate
from kvmpy.x86.registers import CpuState

__all__ = ["CODE", "STEPS", "instruction_text"]

_BEFORE, _AFTER = 8, 5
_WINDOW = 256
"""Bytes before RIP that are read: enough for the instructions before it to fall into step."""
_STEPS_SHOWN = 24


def instruction_text(case: Case) -> str:
    """The instruction at RIP as text; empty when it cannot be read or no disassembler is installed."""
    disassembler = Disassembler()
    if not disassembler.available or not case.execution.code:
        return ""
    place = case.blamed_instruction
    found = disassembler.disassemble(read_linear(case.memory, case.state, place, 15), place, case.execution.bits, 1)
    return annotate(found[0], case.evidence.symbols) if found and found[0].mnemonic != BYTES else ""


def _fill(case: Case, contents: Contents) -> None:
    disassembler = Disassembler()
    rip, bits = case.rip, case.execution.bits
    contents.data = []
    code = case.execution.code
    before = _before(case, disassembler)
    after = disassembler.disassemble(read_linear(case.memory, case.state, rip, 64), rip, bits, _AFTER + 1)
    if disassembler.advice:
        length = case.execution.decoded.length if case.execution.decoded is not None else len(code)
        after = disassembler.disassemble(code[:length], rip, bits)
    symbols, line_of = case.evidence.symbols, None
    for instruction in (*before, *after):
        here = instruction.address == case.blamed_instruction
        symbol = symbols.at(instruction.address) if symbols is not None else None
        line = case.evidence.lines.at(instruction.address) if case.evidence.lines is not None else None
        if symbol is not None and not symbol.offset:
            contents.add(f"{symbol}:")
        if line is not None and str(line) != line_of:
            contents.add(f"   ; {line}")
            line_of = str(line)
        text = annotate(instruction, symbols) if instruction.mnemonic != BYTES else "no instruction"
        if disassembler.advice:
            text = ""
        shown = f"{instruction.address:#10x}  {instruction.bytes.hex(' '):<24} {text}".rstrip()
        contents.add(f"{'=>' if here else '  '} {shown}", mark=here)
        contents.data.append(_data(instruction, text, symbol, line, here))
    if not code:
        contents.add(f"=> {rip:#10x}  no code can be read here", mark=True)
    if disassembler.advice:
        contents.add(f"   ({disassembler.advice})")
    if case.evidence.halted or case.evidence.end == "halted":
        contents.add("   (HLT has been executed: RIP is behind it)")


def _data(instruction: Instruction, text: str, symbol: object, line: object, current: bool) -> dict[str, Any]:
    return {
        "address": instruction.address,
        "bytes": instruction.bytes.hex(),
        "text": text,
        "symbol": str(symbol) if symbol is not None else None,
        "source": str(line) if line is not None else None,
        "current": current,
    }


def _before(case: Case, disassembler: Disassembler) -> list[Instruction]:
    """The instructions before RIP, as far back as memory can be read."""
    rip = case.rip
    code, start = b"", rip
    for size in (_WINDOW, 64, 32, 16, 8, 4, 2, 1):
        start = rip - size
        if start < 0:
            continue
        code = read_linear(case.memory, case.state, start, size)
        if len(code) == size:
            break
    else:
        return []
    symbols = case.evidence.symbols
    found = symbols.at(rip) if symbols is not None else None
    known = rip - found.offset if found is not None and found.offset else _entry(case)
    if not any(code[-16:]):
        return []  # zeros are no code worth showing
    return disassembler.before(code, start, rip, case.execution.bits, _BEFORE, start=known)


def _entry(case: Case) -> int | None:
    """Where the guest started, an address at which an instruction begins for sure."""
    entry = case.evidence.entry_state
    if entry is None:
        return None
    start = Execution(case.memory, entry).rip
    return start if start < case.rip else None


# A replay


def _fill_steps(case: Case, contents: Contents) -> None:
    steps = case.evidence.steps
    if not steps:
        return
    disassembler = Disassembler()
    contents.data = {"count": case.evidence.step_count, "last": []}
    contents.add(f"{case.evidence.step_count} instructions were stepped through; the last of them:")
    for index, step in enumerate(steps[-_STEPS_SHOWN:], max(0, len(steps) - _STEPS_SHOWN)):
        execution = Execution(case.memory, step.state)
        found = disassembler.disassemble(execution.code, execution.rip, execution.bits, 1)
        text = annotate(found[0], case.evidence.symbols) if found and not disassembler.advice else ""
        text = text or execution.code[:8].hex(" ")
        following = steps[index + 1].state if index + 1 < len(steps) else None
        changes = _changes(step.state, following)
        last = following is None
        contents.add(f"{'=>' if last else '  '} {execution.rip:#10x}  {text:<40} {changes}".rstrip(), mark=last)
        contents.data["last"].append({"address": execution.rip, "text": text, "changes": changes})


def _changes(state: CpuState, following: CpuState | None) -> str:
    """The general registers that an instruction changed, "rax 0x1 -> 0x2"."""
    if following is None:
        return ""
    differing = state.regs.differences(following.regs)
    shown = [f"{name}={there:#x}" for name, (_, there) in differing.items() if name != "rip"]
    system = state.sregs.differences(following.sregs)
    shown += [
        f"{name}={there:#x}" if isinstance(there, int) else f"{name} loaded" for name, (_, there) in system.items()
    ]
    return " ".join(shown)


CODE = SectionBuilder("code", "The instruction", _fill)
STEPS = SectionBuilder("steps", "The last instructions", _fill_steps)
