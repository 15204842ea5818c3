"""Single steps as events: which instruction a vCPU executed, and what it changed."""

from __future__ import annotations

from functools import partial
from threading import Event, get_ident
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmpy.abi.flags import KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED
from kvmpy.debug.program_counter import linear_pc
from kvmpy.debug.trace.ring3_steps import StepStub, StubbedVcpu, steps_come_out
from kvmpy.errors import OverlapError
from kvmpy.exits import Debug, Hlt, InternalError
from kvmpy.x86.flags import Cr0
from kvmpy.x86.register_text import code_bits
from kvmpy.x86.registers import GENERAL_REGISTERS

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from kvmpy._exit import Exit
    from kvmpy.debug.trace.subject import What
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine
    from kvmpy.machine.outcome import Outcome
    from kvmpy.machine.vcpu_runner import VcpuRunner
    from kvmpy.x86.registers import Segment

    class _SystemRegisters(Protocol):
        @property
        def cs(self) -> Segment: ...
        @property
        def ss(self) -> Segment: ...
        @property
        def cr0(self) -> int: ...

    class _Way(Protocol):
        """How a vCPU steps: switched on and off between two exits, and again after an exit that was no step."""

        def start(self) -> None: ...
        def stop(self) -> None: ...
        def renew(self) -> None: ...
        def is_step(self, what: What) -> bool: ...
        def registers(self) -> tuple[int, ...]: ...
        def address(self) -> int: ...


__all__ = ["StepObserver"]

_NO_STEPS = ("other", None, "no steps: ring 3 with an IDT of its own, on a host where it gets the trap")
_STARTED = ("other", None, "started by INIT and SIPI")
_STEP = 1 << 14
"""DR6.BS: a single step ended (SDM vol. 3, 18.2.3)."""
_PATIENCE = 20
"""How often a vCPU is waited for, 50 ms each, that may be in a slow handler. It does it later, then."""
_ACCESS = 4
"""Items of a port or memory access that was an exit, as an observer is told it."""
_LONGEST = 15
_RSP, _RIP = GENERAL_REGISTERS.index("rsp"), GENERAL_REGISTERS.index("rip")
_PAGE = 0x1000
_HLT = b"\xf4"
_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_REX = range(0x40, 0x50)
_CLEAR_TF = frozenset((0x9D, 0xCF, 0xCC, 0xCD, 0xCE, 0xF1))  # POPF, IRET, INT3, INT n, INTO, INT1
_CLEAR_TF_0F = frozenset((b"\x05", b"\x07", b"\x34", b"\x35"))  # SYSCALL, SYSRET, SYSENTER, SYSEXIT


