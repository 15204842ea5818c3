"""EVEX encodings of what SSE and AVX compute with packed integers, comparisons into masks, blends (SDM vol. 2, 2.7)."""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.x86.emulator import vector_integer, vector_shifts, vector_shuffles  # noqa: F401  they fill OPERATIONS
from kvmpy.x86.emulator.guest_exception import GuestException
from kvmpy.x86.emulator.lanes import elementwise, join, split
from kvmpy.x86.emulator.processor import Operands
from kvmpy.x86.emulator.table import REGISTER, instruction
from kvmpy.x86.emulator.vector_512 import ThreeSources, Vectors, row
from kvmpy.x86.emulator.vector_operands import OPERATIONS, OUTSIDE_REAL_MODE, Operation
from kvmpy.x86.instruction import EVEX

_UD = 6
_38, _3A = 2, 3


def _as_before(operation: Operation) -> ThreeSources:
    return lambda old, first, second, size, immediate: operation(first, second, size, immediate)


# Name: width of the mask's elements, opcode, map. Without W, and without broadcast.
_BYTES_AND_WORDS = {
    "paddb": (1, 0xFC, 1), "psubb": (1, 0xF8, 1), "paddsb": (1, 0xEC, 1), "paddusb": (1, 0xDC, 1),
    "psubsb": (1, 0xE8, 1), "psubusb": (1, 0xD8, 1), "pavgb": (1, 0xE0, 1), "pminub": (1, 0xDA, 1),
    "pmaxub": (1, 0xDE, 1), "pminsb": (1, 0x38, _38), "pmaxsb": (1, 0x3C, _38),
    "paddw": (2, 0xFD, 1), "psubw": (2, 0xF9, 1), "paddsw": (2, 0xED, 1), "paddusw": (2, 0xDD, 1),
    "psubsw": (2, 0xE9, 1), "psubusw": (2, 0xD9, 1), "pavgw": (2, 0xE3, 1), "pmullw": (2, 0xD5, 1),
    "pmulhw": (2, 0xE5, 1), "pmulhuw": (2, 0xE4, 1), "pmulhrsw": (2, 0x0B, _38), "pminsw": (2, 0xEA, 1),
    "pmaxsw": (2, 0xEE, 1), "pminuw": (2, 0x3A, _38), "pmaxuw": (2, 0x3E, _38),
}  # fmt: skip
_ONE_SOURCE = {"pabsb": (1, 0x1C, _38), "pabsw": (2, 0x1D, _38)}
# The same, whose elements move: memory is read as a whole.
_MOVING = {
    "pshufb": (1, 0x00, _38), "packsswb": (1, 0x63, 1), "packuswb": (1, 0x67, 1), "punpcklbw": (1, 0x60, 1),
    "punpckhbw": (1, 0x68, 1), "punpcklwd": (2, 0x61, 1), "punpckhwd": (2, 0x69, 1), "pmaddwd": (4, 0xF5, 1),
    "pmaddubsw": (2, 0x04, _38),
}  # fmt: skip
# With W and broadcast: width of the mask's elements, of the broadcast's, opcode, map, W, whether elements move.
_BROADCASTING = {
    "pmulld": (4, 4, 0x40, _38, False, False), "pminsd": (4, 4, 0x39, _38, False, False),
    "pminud": (4, 4, 0x3B, _38, False, False), "pmaxsd": (4, 4, 0x3D, _38, False, False),
    "pmaxud": (4, 4, 0x3F, _38, False, False), "pmuludq": (8, 8, 0xF4, 1, True, False),
    "pmuldq": (8, 8, 0x28, _38, True, False), "packssdw": (2, 4, 0x6B, 1, False, True),
    "packusdw": (2, 4, 0x2B, _38, False, True), "punpckldq": (4, 4, 0x62, 1, False, True),
    "punpckhdq": (4, 4, 0x6A, 1, False, True), "punpcklqdq": (8, 8, 0x6C, 1, True, True),
    "punpckhqdq": (8, 8, 0x6D, 1, True, True), "psrlvd": (4, 4, 0x45, _38, False, False),
    "psrlvq": (8, 8, 0x45, _38, True, False), "psravd": (4, 4, 0x46, _38, False, False),
    "psllvd": (4, 4, 0x47, _38, False, False), "psllvq": (8, 8, 0x47, _38, True, False),
}  # fmt: skip

for _name, (_width, _opcode, _map) in _BYTES_AND_WORDS.items():
    row(f"v{_name}", _opcode, _width, _as_before(OPERATIONS[_name]), map=_map, w=None, broadcasts=False)
