"""Target descriptions: which registers gdb sees, their numbers, and the XML that says so (gdb manual, appendix G).

The features `org.gnu.gdb.i386.*` have the registers that gdb demands for x86, in its order and under its names.
`org.kvmpy.x86.system` adds what a kernel's author looks at: control registers, bases of segments, descriptor tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntFlag
from functools import cache
from typing import NamedTuple

from kvmpy.debug.gdb.architecture import Architecture
from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags

__all__ = ["GdbRegister", "TargetDescription", "describe"]


class GdbRegister(NamedTuple):
    """A register as gdb sees it: its `name`, width, gdb type and group. `source` is the name that the target knows.

    The names of the target are those of `kvmpy.debug.gdb.registers`; they do not depend on the architecture.
    """

    name: str
    bits: int
    type: str
    group: str
    source: str

    @property
    def size(self) -> int:
        """Bytes in a packet."""
        return self.bits // 8


class _Feature(NamedTuple):
    name: str
    types: tuple[str, ...]
    registers: tuple[GdbRegister, ...]


class TargetDescription:
    """The registers of one architecture: a register's place in `registers` is its number in the protocol."""

    def __init__(self, architecture: Architecture, features: tuple[_Feature, ...]) -> None:
        self.architecture = architecture
        self.registers = tuple(register for feature in features for register in feature.registers)
        self.sources = tuple(register.source for register in self.registers)
        self.sizes = tuple(register.size for register in self.registers)
        names = [register.name for register in self.registers]
        wide = architecture.bits == 64
        self.expedited = tuple(names.index(name) for name in (("rip", "rsp", "rbp") if wide else ("eip", "esp", "ebp")))
        """Numbers of the registers that a stop reply carries, so that gdb need not ask: pc, sp, frame pointer."""
        self.xml = "".join(_xml(architecture, features)).encode()


@cache
def describe(architecture: Architecture, *, avx: bool = False) -> TargetDescription:
    """The description for an architecture, with the upper halves of YMM registers when the processor has AVX."""
    core = _core64() if architecture.bits == 64 else _core32()
    vectors = 16 if architecture.bits == 64 else 8
    features = [core, _sse(vectors)]
    if avx:
        halves = (_register(f"ymm{number}h", 128, "uint128") for number in range(vectors))
        features.append(_Feature("org.gnu.gdb.i386.avx", (), tuple(halves)))
    if architecture.bits == 64:
        bases = (_register(name, 64, "int") for name in ("fs_base", "gs_base"))
        features.append(_Feature("org.gnu.gdb.i386.segments", (), tuple(bases)))
    features.append(_system(architecture.bits))
    return TargetDescription(architecture, tuple(features))


# Features


def _register(name: str, bits: int, type: str, group: str = "", source: str = "") -> GdbRegister:
    return GdbRegister(name, bits, type, group, source or name)


def _core64() -> _Feature:
    pointers = {"rbp": "data_ptr", "rsp": "data_ptr"}
    general = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16))]
    registers = [_register(name, 64, pointers.get(name, "int64")) for name in general]
    registers.append(_register("rip", 64, "code_ptr", source="pc"))
    return _core(registers)


def _core32() -> _Feature:
    pointers = {"ebp": "data_ptr", "esp": "data_ptr"}
    general = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"]
    registers = [_register(name, 32, pointers.get(name, "int32"), source=f"r{name[1:]}") for name in general]
    registers.append(_register("eip", 32, "code_ptr", source="pc"))
    return _core(registers)


def _core(registers: list[GdbRegister]) -> _Feature:
    registers.append(_register("eflags", 32, "i386_eflags", source="rflags"))
    registers += (_register(name, 32, "int32") for name in ("cs", "ss", "ds", "es", "fs", "gs"))
    registers += (_register(f"st{number}", 80, "i387_ext") for number in range(8))
    control = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
    registers += (_register(name, 32, "int", "float") for name in control)
    eflags = _flags("i386_eflags", 4, Rflags, ('<field name="IOPL" start="12" end="13"/>',))
    return _Feature("org.gnu.gdb.i386.core", eflags, tuple(registers))


