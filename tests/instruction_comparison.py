"""One instruction, executed by the processor in ring 3 and by `kvmpy.x86.emulator`, from the same state: compared.

Ring 3 runs natively on every host, so this compares with the real processor even where KVM runs ring 0 in software.
`Comparison` takes one state at a time; `instruction_batch` thousands, of general and XSAVE registers.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gnu_toolchain import assemble
from kvmpy import Hlt, IoOut, Kvm
from kvmpy.abi.structs import kvm_xsave
from kvmpy.kvm import Vcpu
from kvmpy.machine.xsave_layout import xsave_layout
from kvmpy.memory import GuestMemory
from kvmpy.x86.emulator import GuestException, decode, perform
from kvmpy.x86.emulator.extended_state import ExtendedState
from kvmpy.x86.emulator.linear_memory import LinearMemory
from kvmpy.x86.gates import Gate, Idt
from kvmpy.x86.long_mode import prepare
from kvmpy.x86.registers import GENERAL_REGISTERS, SystemRegisters

__all__ = [
    "AREA", "ARITHMETIC_FLAGS", "DATA", "RAM", "Comparison", "Given", "PlainProcessor", "Result", "compare",
    "comparison", "components", "xcr0",
]  # fmt: skip

CODE, DATA, STACK, TABLES, HANDLERS = 0x1000, 0x8000, 0xC000, 0x10_0000, 0x2000
DATA_SIZE = 0x2000
RAM = 0x20_0000
"""Bytes of memory; no address from there on is mapped."""
ARITHMETIC_FLAGS = 0x8D5
_STOP = b"\xe6\x10"  # out 0x10, al
_HLT = b"\xf4"
_RSP, _RIP, _RFLAGS = (GENERAL_REGISTERS.index(name) for name in ("rsp", "rip", "rflags"))
_PF, _WITH_ERROR_CODE = 14, {8, 10, 11, 12, 13, 14, 17}


AREA = 0xB00
"""Bytes of an XSAVE area in the standard format that are compared."""


@functools.cache
def components() -> dict[int, tuple[int, int, bool]]:
    """The host's extended components that lie in AREA, as `xsave_layout` gives them: AVX, AVX-512, PKRU ..."""
    return {number: place for number, place in xsave_layout().items() if place[0] + place[1] <= AREA}


@functools.cache
def xcr0() -> int:
    """XCR0 with these."""
    return 3 | sum(1 << number for number in components())


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
    """The state after it. `exception` is (vector, error code, address of a page fault) when it raised one."""

    general: list[int]
    flags: int
    data: bytes
    xsave: bytes = field(default=b"", repr=False)
    exception: tuple[int, int | None, int | None] | None = None


class PlainProcessor:
    """The emulator's `Processor` over plain values."""

    def __init__(self, memory: GuestMemory, sregs: SystemRegisters, general: list[int], xsave: bytes) -> None:
        self.general = general
        self.sregs = sregs
        self.memory = LinearMemory(memory, sregs, general)
        self.extended = ExtendedState(bytearray(xsave), components())
        self.msrs: dict[int, int] = {}
        self.enabled = xcr0()
        self.tsc = 0

    def extended_state(self, replaced: int = 0) -> ExtendedState:
        return self.extended

    def read_msr(self, index: int) -> int | None:
        return self.msrs.get(index)

    def write_msr(self, index: int, value: int) -> bool:
        self.msrs[index] = value
        return True

    def xcr0(self) -> int:
        return self.enabled

    def timestamp(self) -> int:
        return self.tsc

    def flush_translations(self) -> None:
        pass

    def alone(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class Comparison:
    """A VM for the real processor, and the same memory for the emulator."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.memory = vcpu.vm.memory
        idt = Idt()
        for vector in range(32):
            idt[vector] = Gate("interrupt", HANDLERS + 16 * vector)
            self.memory.write(HANDLERS + 16 * vector, _HLT)
        self.state = prepare(
            self.memory, entry=CODE, tables=TABLES, stack=STACK, ring=3, identity_map=RAM, idt=idt
        )  # fmt: skip
        vcpu.set_cpu_state(self.state)
        # What ring 3 has in any case.
        self.state.sregs.cr0 |= 1 << 5  # NE
        self.state.sregs.cr4 |= 1 << 9 | 1 << 18  # OSFXSR, OSXSAVE
        self._xsave = kvm_xsave()
        self._area = memoryview(self._xsave).cast("B")

    def native(self, code: bytes, given: Given) -> Result:
        """Execute it on the processor."""
        self._prepare(code, given)
        vcpu = self.vcpu
        general = [*given.general, CODE, given.flags | 2]
        general[_RSP] = STACK
        vcpu.regs.assign_values(general)
        if given.xsave:
            self._area[:] = given.xsave
            vcpu.ioctl("KVM_SET_XSAVE", self._xsave)
        event = vcpu.run(timeout=5)
        after = vcpu.regs.values()
        xsave = b""
        if given.xsave:
            vcpu.ioctl("KVM_GET_XSAVE", self._xsave)
            xsave = bytes(self._area)
        if event == Hlt():
            return self._result(after, xsave, self._exception(after))
        assert isinstance(event, IoOut), f"{code.hex(' ')}: {event!r} at {vcpu.regs.rip:#x}"
        return self._result(after, xsave)

    def _exception(self, after: list[int]) -> tuple[int, int | None, int | None]:
        """What brought the processor to a handler; RFLAGS are put back from the frame there."""
        vector = (after[_RIP] - 1 - HANDLERS) // 16
        frame = after[_RSP]
        error = None
        if vector in _WITH_ERROR_CODE:
            error, frame = self.memory.read_u64(frame), frame + 8
        assert self.memory.read_u64(frame) == CODE  # a fault, of the instruction itself
        after[_RFLAGS] = self.memory.read_u64(frame + 16)
        address = self.vcpu.sregs.cr2 if vector == _PF else None
        self.vcpu.sregs.assign(self.state.sregs)
        return vector, error, address

    def software(self, code: bytes, given: Given) -> Result:
        """Perform it by the emulator."""
        self._prepare(code, given)
        general = [*given.general, CODE, given.flags | 2]
        general[_RSP] = STACK
        cpu = PlainProcessor(self.memory, self.state.sregs, general, given.xsave)
        exception = None
        try:
            perform(cpu, code + _STOP + bytes(15), 64)
            assert general[_RIP] == CODE + len(code)
        except GuestException as raised:
            exception = (raised.event.vector, raised.event.error_code, raised.event.address)
        return self._result(general, bytes(cpu.extended.area) if given.xsave else b"", exception)

    def fault(self, code: bytes, given: Given) -> GuestException | None:
        """What the emulator raises, or None."""
        self._prepare(code, given)
        cpu = PlainProcessor(self.memory, self.state.sregs, [*given.general, CODE, given.flags | 2], given.xsave)
        try:
            perform(cpu, code + _STOP + bytes(15), 64)
        except GuestException as raised:
            return raised
        return None

    def _prepare(self, code: bytes, given: Given) -> None:
        self.memory.write(CODE, code + _STOP)
        self.memory.write(DATA, given.data)

    def _result(
        self, general: list[int], xsave: bytes, exception: tuple[int, int | None, int | None] | None = None
    ) -> Result:
        return Result(
            [value for place, value in enumerate(general[:16]) if place != _RSP],
            general[_RFLAGS] & ARITHMETIC_FLAGS,
            self.memory.read(DATA, DATA_SIZE),
            xsave,
            exception,
        )


@contextlib.contextmanager
def comparison() -> Iterator[Comparison]:
    """A VM to compare in."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=RAM)
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