for _name, (_width, _opcode, _map) in _ONE_SOURCE.items():
    row(f"v{_name}", _opcode, _width, _as_before(OPERATIONS[_name]), map=_map, w=None, broadcasts=False, sources=1)
for _name, (_width, _opcode, _map) in _MOVING.items():
    row(
        f"v{_name}", _opcode, _width, _as_before(OPERATIONS[_name]), map=_map, w=None, broadcasts=False, permutes=True
    )  # fmt: skip
for _name, (_width, _element, _opcode, _map, _w, _moves) in _BROADCASTING.items():
    row(
        f"v{_name}", _opcode, _width, _as_before(OPERATIONS[_name]), map=_map, w=_w, permutes=_moves, element=_element
    )  # fmt: skip

_QUADWORDS: dict[str, tuple[int, Callable[[int, int], int], bool]] = {
    "pmullq": (0x40, lambda a, b: a * b, False), "pminsq": (0x39, min, True), "pminuq": (0x3B, min, False),
    "pmaxsq": (0x3D, max, True), "pmaxuq": (0x3F, max, False),
    "psravq": (0x46, lambda a, by: a >> (by if 0 <= by < 63 else 63), True),
}  # fmt: skip
"""What AVX2 has for doublewords only: opcode, function of elements, whether they are signed."""
for _name, (_opcode, _function, _signed) in _QUADWORDS.items():
    row(f"v{_name}", _opcode, 8, _as_before(elementwise(8, _function, signed=_signed)), map=_38, w=True)
row("vpabsd", 0x1E, 4, _as_before(OPERATIONS["pabsd"]), map=_38, w=False, sources=1)
row("vpabsq", 0x1F, 8, _as_before(elementwise(8, lambda _, b: abs(b), signed=True)), map=_38, w=True, sources=1)


def _words_shifted(function: Callable[[int, int], int], *, signed: bool = False) -> ThreeSources:
    return _as_before(elementwise(2, lambda a, by: function(a, by & 0xFFFF), signed=signed))


row("vpsrlvw", 0x10, 2, _words_shifted(lambda a, by: a >> min(by, 16)), map=_38, w=True, broadcasts=False)
row("vpsravw", 0x11, 2, _words_shifted(lambda a, by: a >> min(by, 15), signed=True), map=_38, w=True, broadcasts=False)
row("vpsllvw", 0x12, 2, _words_shifted(lambda a, by: a << min(by, 16)), map=_38, w=True, broadcasts=False)
row("vpalignr", 0x0F, 1, _as_before(OPERATIONS["palignr"]), map=_3A, w=None, immediate=True, broadcasts=False,
    permutes=True)  # fmt: skip
for _name, _prefix in (("pshuflw", 0xF2), ("pshufhw", 0xF3)):
    row(
        f"v{_name}", 0x70, 2, _as_before(OPERATIONS[_name]), prefix=_prefix, w=None, sources=1, immediate=True,
        broadcasts=False, permutes=True,
    )  # fmt: skip
for _name, _opcode, _even in (("and", 0x54, 0xDB), ("andn", 0x55, 0xDF), ("or", 0x56, 0xEB), ("xor", 0x57, 0xEF)):
    row(f"v{_name}ps", _opcode, 4, _as_before(OPERATIONS[f"{_name}ps"]), prefix=0, w=False)
    row(f"v{_name}pd", _opcode, 8, _as_before(OPERATIONS[f"{_name}pd"]), w=True)


# Blends: where the mask lets through, the second source, else the first (or zero)


def _blend(name: str, opcode: int, width: int, *, w: bool, broadcasts: bool) -> None:
    @instruction(name, _38, opcode, prefix=0x66, w=w, encoding=EVEX, bits=OUTSIDE_REAL_MODE)
    def execute(op: Operands) -> None:
        vectors = Vectors(op, width, first_source=True, broadcasts=broadcasts)
        first = split(vectors.register(op.it.vvvv), width, vectors.size)
        second = split(vectors.second(), width, vectors.size)
        others = [0] * len(first) if vectors.zeroes else first
        chosen = set(vectors.chosen())
        value = join([second[at] if at in chosen else others[at] for at in range(len(first))], width)
        vectors.state.set_zmm(op.it.reg, value)


_blend("vpblendmb", 0x66, 1, w=False, broadcasts=False)
_blend("vpblendmw", 0x66, 2, w=True, broadcasts=False)
_blend("vpblendmd", 0x64, 4, w=False, broadcasts=True)
_blend("vpblendmq", 0x64, 8, w=True, broadcasts=True)
_blend("vblendmps", 0x65, 4, w=False, broadcasts=True)
_blend("vblendmpd", 0x65, 8, w=True, broadcasts=True)


