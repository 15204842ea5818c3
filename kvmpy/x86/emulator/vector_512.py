"""EVEX encodings of packed integers: what crypto code of kernels takes where CPUID shows AVX-512 (SDM vol. 2, 2.7).

Such code wants the rotates and the 32 registers more than vectors of 512 bits. Rows take masks, zeroing and broadcast.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.lanes import elementwise, join, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import ANY, MEMORY, REGISTER, instruction
from kvmpy.x86.emulator.vector_operands import OUTSIDE_REAL_MODE, check_aligned, check_avx
from kvmpy.x86.instruction import EVEX, MemoryOperand

__all__ = ["ThreeSources", "Vectors", "one_table", "row", "two_tables"]

_UD = 6
_38, _3A = 2, 3
_AVX_512 = 0xE6
"""SSE, AVX, opmasks, ZMM0 to ZMM15, ZMM16 to ZMM31 in XCR0."""

_ROUNDINGS = {16: 0, 32: 1, 64: 2, 48: 3}
"""What the bits for the size of vectors mean when they are RC."""

ThreeSources = Callable[[int, int, int, int, int], int]
"""(destination, first source, second source, bytes, immediate) -> the result."""


class Vectors:
    """The operands of one instruction with elements of `width` bytes, for masks, and of `element` for broadcasts.

    `rounds`: between registers, the bit that else means broadcast means that the instruction has its own `rounding`, as
    in MXCSR.RC, and raises no exceptions; the bits of the vector's size give it then. `scalar`: they do not
    count.
    """

    __slots__ = ("element", "mask", "op", "rounding", "size", "state", "width", "zeroes")

    def __init__(
        self, op: Operands, width: int, *, first_source: bool, broadcasts: bool = True, element: int = 0,
        rounds: bool = False, scalar: bool = False,
    ) -> None:  # fmt: skip
        evex = op.it.evex
        assert evex is not None  # a row with this encoding has it
        self.state: ExtendedState = check_avx(op, sources=2 if first_source else 0)
        between_registers = op.it.memory is None
        self.rounding = _ROUNDINGS[evex.size] if rounds and between_registers and evex.broadcast else None
        undefined = (
            op.cpu.xcr0() & _AVX_512 != _AVX_512
            or (evex.size == 48 and self.rounding is None and not scalar)
            or (evex.zeroes and not evex.mask)
            or (evex.broadcast and self.rounding is None and (between_registers or not broadcasts))
        )
        if undefined:
            raise GuestException.of(_UD)
        self.op = op
        self.width = width
        self.element = element or width
        self.size = evex.size if self.rounding is None else 64
        self.mask = self.state.opmask(evex.mask) if evex.mask else -1
        self.zeroes = evex.zeroes

    def register(self, number: int) -> int:
        return self.state.zmm(number) & (1 << 8 * self.size) - 1

    def chosen(self) -> list[int]:
        """The places of the elements that the mask lets through."""
        return [place for place in range(self.size // self.width) if self.mask >> place & 1]

    def second(self, *, whole: bool = False) -> int:
        """What ModRM.rm names. Elements that are masked out are not loaded, and raise nothing (SDM vol. 2, 2.7.6).

        `whole`: elements go to other places, and all are loaded.
        """
        op, width = self.op, self.width
        if op.it.memory is None:
            return self.register(op.it.rm)
        assert op.it.evex is not None
        if op.it.evex.broadcast:
            element = op.load(self.element) if whole or self.chosen() else 0
            return join([element] * (self.size // self.element), self.element)
        if self.mask == -1 or whole:
            return op.load(self.size)
        elements = [0] * (self.size // width)
        for place in self.chosen():
            elements[place] = int.from_bytes(op.cpu.memory.read(op.linear(width * place), width), "little")
        return join(elements, width)

    def _part_operand(self, size: int) -> MemoryOperand:
        """The memory operand of an instruction that takes `size` bytes: a displacement of 8 bits counts in those."""
        it = self.op.it
        operand, evex = it.memory, it.evex
        assert operand is not None
        assert evex is not None
        if it.mod != 1 or evex.broadcast:
            return operand
        return MemoryOperand(
            operand.base, operand.index, operand.scale, operand.displacement // evex.size * size, operand.segment,
            operand.rip_relative,
        )  # fmt: skip

    def part(self, size: int) -> int:
        """The lowest `size` bytes of the register that ModRM.rm names, or so many of memory."""
        op = self.op
        if op.it.memory is None:
            return self.state.zmm(op.it.rm) & (1 << 8 * size) - 1
        operand = self._part_operand(size)
        op.check_limit(size, operand)
        return int.from_bytes(op.cpu.memory.read(op.linear(0, operand), size), "little")

    def store_part(self, value: int, size: int) -> None:
        """Write `size` bytes of memory, where the mask lets through."""
        op, width, memory = self.op, self.width, self.op.cpu.memory
        operand = self._part_operand(size)
        op.check_limit(size, operand)
        if self.mask == -1:
            memory.write(op.linear(0, operand), value.to_bytes(size, "little"))
            return
        places = [at for at in range(size // width) if self.mask >> at & 1]
        for at in places:
            memory.check_writable(op.linear(width * at, operand), width)
        for at in places:
            element = value >> 8 * width * at & (1 << 8 * width) - 1
            memory.write(op.linear(width * at, operand), element.to_bytes(width, "little"))

    def write(self, number: int, value: int) -> None:
        """Write a register: where the mask lets through, and zeros or what was there elsewhere."""
        if self.mask != -1:
            width, size = self.width, self.size
            old = [0] * (size // width) if self.zeroes else split(self.register(number), width, size)
            new = split(value, width, size)
            value = join([new[at] if self.mask >> at & 1 else old[at] for at in range(size // width)], width)
        self.state.set_zmm(number, value)

    def store(self, value: int) -> None:
        """Write memory, where the mask lets through: all of it or, at a fault, nothing."""
        op, width = self.op, self.width
        if self.mask == -1:
            op.store(value, self.size)
            return
        elements, memory = split(value, width, self.size), op.cpu.memory
        for place in self.chosen():
            memory.check_writable(op.linear(width * place), width)
        for place in self.chosen():
            memory.write(op.linear(width * place), elements[place].to_bytes(width, "little"))


def row(
    name: str, opcode: int, width: int, operation: ThreeSources, *, map: int = 1, prefix: int = 0x66, w: bool | None,
    sources: int = 2, immediate: bool = False, digit: int | None = None, permutes: bool = False,
    broadcasts: bool = True, element: int = 0,
) -> None:  # fmt: skip
    """A row. With a `digit` VEX.vvvv is the destination, and the only source is ModRM.rm.

    `permutes`: an element of the result is not made of those at its place. `broadcasts`: memory may be one element, of
    `element` bytes if that is not `width`.
    """

    @instruction(
        name, map, opcode, prefix=prefix, digit=digit, immediate=1 if immediate else 0, encoding=EVEX, w=w,
        bits=OUTSIDE_REAL_MODE,
    )  # fmt: skip
    def execute(op: Operands) -> None:
        it = op.it
        vectors = Vectors(
            op, width, first_source=sources == 2 or digit is not None, broadcasts=broadcasts, element=element
        )
        second = vectors.second(whole=permutes)
        target = it.reg if digit is None else it.vvvv
        first = vectors.register(it.vvvv) if sources == 2 else 0
        vectors.write(target, operation(vectors.register(target), first, second, vectors.size, it.immediate))


def _two(function: Callable[[int, int], int], width: int, *, signed: bool = False) -> ThreeSources:
    """An operation on the elements of two sources."""
    both = elementwise(width, function, signed=signed)
    return lambda old, first, second, size, immediate: both(first, second, size, immediate)


def _one(function: Callable[[int, int], int], width: int, *, signed: bool = False) -> ThreeSources:
    """An operation on the elements of one source and the immediate."""

    def whole(old: int, first: int, second: int, size: int, immediate: int) -> int:
        return join([function(each, immediate) for each in split(second, width, size, signed=signed)], width)

    return whole


def _rotated(width: int, *, left: bool) -> Callable[[int, int], int]:
    bits = 8 * width

    def rotate(element: int, count: int) -> int:
        count = (count if left else -count) % bits
        return element << count | element >> bits - count

    return rotate


def _shifted_left(bits: int) -> Callable[[int, int], int]:
    return lambda element, count: element << count if count < bits else 0


def _shifted_right(bits: int) -> Callable[[int, int], int]:
    return lambda element, count: element >> min(count, bits)


def _ternary(old: int, first: int, second: int, size: int, immediate: int) -> int:
    """Each bit of the result is the bit of the immediate that the three sources' bits number."""
    result, everything = 0, (1 << 8 * size) - 1
    for case in range(8):
        if immediate >> case & 1:
            a, b, c = (
                source if case >> at & 1 else ~source for source, at in ((old, 2), (first, 1), (second, 0))
            )  # fmt: skip
            result |= a & b & c & everything
    return result


