"""One instruction in a thousand states, by the processor in ring 3 and by `kvmpy.x86.emulator`: compared.

A loop in the guest loads each state (XRSTOR, POPF, MOV), executes the instruction, and saves what is there after it, so
that a batch costs one exit. An exception is noted by its handler and the loop goes on. What `Comparison` takes by
KVM_SET_XSAVE and KVM_GET_XSAVE, one state at a time, goes here by XRSTOR and XSAVE.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gnu_toolchain import assemble_with_symbols
from instruction_comparison import AREA, ARITHMETIC_FLAGS, Given, PlainProcessor, components, xcr0
from kvmpy import IoOut, Kvm
from kvmpy.errors import KvmError
from kvmpy.kvm import Vcpu
from kvmpy.x86.emulator import GuestException, perform
from kvmpy.x86.gates import Gate, Idt
from kvmpy.x86.long_mode import prepare
from kvmpy.x86.registers import GENERAL_REGISTERS

__all__ = [
    "ROOM",
    "Batch",
    "Outcome",
    "assemble_each",
    "batch",
    "canonical",
    "compare_batch",
    "compare_forms",
    "counted",
    "xsave_image",
]

CASES = 1000
ROOM = AREA
"""Bytes of memory that a case has for itself, aligned to 64."""
CODE, VARIABLES, STACK, TABLES, RECORDS = 0x1000, 0x4000, 0x6000, 0x1_0000, 0x10_0000
CURSOR, COUNT, VECTOR, ERROR, ADDRESS, FAULT_AT, RBX = (VARIABLES + 8 * place for place in range(7))
AREA_IN = 0
AREA_OUT = AREA
GENERAL_IN = 2 * AREA
GENERAL_OUT = GENERAL_IN + 0x80
FLAGS_IN = GENERAL_OUT + 0x80
FLAGS_OUT, VECTOR_OUT, ERROR_OUT, ADDRESS_OUT = (FLAGS_IN + 8 * place for place in range(1, 5))
DATA = FLAGS_IN + 0x40
RECORD = DATA + ROOM
_HOLE = 16
_RSP, _RIP, _RFLAGS = (GENERAL_REGISTERS.index(name) for name in ("rsp", "rip", "rflags"))
_MOVED = [(place, name) for place, name in enumerate(GENERAL_REGISTERS[:16]) if name not in ("rsp", "rbx")]
_RBX = GENERAL_REGISTERS.index("rbx")
_UNDEFINED_OPCODE, _GENERAL_PROTECTION = (6, None, None), (13, 0, None)
_PAGE_FAULT, _WITH_ERROR_CODE = 14, (8, 10, 11, 12, 13, 14, 17)
ST, XMM, XSTATE_BV = 32, 160, 512

_LOOP = "\n".join([
    "next:",
    f"mov rbx, [{CURSOR}]",
    "mov eax, -1; mov edx, -1; xrstor64 [rbx]",
    f"push qword ptr [rbx + {FLAGS_IN}]; popfq",
    *(f"mov {name}, [rbx + {GENERAL_IN + 8 * place}]" for place, name in _MOVED),
    f"mov rbx, [rbx + {GENERAL_IN + 8 * _RBX}]",
    "instruction:",
    f".fill {_HOLE}, 1, 0x90",
    "after:",
    f"mov [{RBX}], rbx; mov rbx, [{CURSOR}]",
    *(f"mov [rbx + {GENERAL_OUT + 8 * place}], {name}" for place, name in _MOVED),
    f"mov rax, [{RBX}]; mov [rbx + {GENERAL_OUT + 8 * _RBX}], rax",
    f"pushfq; pop qword ptr [rbx + {FLAGS_OUT}]",
    f"mov rax, [{VECTOR}]; mov [rbx + {VECTOR_OUT}], rax; mov qword ptr [{VECTOR}], 0",
    f"mov rax, [{ERROR}]; mov [rbx + {ERROR_OUT}], rax",
    f"mov rax, [{ADDRESS}]; mov [rbx + {ADDRESS_OUT}], rax",
    f"mov eax, -1; mov edx, -1; xsave64 [rbx + {AREA_OUT}]",
    f"add rbx, {RECORD}; mov [{CURSOR}], rbx",
    f"dec dword ptr [{COUNT}]; jnz next",
    "out 0x10, al",
    *(
        f"fault{vector}: {'' if vector in _WITH_ERROR_CODE else 'push 0;'} push {vector + 1}; jmp fault"
        for vector in range(32)
    ),
    "fault:",  # on the stack: vector + 1, error code, RIP, CS, RFLAGS, RSP, SS
    "push rax",
    f"mov rax, [rsp + 8]; mov [{VECTOR}], rax",
    f"mov rax, [rsp + 16]; mov [{ERROR}], rax",
    f"mov rax, [rsp + 24]; mov [{FAULT_AT}], rax; lea rax, [rip + after]; mov [rsp + 24], rax",
    f"mov rax, cr2; mov [{ADDRESS}], rax",
    "pop rax; add rsp, 16; iretq",
])  # fmt: skip


@dataclass(slots=True)
class Outcome:
    """What is there after the instruction: general registers but RSP, flags, memory, extended state, exception."""

    general: list[int]
    flags: int
    data: bytes
    extended: tuple[bytes, ...]
    exception: tuple[int, int | None, int | None] | None
    in_use: int = field(default=0, compare=False)
    """XSTATE_BV: which components the processor counts as in use, those in their initial state too (XINUSE)."""


def canonical(area: bytes | bytearray | memoryview, *, mxcsr: bool = False) -> tuple[bytes, ...]:
    """The registers that an XSAVE area describes: a component in its initial state as the processor has it.

    `mxcsr`: it was saved by XSAVE, which saves MXCSR whether or not SSE state is in use.

    FOP, FIP and FDP count only while an x87 exception is pending: AMD keeps them only then, and Intel's FDP likewise
    (CPUID leaf 7, "FDP_EXCPTN_ONLY"); elsewhere no program can rely on them.
    """
    present = int.from_bytes(area[XSTATE_BV : XSTATE_BV + 8], "little")
    parts: list[bytes | bytearray | memoryview] = []
    if present & 1:
        parts += area[:5], area[ST:XMM]
        parts.append(area[6:24] if area[2] & 0x80 else b"")
    else:
        parts += _X87_INITIAL
    parts.append(area[XMM : XMM + 256] if present & 2 else bytes(256))
    parts.append(area[24:28] if mxcsr or present & 6 else _MXCSR_INITIAL)
    for component, (offset, size, _) in components().items():
        parts.append(area[offset : offset + size] if present >> component & 1 else bytes(size))
    return tuple(map(bytes, parts))


_X87_INITIAL = [b"\x7f\x03\x00\x00\x00", bytes(XMM - ST), b""]
_MXCSR_INITIAL = b"\x80\x1f\x00\x00"
_MXCSR_MASK = b"\xff\xff\x02\x00"


def xsave_image(chance: random.Random, present: int, *, unmasked: bool = False) -> bytes:
    """An XSAVE area in the standard format with `present` components; `unmasked`: with x87 exceptions, pending too.

    SSE state is in use in any case: AMD's processors always say so.
    """
    area = bytearray(AREA)
    status = chance.getrandbits(3) << 11 | chance.getrandbits(4) << 8
    control = 0x37F
    if unmasked:
        # Of the exceptions few: each that is pending and not masked makes all other instructions raise #MF.
        control = control & ~0x3F | chance.choice((0x3F, 0x3F, 0x3E, 0x3D, chance.getrandbits(6)))
        control = control & ~0xF00 | chance.getrandbits(4) << 8
        status |= chance.choice((0, 0, 0, 0x01, 0x41, 0x20, chance.getrandbits(6)))
        if status & ~control & 0x3F:
            status |= 0x8080
    pointers = (chance.getrandbits(11), chance.getrandbits(47), chance.getrandbits(47)) if status & 0x80 else (0, 0, 0)
    tags = chance.choice((0, 0xFF, chance.getrandbits(8)))
    struct.pack_into("<HHBBHQQ", area, 0, control, status, tags, 0, *pointers)
    struct.pack_into("<I4s", area, 24, 0x1F80 | chance.choice((0, 0, 1, 0x8000, 0x6000)), _MXCSR_MASK)
    for place in range(8):
        struct.pack_into("<QH", area, ST + 16 * place, *_real(chance))
    area[XMM : XMM + 256] = _vector(chance, 256)
    for offset, size, _ in components().values():
        area[offset : offset + size] = _vector(chance, size)
    area[XSTATE_BV : XSTATE_BV + 8] = (present | 2).to_bytes(8, "little")
    return bytes(area)


def _vector(chance: random.Random, size: int) -> bytes:
    """Random registers of 16 bytes, with equal and extreme bytes, words and doublewords among them."""
    parts = []
    for _ in range(size // 16):
        kind = chance.randrange(6)
        if kind == 0:
            parts.append(b"".join(chance.choices((b"\x00", b"\x7f", b"\x80", b"\xff", b"\x01"), k=16)))
        elif kind == 1:
            parts.append(b"".join(chance.choices((b"\x00\x80", b"\xff\x7f", b"\xff\xff", b"\x00\x00"), k=8)))
        elif kind == 2:
            parts.append(struct.pack("<QQ", chance.randrange(80), chance.choice((0, 1 << 63, (1 << 64) - 1))))
        else:
            parts.append(chance.randbytes(16))
    return b"".join(parts)


def _real(chance: random.Random) -> tuple[int, int]:
    """An 80-bit number as (significand, sign and exponent): ordinary ones, and every special kind."""
    kind = chance.randrange(10)
    sign = chance.getrandbits(1) << 15
    mantissa = chance.getrandbits(63)
    if kind == 0:
        return chance.choice(((0, sign), (1 << 63, sign | 0x7FFF), (3 << 62, sign | 0x7FFF), (3 << 62, 0xFFFF)))
    if kind == 1:
        return mantissa | chance.choice((1, 2, 3)) << 62 & (1 << 64) - 1, sign | 0x7FFF  # NaN, also signalling
    if kind == 2:
        return mantissa >> chance.randrange(63), sign  # denormal
    if kind == 3:
        return mantissa, sign | chance.randrange(1, 0x8000)  # what the 8087 had, and is invalid today
    if kind == 4:
        return chance.getrandbits(64) | 1 << 63, sign | chance.randrange(0x7FFF)
    if kind == 5:
        return (chance.getrandbits(8) << 56 | 1 << 63), sign | 0x3FFF + chance.randrange(-4, 70)
    exponent = 0x3FFF + chance.choice(
        (chance.randrange(-3, 70), chance.randrange(-160, 140), chance.randrange(-1100, 1030))
    )
    return mantissa >> (s := chance.choice((0, 11, 40))) << s | 1 << 63, sign | exponent


class Batch:
    """States, and the VM that they are loaded in."""

    def __init__(self, vcpu: Vcpu, size: int, cases: Sequence[Given]) -> None:
        self.vcpu = vcpu
        self.memory = vcpu.vm.memory
        self.cases: Sequence[Given] = ()
        image, symbols = assemble_with_symbols(_LOOP, address=CODE, bits=64)
        self.memory.write(CODE, image)
        self.hole = symbols["instruction"]
        idt = Idt()
        for vector in range(32):
            idt[vector] = Gate("interrupt", symbols[f"fault{vector}"])
        self.state = prepare(self.memory, entry=CODE, tables=TABLES, stack=STACK, ring=3, identity_map=size, idt=idt)
        self.state.sregs.cr0 |= 1 << 5  # NE
        self.state.sregs.cr4 |= 1 << 9 | 1 << 18  # OSFXSR, OSXSAVE
        with contextlib.suppress(KvmError):  # where CPUID hides XSAVE, ring 3 has what the host has
            xcrs = vcpu.get_xcrs()
            xcrs.xcrs[0].value = xcr0()
            vcpu.set_xcrs(xcrs)
        self.load(cases)

    def place(self, number: int) -> int:
        """Where the memory of a case is."""
        return RECORDS + RECORD * number + DATA

    def load(self, cases: Sequence[Given]) -> None:
        """Take over states. A general register may be a function of the address of the case's memory."""
        self.cases = cases
        self._filled = [given.data + bytes(ROOM - len(given.data)) for given in cases]
        for number, given in enumerate(cases):
            at = RECORDS + RECORD * number
            self.memory.write(at + AREA_IN, given.xsave)
            self.memory.write(at + AREA_OUT, bytes(AREA))
            self.memory.write(at + GENERAL_IN, struct.pack("<16Q", *given.general))
            self.memory.write(at + FLAGS_IN, struct.pack("<Q", given.flags | 2))

    def native(self, code: bytes, numbers: range | None = None) -> list[Outcome]:
        """What the processor makes of them, or of those of one range."""
        memory, vcpu = self.memory, self.vcpu
        numbers = range(len(self.cases)) if numbers is None else numbers
        memory.write(self.hole, code + b"\x90" * (_HOLE - len(code)))
        for number in numbers:
            memory.write(self.place(number), self._filled[number])
        memory.write(CURSOR, struct.pack("<QQQ", RECORDS + RECORD * numbers.start, len(numbers), 0))
        vcpu.set_cpu_state(self.state)
        event = vcpu.run(timeout=20)
        assert isinstance(event, IoOut), f"{code.hex(' ')}: {event!r} at {vcpu.regs.rip:#x}"
        return [self._outcome(number) for number in numbers]

    def _outcome(self, number: int) -> Outcome:
        record = self.memory.read(RECORDS + RECORD * number, RECORD)
        general = list(struct.unpack_from("<16Q", record, GENERAL_OUT))
        general[_RSP] = 0
        flags, vector, error, address = struct.unpack_from("<4Q", record, FLAGS_OUT)
        exception = None
        if vector:
            vector -= 1
            assert self.memory.read_u64(FAULT_AT) == self.hole
            exception = (
                vector, error if vector in _WITH_ERROR_CODE else None, address if vector == _PAGE_FAULT else None
            )  # fmt: skip
        area = record[AREA_OUT : AREA_OUT + AREA]
        (in_use,) = struct.unpack_from("<Q", area, XSTATE_BV)
        return Outcome(general, flags & ARITHMETIC_FLAGS, record[DATA:], canonical(area, mxcsr=True), exception, in_use)

    def software(self, code: bytes, number: int, given: Given | None = None) -> Outcome:
        """What the emulator makes of one, or of another state with the same memory."""
        place = self.place(number)
        given = given or self.cases[number]
        self.memory.write(place, self._filled[number])
        general = [*given.general, self.hole, given.flags | 2]
        general[_RSP] = STACK
        cpu = PlainProcessor(self.memory, self.state.sregs, general, given.xsave)
        exception = None
        try:
            perform(cpu, code + b"\x90" * 15, 64)
            assert general[_RIP] == self.hole + len(code)
        except GuestException as raised:
            exception = (raised.event.vector, raised.event.error_code, raised.event.address)
        general[_RSP] = 0
        return Outcome(
            general[:16], general[_RFLAGS] & ARITHMETIC_FLAGS, self.memory.read(place, ROOM),
            canonical(cpu.extended.area), exception,
        )  # fmt: skip


