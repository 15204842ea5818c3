"""Machine code as text: Intel syntax, by capstone where the extra `debug` is installed, else as bytes."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvmpy._value import frozen
from kvmpy.debug.capstone_library import library_decoder
from kvmpy.errors import UsageError

if TYPE_CHECKING:
    from kvmpy.debug.symbols import SymbolTable

__all__ = ["BYTES", "Disassembler", "Instruction", "annotate"]

BYTES = ".byte"
"""The mnemonic of bytes that are no instruction, or that cannot be decoded here."""

LONGEST_INSTRUCTION = 15
"""Bytes; a longer one raises #GP (SDM vol. 2, 2.3.11)."""
CHUNK = 0x1000
LEAD = 64
"""How far before the instructions that are wanted decoding starts, to fall into step. A few instructions do."""
SMALLEST_ADDRESS = 0x1000
"""Smaller numbers in operands are taken as numbers, not as addresses."""

_ADVICE = "instructions are shown as bytes; capstone disassembles them: pip install 'kvmpy[debug]'"
_ADDRESS_MASK = (1 << 64) - 1
_BRANCH = re.compile(r"(?:.* )?(?:j\w+|call|loop\w*|xbegin)")
_NUMBER = re.compile(r"0x[0-9a-f]+|[0-9]")
_RIP_RELATIVE = re.compile(r"\[rip ([+-]) (0x[0-9a-f]+|[0-9])\]")
_ADDRESS = re.compile(r"(?P<minus>- )?(?P<digits>0x[0-9a-f]+)(?P<memory>\])?")


@frozen
class Instruction:
    """One instruction: where it is, its bytes, and its text in Intel syntax. Prints as "mov eax, dword ptr [rbx]"."""

    address: int
    bytes: bytes
    mnemonic: str
    operands: str

    @property
    def end(self) -> int:
        """The address of what follows it."""
        return self.address + len(self.bytes)

    @property
    def target(self) -> int | None:
        """Where a jump or call goes that has its target in it; None for others."""
        if _BRANCH.fullmatch(self.mnemonic) and _NUMBER.fullmatch(self.operands):
            return int(self.operands, 0)
        return None

    def __str__(self) -> str:
        return f"{self.mnemonic} {self.operands}".rstrip()


class Disassembler:
    """Decodes 16-, 32- and 64-bit code: `bits` is one of these, see `kvmpy.x86.register_text.code_bits`.

    In a segment whose base is not 0 give linear addresses: then the targets of branches are linear addresses, too.
    Without capstone everything is bytes, and `available` false. Methods raise UsageError for another width.
    """

    @property
    def available(self) -> bool:
        """Whether capstone is installed, so that there are instructions."""
        return _engine(64) is not None

    @property
    def advice(self) -> str:
        """What to do to get instructions; empty when there is nothing to do."""
        return "" if self.available else _ADVICE

    def disassemble(self, code: bytes, address: int, bits: int, count: int | None = None) -> list[Instruction]:
        """The instructions in `code`, which stands at `address`; at most `count` of them.

        Bytes that are no instruction, or only the first ones of one, become an entry with the mnemonic ".byte", as long
        as they go on. Without capstone that is the one entry for all of `code`.
        """
        engine = _engine(bits)
        if engine is None:
            return [_as_bytes(address, code)] if code and count != 0 else []
        found: list[Instruction] = []
        at = unknown = 0  # `unknown` bytes before `at` are no instruction
        while at < len(code) and (count is None or len(found) < count):
            before = at
            left = 0 if count is None else count - len(found)
            # In chunks: capstone decodes all that it gets. Where one ends within an instruction, the next one starts.
            for instruction in _decoded(engine, code[at : at + CHUNK], address + at, left):
                if unknown:
                    found.append(_as_bytes(address + at - unknown, code[at - unknown : at]))
                    unknown = 0
                found.append(instruction)
                at += len(instruction.bytes)
            if at == before:
                at += 1
                unknown += 1
        if unknown:
            found.append(_as_bytes(address + at - unknown, code[at - unknown : at]))
        return found[:count]

    def before(
        self, code: bytes, address: int, rip: int, bits: int, count: int, *, start: int | None = None
    ) -> list[Instruction]:
        """The last `count` instructions of those that end at `rip`, in the order of addresses; fewer if there are none.

        `code` stands at `address`, and reaches up to `rip` at least; 15 bytes for each instruction and 64 more are
        plenty. `start` is an address where an instruction starts, such as that of the symbol that covers `rip`: from
        there decoding is exact. Without it, and when decoding from there does not lead to `rip`, it is a guess: x86
        code cannot be decoded backwards, but decoding falls into step wherever it starts, so the longest way that leads
        to `rip` is taken. Without capstone one entry has the last bytes.

        Raises UsageError when `rip` is not in or right behind `code`.
        """
        engine = _engine(bits)
        length = rip - address
        if not 0 <= length <= len(code):
            raise UsageError(f"rip {rip:#x} is not in the code, {len(code):#x} bytes at {address:#x}")
        if count <= 0:
            return []
        if engine is None:
            last = code[max(length - LONGEST_INSTRUCTION, 0) : length]
            return [_as_bytes(rip - len(last), last)] if last else []
        if start is not None and address <= start < rip:
            known = self.disassemble(code[start - address : length], start, bits)
            if all(instruction.mnemonic != BYTES for instruction in known):
                return known[-count:]
        window = code[max(length - LONGEST_INSTRUCTION * count - LEAD, 0) : length]
        return _in_step(engine, window, rip - len(window))[-count:]