class StepObserver:
    """Stands between the run loops and a tracer: has the vCPUs step, and makes events of the steps."""

    def __init__(self, machine: Machine, note: Callable[..., None]) -> None:
        self._machine = machine
        self._note = note
        self._runners = machine.runners
        self._stepped = {runner.vcpu.id: _SteppedVcpu(runner.vcpu) for runner in self._runners}
        self._stub: StepStub | None = None

    def start(self) -> None:
        """Have every vCPU step from its next entry on."""
        for runner in self._runners:
            self._do(runner, partial(self._start, runner))

    def stop(self) -> None:
        """Let them run again."""
        for runner in self._runners:
            if not runner.vcpu.closed:
                self._do(runner, partial(self._stop, runner))

    def _start(self, runner: VcpuRunner) -> None:
        runner.exit_handlers.setdefault(Debug, self._go_on)
        way = self._way(runner)
        if way is not None:
            self._stepped[runner.vcpu.id].start(way)
        else:
            now = perf_counter_ns()
            self._note(runner.vcpu.id, now, now, now, _NO_STEPS, None)

    def _way(self, runner: VcpuRunner) -> _Way | None:
        """How a vCPU can be made to step: by KVM, or in ring 3 of some hosts by a stub; None: not at all."""
        sregs = runner.vcpu.sregs
        if sregs.ss.dpl != 3 or not sregs.cr0 & Cr0.PE or steps_come_out():
            return _KvmSteps(runner)
        if not sregs.cs.l:
            return None
        try:
            stub = self._stub if self._stub is not None else StepStub(self._machine)
        except OverlapError:  # a machine that is full of memory or devices
            return None
        if stub.fits(runner.vcpu):
            self._stub = stub
            return StubbedVcpu(runner.vcpu, stub)
        if stub is not self._stub:
            stub.remove()
        return None

    def _stop(self, runner: VcpuRunner) -> None:
        self._stepped[runner.vcpu.id].stop()
        if self._stub is not None and not any(stepped.on for stepped in self._stepped.values()):
            self._stub.remove()
            self._stub = None
        if runner.exit_handlers.get(Debug) == self._go_on:
            del runner.exit_handlers[Debug]

    def _do(self, runner: VcpuRunner, call: Callable[[], None]) -> None:
        """Between two exits, in the vCPU's thread where it has one now; done when this returns, if that is possible."""
        control = runner.control
        if not self._machine.running or get_ident() in control.pausing:
            call()
            return
        begun, done = Event(), Event()

        def once() -> None:
            if not begun.is_set():
                begun.set()
                call()
                done.set()

        runner.post(once)
        if control.called_from_the_run():  # in a handler, which that vCPU may be waiting for
            return
        for _ in range(_PATIENCE):
            if done.wait(0.05):
                return
            if not self._machine.running:
                once()

    def _go_on(self, vcpu: Vcpu, event: Exit) -> Outcome | None:
        """In place of "nobody handles Debug": a step ends nothing, unless it was that of a HLT."""
        runner = next(runner for runner in self._runners if runner.vcpu is vcpu)
        if not (isinstance(event, Debug) and event.dr6 & _STEP):
            return runner.outcome_of(event)
        if not self._stepped[vcpu.id].has_halted:
            return None
        # Where KVM's emulator executes HLT, the step takes the place of the exit, or of the sleep.
        if not vcpu.vm.irqchip:
            return runner.outcome_of(Hlt())
        vcpu.set_mp_state(KVM_MP_STATE_HALTED)  # an interrupt that waits already ends it at once
        return None

    def note(self, vcpu: int, entered: int, left: int, handled: int, what: What, value: Any, /) -> None:
        """As `Observer.note`, in the vCPU's thread: there its registers can be read."""
        stepped = self._stepped[vcpu]
        if not stepped.on:
            self._note(vcpu, entered, left, handled, what, value)
        elif stepped.way.is_step(what):
            self._note(vcpu, entered, left, handled, *stepped.completed())
        else:
            self._note(vcpu, entered, left, handled, what, value)
            if _ends_an_instruction(what) and stepped.has_moved:
                self._note(vcpu, handled, handled, handled, *stepped.completed())
            stepped.way.renew()


def _ends_an_instruction(what: What) -> bool:
    """Whether RIP may be behind the instruction already: KVM then reports no step of it.

    So it is with an access that writes, and with what was done in software. A write that was queued is no exit.
    """
    return type(what) is InternalError or (isinstance(what, tuple) and len(what) == _ACCESS)


class _KvmSteps:
    """A vCPU that KVM makes step (KVM_GUESTDBG_SINGLESTEP)."""

    def __init__(self, runner: VcpuRunner) -> None:
        self._debug = runner.debug
        self._vcpu = runner.vcpu

    def start(self) -> None:
        self._debug.traced = True
        self._debug.apply()

    def stop(self) -> None:
        self._debug.traced = False
        self._debug.apply()

    def renew(self) -> None:
        self._debug.apply()

    def is_step(self, what: What) -> bool:
        return type(what) is Debug and bool(what.dr6 & _STEP)

    def registers(self) -> tuple[int, ...]:
        regs = self._vcpu.regs
        return tuple([getattr(regs, name) for name in GENERAL_REGISTERS])

    def address(self) -> int:
        return linear_pc(self._vcpu)