@contextlib.contextmanager
def batch(make: Callable[[random.Random, int, int], Given], seed: str, cases: int = CASES) -> Iterator[Batch]:
    """States made by `make(chance, number, address of the case's memory)`, and a VM for them."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        size = -(-(RECORDS + RECORD * cases) // 0x20_0000) * 0x20_0000
        vm.add_ram(0, size=size)
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(kvm.supported_cpuid())
        chance = random.Random(seed)
        yield Batch(vcpu, size, [make(chance, number, RECORDS + RECORD * number + DATA) for number in range(cases)])


def counted(given: Given, in_use: int) -> Given:
    """The same state with those components in use, some with their initial values: processors may count so (13.6)."""
    area = bytearray(given.xsave)
    (present,) = struct.unpack_from("<Q", area, XSTATE_BV)
    if not in_use & ~present:
        return given
    for component, (offset, size, _) in components().items():
        if in_use & ~present & 1 << component:
            area[offset : offset + size] = bytes(size)
    struct.pack_into("<Q", area, XSTATE_BV, present | in_use)
    return replace(given, xsave=bytes(area))


def compare_batch(
    states: Batch, code: bytes, *, undefined: int = 0, leave_out: Callable[[Given], bool] = lambda given: False,
    saves: bool = False, numbers: range | None = None,
) -> None:  # fmt: skip
    """Everything must be equal but the flags that are `undefined`, in all cases but those to `leave_out`.

    `saves`: the instruction shows which components are in use, so the emulator gets those that the processor counts.
    `numbers`: only these states.
    """
    for number, native in enumerate(states.native(code, numbers), numbers.start if numbers else 0):
        given = states.cases[number]
        problem = _problem(states, code, number, native, undefined, saves)
        for _ in range(3 if saves else 0):
            if problem:  # an interrupt of the host right after the instruction changes what the processor counts
                (native,) = states.native(code, range(number, number + 1))
                problem = _problem(states, code, number, native, undefined, saves)
        if problem and not leave_out(given):
            raise AssertionError(f"{code.hex(' ')}: case {number}: {problem}")


def _problem(states: Batch, code: bytes, number: int, native: Outcome, undefined: int, saves: bool) -> str:
    """What the emulator makes of a state otherwise than the processor, or nothing."""
    software = states.software(code, number, counted(states.cases[number], native.in_use) if saves else None)
    native.flags &= ~undefined
    software.flags &= ~undefined
    if native.exception == _UNDEFINED_OPCODE and software.exception == _GENERAL_PROTECTION:
        # A KVM without VT-x and AMD-V looks at each #GP of ring 3 with its emulator, which does not know it either.
        native.exception = _GENERAL_PROTECTION
    return "" if software == native else _differences(software, native)


def compare_forms(states: Batch, codes: Mapping[str, bytes], forms: Sequence[str]) -> None:
    """Compare the forms of one instruction, each in its share of the states."""
    cases = len(states.cases)
    share = -(-cases // len(forms))
    for at, form in enumerate(forms):
        start = min(at * share, cases - share)
        try:
            compare_batch(states, codes[form], numbers=range(start, start + share))
        except AssertionError as error:
            raise AssertionError(f"{form}: {error}") from None


def _differences(software: Outcome, native: Outcome) -> str:
    """What is not equal, readably."""
    lines = []
    for name in ("general", "flags", "exception"):
        one, other = getattr(software, name), getattr(native, name)
        if one != other:
            lines.append(f"{name}: {one}, the processor {other}")
    parts = ["FCW, FSW, FTW", "ST", "FOP, FIP, FDP", "XMM", "MXCSR", *(f"component {part}" for part in components())]
    for name, one, other in zip(parts, software.extended, native.extended, strict=True):
        if one != other:
            lines.append(f"{name}: {_bytes(one, other)}")
    if software.data != native.data:
        lines.append(f"memory: {_bytes(software.data, native.data)}")
    return "\n".join(lines)


def _bytes(one: bytes, other: bytes) -> str:
    if len(one) != len(other):
        return f"{one.hex(' ')}, the processor {other.hex(' ')}"
    places = [place for place in range(len(one)) if one[place] != other[place]]
    first, last = places[0] & ~15, places[-1] + 1
    return f"at {first:#x}: {one[first:last].hex(' ')}\n    the processor: {other[first:last].hex(' ')}"


def assemble_each(forms: Iterable[str]) -> dict[str, bytes]:
    """The machine code of each form, assembled together."""
    sources = list(forms)
    source = "\n".join(f"form{number}: {form}" for number, form in enumerate(sources)) + "\nend:"
    image, symbols = assemble_with_symbols(source, bits=64)
    marks = [symbols[f"form{number}"] for number in range(len(sources))] + [symbols["end"]]
    start = marks[0]
    return {form: image[marks[at] - start : marks[at + 1] - start] for at, form in enumerate(sources)}