def two_tables(width: int, *, indices_in_destination: bool) -> ThreeSources:
    """Elements of two tables, by indices of which the bit above those that count an element chooses the table."""

    def permute(old: int, first: int, second: int, size: int, immediate: int) -> int:
        indices, low = (old, first) if indices_in_destination else (first, old)
        table = split(low, width, size) + split(second, width, size)
        return join([table[index & len(table) - 1] for index in split(indices, width, size)], width)

    return permute


def one_table(width: int) -> ThreeSources:
    """Elements of the second source, by indices in the first."""

    def permute(old: int, first: int, second: int, size: int, immediate: int) -> int:
        table = split(second, width, size)
        return join([table[index & len(table) - 1] for index in split(first, width, size)], width)

    return permute


def _shuffled(old: int, first: int, second: int, size: int, immediate: int) -> int:
    elements = split(second, 4, size)
    return join([elements[at & ~3 | immediate >> 2 * (at & 3) & 3] for at in range(len(elements))], 4)


for _width, _suffix, _w in ((4, "d", False), (8, "q", True)):
    _bits = 8 * _width
    row(f"vpadd{_suffix}", 0xD4 if _w else 0xFE, _width, _two(operator.add, _width), w=_w)
    row(f"vpsub{_suffix}", 0xFB if _w else 0xFA, _width, _two(operator.sub, _width), w=_w)
    row(f"vpand{_suffix}", 0xDB, _width, _two(operator.and_, _width), w=_w)
    row(f"vpandn{_suffix}", 0xDF, _width, _two(lambda a, b: ~a & b, _width), w=_w)
    row(f"vpor{_suffix}", 0xEB, _width, _two(operator.or_, _width), w=_w)
    row(f"vpxor{_suffix}", 0xEF, _width, _two(operator.xor, _width), w=_w)
    row(f"vpternlog{_suffix}", 0x25, _width, _ternary, map=_3A, w=_w, immediate=True)
    row(
        f"vpermi2{_suffix}",
        0x76,
        _width,
        two_tables(_width, indices_in_destination=True),
        map=_38,
        w=_w,
        permutes=True,
    )
    row(
        f"vpermt2{_suffix}",
        0x7E,
        _width,
        two_tables(_width, indices_in_destination=False),
        map=_38,
        w=_w,
        permutes=True,
    )
    for _left, _name, _digit, _opcode in ((False, "vpror", 0, 0x14), (True, "vprol", 1, 0x15)):
        _rotate = _rotated(_width, left=_left)
        row(_name + _suffix, 0x72, _width, _one(_rotate, _width), w=_w, sources=1, immediate=True, digit=_digit)
        row(f"{_name}v{_suffix}", _opcode, _width, _two(_rotate, _width), map=_38, w=_w)
    _shift = 0x73 if _w else 0x72
    row(f"vpsll{_suffix}", _shift, _width, _one(_shifted_left(_bits), _width), w=_w, sources=1, immediate=True, digit=6)
    row(
        f"vpsrl{_suffix}", _shift, _width, _one(_shifted_right(_bits), _width), w=_w, sources=1, immediate=True, digit=2
    )
    row(
        f"vpsra{_suffix}", 0x72, _width, _one(_shifted_right(_bits), _width, signed=True), w=_w, sources=1,
        immediate=True, digit=4,
    )  # fmt: skip
    row(f"vperm{_suffix}", 0x36, _width, one_table(_width), map=_38, w=_w, permutes=True)