# Comparisons and tests, whose result is a mask

_PREDICATES: tuple[Callable[[int, int], bool], ...] = (
    lambda a, b: a == b, lambda a, b: a < b, lambda a, b: a <= b, lambda a, b: False,
    lambda a, b: a != b, lambda a, b: a >= b, lambda a, b: a > b, lambda a, b: True,
)  # fmt: skip


def _into_mask(
    name: str, opcode: int, width: int, function: Callable[[int, int], bool] | None, *, map: int, prefix: int = 0x66,
    w: bool | None, signed: bool = False,
) -> None:  # fmt: skip
    """`function` None: the immediate chooses the predicate."""

    @instruction(
        name, map, opcode, prefix=prefix, w=w, immediate=1 if function is None else 0, encoding=EVEX,
        bits=OUTSIDE_REAL_MODE,
    )  # fmt: skip
    def execute(op: Operands) -> None:
        vectors = Vectors(op, width, first_source=True, broadcasts=width >= 4)
        if vectors.zeroes:
            raise GuestException.of(_UD)
        size = vectors.size
        first = split(vectors.register(op.it.vvvv), width, size, signed=signed)
        second = split(vectors.second(), width, size, signed=signed)
        compare = function or _PREDICATES[op.it.immediate & 7]
        vectors.state.set_opmask(
            op.it.reg & 7, sum(1 << at for at in vectors.chosen() if compare(first[at], second[at]))
        )


def _comparisons(width: int, suffix: str, w: bool | None, equal: int, greater: int) -> None:
    map, narrow, wide = (_38 if width == 8 else 1), width < 4, width in (2, 8)
    _into_mask(f"vpcmpeq{suffix}", equal, width, _PREDICATES[0], map=map, w=w)
    _into_mask(f"vpcmpgt{suffix}", greater, width, _PREDICATES[6], map=map, w=w, signed=True)
    opcode = 0x3F if narrow else 0x1F
    _into_mask(f"vpcmp{suffix}", opcode, width, None, map=_3A, w=wide, signed=True)
    _into_mask(f"vpcmpu{suffix}", opcode - 1, width, None, map=_3A, w=wide)
    opcode = 0x26 if narrow else 0x27
    _into_mask(f"vptestm{suffix}", opcode, width, lambda a, b: a & b != 0, map=_38, w=wide)
    _into_mask(f"vptestnm{suffix}", opcode, width, lambda a, b: a & b == 0, map=_38, prefix=0xF3, w=wide)


_comparisons(1, "b", None, 0x74, 0x64)
_comparisons(2, "w", None, 0x75, 0x65)
_comparisons(4, "d", False, 0x76, 0x66)
_comparisons(8, "q", True, 0x29, 0x37)


# Masks as vectors, and back


def _between(suffix: str, width: int, opcode: int, *, w: bool) -> None:
    ones = (1 << 8 * width) - 1

    @instruction(
        f"vpmovm2{suffix}", _38, opcode, prefix=0xF3, w=w, operand=REGISTER, encoding=EVEX, bits=OUTSIDE_REAL_MODE
    )
    def from_mask(op: Operands) -> None:
        vectors = _unmasked(op, width)
        mask = vectors.state.opmask(op.it.rm & 7)
        elements = [ones if mask >> at & 1 else 0 for at in range(vectors.size // width)]
        vectors.state.set_zmm(op.it.reg, join(elements, width))

    @instruction(
        f"vpmov{suffix}2m", _38, opcode + 1, prefix=0xF3, w=w, operand=REGISTER, encoding=EVEX,
        bits=OUTSIDE_REAL_MODE,
    )  # fmt: skip
    def to_mask(op: Operands) -> None:
        vectors = _unmasked(op, width)
        elements = split(vectors.register(op.it.rm), width, vectors.size, signed=True)
        vectors.state.set_opmask(op.it.reg & 7, sum(1 << at for at, each in enumerate(elements) if each < 0))


def _unmasked(op: Operands, width: int) -> Vectors:
    """For instructions that take no mask."""
    vectors = Vectors(op, width, first_source=False, broadcasts=False)
    if vectors.mask != -1:
        raise GuestException.of(_UD)
    return vectors


_between("b", 1, 0x28, w=False)
_between("w", 2, 0x28, w=True)
_between("d", 4, 0x38, w=False)
_between("q", 8, 0x38, w=True)