def annotate(instruction: Instruction, symbols: SymbolTable | None = None) -> str:
    """The text of an instruction with the symbols of the addresses in it.

    "call 0x1010 <puts>"; "lea rdi, [rip + 0x2f] # 0x1040 <message>"; "mov edi, 0x402000 # 0x402000 <message>". A number
    that is not the address of memory or a branch counts only when it is the start of a symbol.
    """
    text = str(instruction)
    target = instruction.target
    if target is not None:
        found = symbols.at(target) if symbols else None
        return f"{text} <{found}>" if found else text
    relative = _RIP_RELATIVE.search(instruction.operands)
    if relative:
        distance = int(relative[2], 0)
        address = instruction.end + (distance if relative[1] == "+" else -distance) & _ADDRESS_MASK
        return f"{text} # {symbols.describe(address) if symbols else hex(address)}"
    if symbols and instruction.mnemonic != BYTES and not re.search(r"\b[fg]s:", instruction.operands):
        for match in _ADDRESS.finditer(instruction.operands):
            number = int(match["digits"], 16)
            # What is below 0 is an address near the top of 64 or 32 bits.
            for address in (-number & _ADDRESS_MASK, -number & 0xFFFF_FFFF) if match["minus"] else (number,):
                found = symbols.at(address) if number >= SMALLEST_ADDRESS else None
                if found and (match["memory"] or not found.offset):
                    return f"{text} # {address:#x} <{found}>"
    return text


def _in_step(engine: Any, code: bytes, address: int) -> list[Instruction]:
    """The longest way through `code` to its end: the first byte from which decoding leads there."""
    following: dict[int, Instruction] = {}  # by offset, of those that lead to the end
    for offset in range(len(code) - 1, -1, -1):
        for instruction in _decoded(engine, code[offset : offset + LONGEST_INSTRUCTION], address + offset, 1):
            end = offset + len(instruction.bytes)
            if end == len(code) or end in following:
                following[offset] = instruction
    found = []
    at = min(following, default=len(code))
    while at < len(code):
        found.append(following[at])
        at += len(following[at].bytes)
    return found


def _decoded(engine: Any, code: bytes, address: int, count: int) -> Iterator[Instruction]:
    """The instructions up to the first that is none; `count` 0 means all."""
    at = 0
    for _, size, mnemonic, operands in engine.disasm_lite(code, address, count):
        yield Instruction(address + at, code[at : at + size], mnemonic, operands)
        at += size


def _as_bytes(address: int, code: bytes) -> Instruction:
    return Instruction(address, bytes(code), BYTES, ", ".join(f"{byte:#04x}" for byte in code))


class _Engines(threading.local):
    """The decoders of a thread, by width. ctypes lets other threads run while one decodes."""

    def __init__(self) -> None:
        self.by_width: dict[int, Any] = {}


_engines = _Engines()


def _engine(bits: int) -> Any:
    """The decoder for a width, or None without capstone."""
    if bits not in (16, 32, 64):
        raise UsageError(f"code is 16, 32 or 64 bits wide, not {bits}")
    engines = _engines.by_width
    if bits not in engines:
        engines[bits] = library_decoder(bits) or _capstone_engine(bits)
    return engines[bits]


def _capstone_engine(bits: int) -> Any:
    """What the package makes, where its library cannot be used directly. None without capstone."""
    try:
        import capstone
    except ImportError:  # also when its shared library cannot be loaded
        return None
    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits]
    return capstone.Cs(capstone.CS_ARCH_X86, mode)
