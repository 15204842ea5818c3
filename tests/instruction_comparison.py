"""One instruction, executed by the processor in ring 3 and by `kvmpy.x86.emulator`, from the same state: compared.

Ring 3 runs natively on every host, so this compares with the real processor even where KVM runs ring 0 in software.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gnu_toolchain import assemble
from kvmpy import IoOut, Kvm
from kvmpy.kvm import Vcpu
from kvmpy.x86.emulator import GuestException, decode, perform
from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.emulator.linear_memory import LinearMemory
from kvmpy.x86.registers import GENERAL_REGISTERS, CpuState

__all__ = ["ARITHMETIC_FLAGS", "DATA", "Comparison", "Given", "Result", "compare", "comparison"]

CODE, DATA, STACK, TABLES = 0x1000, 0x8000, 0xC000, 0x10_0000
DATA_SIZE = 0x2000
ARITHMETIC_FLAGS = 0x8D5
_STOP = b"\xe6\x10"  # out 0x10, al
_RSP, _RIP, _RFLAGS = (GENERAL_REGISTERS.index(name) for name in ("rsp", "rip", "rflags"))


@dataclass(slots=True)
class Given:
    """The state before the instruction: general registers but RSP, flags, what memory holds at DATA, XSAVE area."""

    general: list[int]
    flags: int = 0
    data: bytes = bytes(64)
    xsave: bytes = b""

    @classmethod
    def random(cls, chance: random.Random, size: int = 64) -> Given:
        """Registers and memory with interesting numbers among them: zero, all ones, single bits, small ones."""
        general = [_number(chance) for _ in range(16)]
        return cls(general, chance.getrandbits(12) & ARITHMETIC_FLAGS, chance.randbytes(size))


def _number(chance: random.Random) -> int:
    kind = chance.randrange(8)
    if kind == 0:
        return 0
    if kind == 1:
        return (1 << 64) - 1
    if kind == 2:
        return 1 << chance.randrange(64)
    if kind == 3:
        return chance.randrange(256)
    return chance.getrandbits(64) >> chance.choice((0, 0, 0, 1, 31, 32, 33, 48))


@dataclass(slots=True)
class Result:
    """The state after it."""

    general: list[int]
    flags: int
    data: bytes
    xsave: bytes = field(default=b"", repr=False)


class PlainProcessor:
    """The emulator's `Processor` over plain values."""

    def __init__(self, vcpu: Vcpu, state: CpuState, general: list[int], xsave: bytes) -> None:
        self.general = general
        self.sregs = state.sregs
        self.memory = LinearMemory(vcpu.vm.memory, state.sregs, general)
        self._vcpu = vcpu
        self.extended = ExtendedState(xsave)
        self.msrs: dict[int, int] = {}

    def extended_state(self) -> ExtendedState:
        return self.extended

    def read_msr(self, index: int) -> int | None:
        return self.msrs.get(index)

    def write_msr(self, index: int, value: int) -> bool:
        self.msrs[index] = value
        return True

    def xcr0(self) -> int:
        return int(self._vcpu.get_xcrs().xcrs[0].value)

    def timestamp(self) -> int:
        return 0

    def flush_translations(self) -> None:
        pass

    def alone(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class Comparison:
    """A VM for the real processor, and the same memory for the emulator."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.memory = vcpu.vm.memory
        vcpu.set_long_mode(CODE, tables=TABLES, stack=STACK, ring=3)
        self.state = vcpu.cpu_state()

    def native(self, code: bytes, given: Given) -> Result:
        """Execute it on the processor."""
        self._prepare(code, given)
        vcpu = self.vcpu
        state = self.state.copy()
        general = [*given.general, CODE, given.flags | 2]
        general[_RSP] = STACK
        for name, value in zip(GENERAL_REGISTERS, general, strict=True):
            setattr(state.regs, name, value)
        vcpu.regs.assign(state.regs)
        if given.xsave:
            vcpu.set_xsave(given.xsave)
        event = vcpu.run(timeout=5)
        assert isinstance(event, IoOut), f"{code.hex(' ')}: {event!r} at {vcpu.regs.rip:#x}"
        after = [getattr(vcpu.regs, name) for name in GENERAL_REGISTERS]
        xsave = vcpu.get_xsave() if given.xsave else b""
        return self._result(after, xsave)

    def software(self, code: bytes, given: Given) -> Result:
        """Perform it by the emulator."""
        self._prepare(code, given)
        general = [*given.general, CODE, given.flags | 2]
        general[_RSP] = STACK
        cpu = PlainProcessor(self.vcpu, self.state, general, given.xsave)
        perform(cpu, code + _STOP + bytes(15), 64)
        assert general[_RIP] == CODE + len(code)
        return self._result(general, bytes(cpu.extended.area) if given.xsave else b"")

    def fault(self, code: bytes, given: Given) -> GuestException | None:
        """What the emulator raises, or None."""
        try:
            self.software(code, given)
        except GuestException as raised:
            return raised
        return None

    def _prepare(self, code: bytes, given: Given) -> None:
        self.memory.write(CODE, code + _STOP)
        self.memory.write(DATA, given.data)

    def _result(self, general: list[int], xsave: bytes) -> Result:
        return Result(
            [value for place, value in enumerate(general[:16]) if place != _RSP],
            general[_RFLAGS] & ARITHMETIC_FLAGS,
            self.memory.read(DATA, DATA_SIZE),
            xsave,
        )


@contextlib.contextmanager
def comparison() -> Iterator[Comparison]:
    """A VM to compare in."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x20_0000)
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(kvm.supported_cpuid())
        yield Comparison(vcpu)


def compare(pair: Comparison, source: str, cases: int, prepare: Callable[[int, Given], object]) -> None:
    """Compare one instruction, given as assembly, in random states; `prepare(number, given)` may change each.

    Everything must be equal but the flags that the manual leaves undefined for it.
    """
    code = assemble(source, bits=64)
    defined = ARITHMETIC_FLAGS & ~decode(code + bytes(15), 64)[0].undefined
    chance = random.Random(source)
    for number in range(cases):
        given = Given.random(chance)
        prepare(number, given)
        native, software = pair.native(code, given), pair.software(code, given)
        native.flags &= defined
        software.flags &= defined
        assert software == native, f"{source}: case {number}: {given}"
