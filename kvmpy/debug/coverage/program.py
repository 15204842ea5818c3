"""The program that a machine has loaded, as far as coverage needs it: where its code and its functions are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvmpy.boot.elf.image import ElfImage
from kvmpy.debug.coverage.basic_blocks import BasicBlock, Function, find_blocks
from kvmpy.debug.program_counter import linear_pc
from kvmpy.errors import UsageError
from kvmpy.x86.register_text import code_bits

if TYPE_CHECKING:
    from kvmpy.debug.symbols import SourceLine
    from kvmpy.machine import Machine

__all__ = ["CodeRange", "Program", "basic_blocks"]

_SHF_ALLOC, _SHF_EXECINSTR, _PF_X, _SHT_NOBITS = 2, 4, 1, 8


class CodeRange(NamedTuple):
    """`size` bytes of code at linear address `start`, which are at guest-physical address `physical`."""

    start: int
    size: int
    physical: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.size


class Program:
    """The image of `machine` in guest memory, before it has run. `bits` is how wide its functions' code is.

    By default that is what the class of the ELF file says, or the mode in which another image starts.
    """

    def __init__(self, machine: Machine, bits: int | None = None) -> None:
        if bits not in (None, 16, 32, 64):
            raise UsageError(f"code is 16, 32 or 64 bits wide, not {bits!r}")
        if machine.image is None or machine.entry is None:
            raise UsageError('there is no program to set breakpoints in: load() one first, or take method="steps"')
        self._machine = machine
        image = machine.image
        vcpu = machine.vcpus[0]
        self._start_bits = code_bits(vcpu.sregs.copy())
        self._start = linear_pc(vcpu)
        if isinstance(image, ElfImage):
            self.bits = bits or image.bits
            self.ranges = _elf_ranges(image)
        else:
            self.bits = bits or self._start_bits
            self.ranges = [CodeRange(part.address, part.size, part.address) for part in machine.entry.ranges]

    def physical(self, address: int) -> int | None:
        """Where the code at a linear address is in guest memory; None for what is not the program's code."""
        for part in self.ranges:
            if part.start <= address < part.end:
                return address - part.start + part.physical
        return None

    def read(self, address: int, length: int) -> bytes:
        """Up to `length` bytes of code at a linear address, none outside the program, without any breakpoints."""
        for part in self.ranges:
            if part.start <= address < part.end:
                physical = address - part.start + part.physical
                code = bytearray(self._machine.memory.read(physical, min(length, part.end - address)))
                self._machine.debugger.software.hide(physical, code)
                return bytes(code)
        return b""

    def functions(self, names: Iterable[int | str] | None, starts: Iterable[int | str]) -> list[Function]:
        """Where code starts: all functions of the symbol table and the entry, or only `names`; and `starts`."""
        found: dict[int, Function] = {}
        if names is None:
            for symbol in self._machine.symbols:
                if symbol.kind == "function" and self.physical(symbol.address) is not None:
                    known = found.get(symbol.address)
                    size = max(symbol.size, known.size if known else 0)
                    found[symbol.address] = Function(symbol.address, self.bits, size)
            if self.physical(self._start) is not None:
                found.setdefault(self._start, Function(self._start, self._start_bits))
        for function in map(self._named, (*(names or ()), *starts)):
            found.setdefault(function.start, function)
        if not found:
            raise UsageError(
                "the program names no function, and its entry is not in it: say with starts= where code is"
            )
        return list(found.values())

    def _named(self, place: int | str) -> Function:
        size = 0
        if isinstance(place, str):
            symbol = self._machine.symbols.symbol(place)
            size = symbol.size if symbol.kind == "function" else 0
            place = symbol.address
        if self.physical(place) is None:
            raise UsageError(f"{place:#x} is not in the code of the loaded program")
        return Function(place, self.bits, size)

    def lines(self, names: Iterable[int | str] | None) -> list[BasicBlock]:
        """The stretches of code that come from one line each, of the whole program or of the functions `names`."""
        table = self._machine.lines
        if not table:
            raise UsageError('the program has no line numbers: compile it with -g, or take places="blocks"')
        wanted = None if names is None else [self._named(place) for place in names]
        stretches: dict[int, tuple[int, SourceLine]] = {}
        last = -1
        for start, end, source in sorted(table.ranges(), key=lambda part: part[:2]):
            if self.physical(start) is None or start in stretches:
                continue
            if wanted is not None and not any(one.start <= start < one.start + (one.size or 1) for one in wanted):
                continue
            if last in stretches and stretches[last][0] == start and _same_line(stretches[last][1], source):
                stretches[last] = end, source
                continue
            stretches[start] = end, source
            last = start
        return [BasicBlock(start, end - start, (start,), self.bits) for start, (end, _) in sorted(stretches.items())]


def basic_blocks(
    machine: Machine, *, functions: Iterable[int | str] | None = None, starts: Iterable[int | str] = (),
    bits: int | None = None,
) -> list[BasicBlock]:  # fmt: skip
    """The basic blocks of the program that `machine` has loaded and not run yet, by address.

    `functions` are the only ones to look at, by name or address; by default all that the symbol table declares to be
    functions, and where the processor starts. `starts` are further places where code starts, such as labels of
    interrupt handlers in assembly. `bits` is how wide the code of all these is, 16, 32 or 64, where it is not what the
    ELF file's class says (or for another image the mode that it starts in). Raises UsageError without capstone, and for
    names and places that are not there.
    """
    program = Program(machine, bits)
    return find_blocks(program.functions(functions, starts), program.read)


def _same_line(first: SourceLine, second: SourceLine) -> bool:
    return (first.file, first.line) == (second.file, second.line)


def _elf_ranges(image: ElfImage) -> Sequence[CodeRange]:
    """The sections with code, or without a section table the segments."""
    from kvmpy.debug.symbols.elf_file import OpenedElf

    elf = OpenedElf.open(image)
    wanted = _SHF_ALLOC | _SHF_EXECINSTR
    places = [
        (section.address + elf.bias & elf.address_mask, section.size)
        for section in (elf.sections[index] for index in range(len(elf.sections)))
        if section.flags & wanted == wanted and section.type != _SHT_NOBITS
    ]
    if not places:
        places = [
            (segment.virtual, segment.header.filesz) for segment in image.segments if segment.header.flags & _PF_X
        ]
    ranges = []
    for start, size in places:
        for segment in image.segments:
            if segment.virtual <= start and start + size <= segment.virtual + segment.size:
                ranges.append(CodeRange(start, size, start - segment.virtual + segment.address))
                break
    return ranges