class _SteppedVcpu:
    """Where a vCPU is: its next instruction and its registers, to be compared after the step."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self.way: _Way
        self.on = False
        self._address = 0
        self._code = b""
        self._bits = 16
        self._registers: tuple[int, ...] = ()
        self._waits = False
        """Whether it has not been started yet, so that it is not known where it will be."""
        self._page: tuple[int, int, int] | None = None
        """Of the code: CR3, and a virtual and the physical address of the page."""
        self._frame: _Frame | None = None
        """Where an event that comes before the next instruction would leave its return address."""

    def start(self, way: _Way) -> None:
        """In the vCPU's thread, between two exits."""
        self.way = way
        way.start()
        self._look()
        waiting = (KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED)
        self._waits = bool(self._vcpu.vm.irqchip) and self._vcpu.get_mp_state() in waiting
        self.on = True

    def stop(self) -> None:
        """The same."""
        if self.on:
            self.on = False
            self.way.stop()

    @property
    def has_moved(self) -> bool:
        """Whether RIP is another one than at the last look."""
        return self.way.address() != self._address

    @property
    def has_halted(self) -> bool:
        """Whether the instruction that was executed is a HLT that did halt."""
        length = _prefixes(self._code, self._bits) + 1
        return self._code[length - 1 : length] == _HLT and self.way.address() == self._address + length

    def completed(self) -> tuple[What, dict[str, int] | None]:
        """An instruction was executed: what it was, and the registers that it changed, RIP aside."""
        if self._waits:
            self._waits = False
            self._look()
            return _STARTED, None
        address, code, before = self._address, self._code, self._registers
        bits, frame = self._bits, self._frame
        if _clears_tf(code, bits):
            self.way.renew()
        self._look()
        # An interrupt or exception came first, and what was executed is the first instruction of its handler.
        event = frame is not None and self._registers[_RSP] <= frame.address and self._holds(frame)
        what = ("step", "event" if event else None, address, code, bits)
        changed = {
            name: now for name, now, then in zip(GENERAL_REGISTERS, self._registers, before, strict=True) if now != then
        }
        changed.pop("rip", None)
        return what, changed

    def _look(self) -> None:
        sregs = self._vcpu.sregs
        self._registers = self.way.registers()
        self._address = self.way.address()
        self._bits = code_bits(sregs)
        self._code = self._read(self._address)
        self._frame = _frame(self._bits, self._registers[_RSP], self._registers[_RIP], sregs)

    def _holds(self, frame: _Frame) -> bool:
        physical = self._physical(frame.base + frame.address)
        memory = self._vcpu.vm.memory
        if physical is None or memory.region_at(physical) is None or memory.region_at(physical + 15) is None:
            return False
        return memory.read(physical, len(frame.content)) == frame.content

    def _read(self, address: int) -> bytes:
        """The bytes at a linear address, as many as an instruction may have and as are mapped."""
        room = min(_PAGE - address % _PAGE, _LONGEST)
        code = self._read_in_page(address, room)
        if len(code) == room < _LONGEST:
            code += self._read_in_page(address + room, _LONGEST - room)
        return code

    def _read_in_page(self, address: int, length: int) -> bytes:
        memory = self._vcpu.vm.memory
        physical = self._physical(address)
        if physical is None or memory.region_at(physical) is None:
            return b""
        return memory.read(physical, length)

    def _physical(self, address: int) -> int | None:
        sregs = self._vcpu.sregs
        if not sregs.cr0 & Cr0.PG:
            return address
        page = self._page
        if page is None or page[0] != sregs.cr3 or page[1] != address // _PAGE:
            translation = self._vcpu.translate(address)
            if not translation.valid:
                return None
            self._page = page = (sregs.cr3, address // _PAGE, translation.physical_address // _PAGE)
        return page[2] * _PAGE + address % _PAGE


class _Frame(NamedTuple):
    """What delivery of an event pushes last, an error code aside: the return address, with CS."""

    base: int
    address: int
    """Relative to the base of SS, like RSP."""
    content: bytes


def _frame(bits: int, rsp: int, rip: int, sregs: _SystemRegisters) -> _Frame | None:
    """The frame on the present stack (SDM vol. 3, 6.12.1, 6.14.2, and 20.1.4 for real mode); None for other modes."""
    selector = sregs.cs.selector
    if not sregs.cr0 & Cr0.PE:
        return _Frame(sregs.ss.base, rsp - 6 & 0xFFFF, (rip & 0xFFFF | selector << 16).to_bytes(4, "little"))
    if bits == 32 and rsp >= 12:
        return _Frame(sregs.ss.base, rsp - 12, (rip & 0xFFFF_FFFF | selector << 32).to_bytes(6, "little"))
    if bits == 64 and rsp >= 64:
        return _Frame(0, (rsp & -16) - 40, (rip | selector << 64).to_bytes(10, "little"))
    return None


def _prefixes(code: bytes, bits: int) -> int:
    """How many prefixes an instruction has."""
    count = 0
    while count < len(code) and (code[count] in _PREFIXES or (bits == 64 and code[count] in _REX)):
        count += 1
    return count


def _clears_tf(code: bytes, bits: int) -> bool:
    """Whether an instruction loads RFLAGS, or enters a handler, so that RFLAGS.TF may be gone behind it."""
    at = _prefixes(code, bits)
    opcode = code[at : at + 2]
    return opcode[:1] != b"" and (opcode[0] in _CLEAR_TF or (opcode[0] == 0x0F and opcode[1:] in _CLEAR_TF_0F))