_MXCSR = ("IE", "DE", "ZE", "OE", "UE", "PE", "DAZ", "IM", "DM", "ZM", "OM", "UM", "PM", "", "", "FZ")
"""SDM vol. 1, 10.2.3; bits 13 and 14 are a number, the rounding control."""

_VECTORS = (
    ("v4f", "ieee_single", 4), ("v2d", "ieee_double", 2), ("v16i8", "int8", 16), ("v8i16", "int16", 8),
    ("v4i32", "int32", 4), ("v2i64", "int64", 2),
)  # fmt: skip


def _sse(count: int) -> _Feature:
    fields = (("v4_float", "v4f"), ("v2_double", "v2d"), ("v16_int8", "v16i8"), ("v8_int16", "v8i16"),
              ("v4_int32", "v4i32"), ("v2_int64", "v2i64"), ("uint128", "uint128"))  # fmt: skip
    types = [f'<vector id="{name}" type="{element}" count="{number}"/>' for name, element, number in _VECTORS]
    types += ['<union id="vec128">', *(f'<field name="{name}" type="{type}"/>' for name, type in fields), "</union>"]
    types.append('<flags id="i386_mxcsr" size="4">')
    types += (f'<field name="{name}" start="{bit}" end="{bit}"/>' for bit, name in enumerate(_MXCSR) if name)
    types += ['<field name="RC" start="13" end="14"/>', "</flags>"]
    registers = [_register(f"xmm{number}", 128, "vec128") for number in range(count)]
    registers.append(_register("mxcsr", 32, "i386_mxcsr", "vector"))
    return _Feature("org.gnu.gdb.i386.sse", tuple(types), tuple(registers))


def _system(bits: int) -> _Feature:
    size = bits // 8
    types = (
        *_flags("kvmpy_cr0", size, Cr0),
        *_flags("kvmpy_cr4", size, Cr4),
        *_flags("kvmpy_efer", 8, Efer),
    )
    address = f"uint{bits}"
    segments = ["cs", "ss", "ds", "es"] if bits == 64 else ["cs", "ss", "ds", "es", "fs", "gs"]
    wide = [(f"{name}_base", bits, address) for name in segments]
    if bits == 64:
        wide.append(("k_gs_base", 64, "uint64"))
    for name in ("tr", "ldtr"):
        wide += [(name, 16, "uint16"), (f"{name}_base", bits, address), (f"{name}_limit", 32, "uint32")]
    for name in ("gdtr", "idtr"):
        wide += [(f"{name}_base", bits, address), (f"{name}_limit", 16, "uint16")]
    wide += [("cr0", bits, "kvmpy_cr0"), ("cr2", bits, address), ("cr3", bits, address), ("cr4", bits, "kvmpy_cr4")]
    wide += [("cr8", bits, address), ("efer", 64, "kvmpy_efer"), ("apic_base", 64, "uint64")]
    registers = tuple(_register(name, width, type) for name, width, type in wide)
    return _Feature("org.kvmpy.x86.system", types, registers)


# XML


def _flags(name: str, size: int, bits: type[IntFlag], fields: Iterable[str] = ()) -> tuple[str, ...]:
    """A gdb flags type of the named bits; those of IOPL, a number, are left to `fields`."""
    lines = [f'<flags id="{name}" size="{size}">']
    for flag in bits:
        number = flag.value.bit_length() - 1
        if flag.name is not None and number < 8 * size and not flag.name.startswith(("IOPL", "FIXED")):
            lines.append(f'<field name="{flag.name}" start="{number}" end="{number}"/>')
    return (*lines, *fields, "</flags>")


def _xml(architecture: Architecture, features: Iterable[_Feature]) -> Iterator[str]:
    yield '<?xml version="1.0"?>\n<!DOCTYPE target SYSTEM "gdb-target.dtd">\n<target version="1.0">\n'
    yield f"<architecture>{architecture.value}</architecture>\n<osabi>none</osabi>\n"
    number = 0
    for feature in features:
        yield f'<feature name="{feature.name}">\n'
        yield from (f"{line}\n" for line in feature.types)
        for register in feature.registers:
            group = f' group="{register.group}"' if register.group else ""
            named = f'name="{register.name}" bitsize="{register.bits}" type="{register.type}"'
            yield f'<reg {named} regnum="{number}"{group}/>\n'
            number += 1
        yield "</feature>\n"
    yield "</target>\n"