row("vpshufd", 0x70, 4, _shuffled, w=False, sources=1, immediate=True, permutes=True)


# Moves


def _moves(name: str, prefix: int, width: int, *, w: bool, load: int, store: int, aligned: bool) -> None:
    @instruction(f"{name} load", 1, load, prefix=prefix, operand=ANY, encoding=EVEX, w=w, bits=OUTSIDE_REAL_MODE)
    def loads(op: Operands) -> None:
        vectors = Vectors(op, width, first_source=False, broadcasts=False)
        if aligned and op.it.memory is not None:
            check_aligned(op, vectors.size)
        vectors.write(op.it.reg, vectors.second())

    @instruction(f"{name} store", 1, store, prefix=prefix, operand=MEMORY, encoding=EVEX, w=w, bits=OUTSIDE_REAL_MODE)
    def stores(op: Operands) -> None:
        vectors = Vectors(op, width, first_source=False, broadcasts=False)
        if vectors.zeroes:
            raise GuestException.of(_UD)
        if aligned:
            check_aligned(op, vectors.size)
        vectors.store(vectors.register(op.it.reg))

    @instruction(name, 1, store, prefix=prefix, operand=REGISTER, encoding=EVEX, w=w, bits=OUTSIDE_REAL_MODE)
    def copies(op: Operands) -> None:
        vectors = Vectors(op, width, first_source=False, broadcasts=False)
        vectors.write(op.it.rm, vectors.register(op.it.reg))


for _name, _prefix, _width, _w, _load, _store, _aligned in (
    ("vmovdqa32", 0x66, 4, False, 0x6F, 0x7F, True),
    ("vmovdqa64", 0x66, 8, True, 0x6F, 0x7F, True),
    ("vmovdqu8", 0xF2, 1, False, 0x6F, 0x7F, False),
    ("vmovdqu16", 0xF2, 2, True, 0x6F, 0x7F, False),
    ("vmovdqu32", 0xF3, 4, False, 0x6F, 0x7F, False),
    ("vmovdqu64", 0xF3, 8, True, 0x6F, 0x7F, False),
    ("vmovaps", 0, 4, False, 0x28, 0x29, True),
    ("vmovapd", 0x66, 8, True, 0x28, 0x29, True),
    ("vmovups", 0, 4, False, 0x10, 0x11, False),
    ("vmovupd", 0x66, 8, True, 0x10, 0x11, False),
):
    _moves(_name, _prefix, _width, w=_w, load=_load, store=_store, aligned=_aligned)
