"""Where code goes from an instruction on, as far as it can be read off: the loop that a guest is in."""

from __future__ import annotations

from collections import deque

from kvmpy._value import frozen
from kvmpy.debug.crash_report.first_event.decoder import Decoded, decode
from kvmpy.debug.crash_report.first_event.execution import Execution

__all__ = ["Located", "find_loop", "following", "ways_out"]

_MOST = 256
"""Instructions looked at."""
_ENDS = frozenset((0xC2, 0xC3, 0xCA, 0xCB, 0xCF, 0xEA, 0x0F0B, 0x0F07, 0x0F35, 0x0F05, 0x0F34))


@frozen
class Located:
    """An instruction and its offset in the code segment."""

    offset: int
    decoded: Decoded


def find_loop(execution: Execution, start: int) -> tuple[Located, ...]:
    """The shortest way from the instruction at offset `start` back to it, calls taken to return; empty: there is none.

    It begins with the instruction at `start`.
    """
    first = _instruction(execution, start)
    if first is None:
        return ()
    before: dict[int, Located | None] = {start: None}
    waiting = deque([first])
    while waiting and len(before) < _MOST:
        here = waiting.popleft()
        for target in following(execution, here):
            if target == start:
                return _path(here, before)
            if target in before:
                continue
            instruction = _instruction(execution, target)
            before[target] = here
            if instruction is not None:
                waiting.append(instruction)
    return ()


def ways_out(execution: Execution, loop: tuple[Located, ...]) -> tuple[Located, ...]:
    """The instructions of a loop that may also lead elsewhere; without one it never ends. Calls count as returning."""
    offsets = {located.offset for located in loop}
    return tuple(located for located in loop if not set(following(execution, located)) <= offsets)


def _path(last: Located, before: dict[int, Located | None]) -> tuple[Located, ...]:
    path = [last]
    while (previous := before[path[-1].offset]) is not None:
        path.append(previous)
    return tuple(reversed(path))


def _instruction(execution: Execution, offset: int) -> Located | None:
    data = b""
    for size in (15, 8, 4, 2, 1):  # fewer when memory ends here
        found = execution.read("cs", offset, size)
        if found is not None:
            data = found
            break
    decoded = decode(data, execution.bits)
    return Located(offset, decoded) if decoded is not None else None


def following(execution: Execution, located: Located) -> tuple[int, ...]:
    """The offsets where the instruction may lead, those of jumps first; none when that is not in the code."""
    decoded, opcode = located.decoded, located.decoded.opcode
    width = 64 if execution.bits == 64 else decoded.operand_bits
    mask = (1 << width) - 1
    after = located.offset + decoded.length & mask
    target = after + decoded.signed_immediate & mask
    if opcode in (0xE9, 0xEB):
        return (target,)
    if 0x70 <= opcode <= 0x7F or opcode & 0xFFF0 == 0x0F80 or 0xE0 <= opcode <= 0xE3:
        return target, after
    if opcode in _ENDS or (opcode == 0xFF and decoded.group in (4, 5)):
        return ()
    return (after,)
