"""How ring 3 enters ring 0 on a host whose KVM gets that wrong: SYSCALL and INT n, repaired.

A KVM that runs ring 3 natively without VT-x or AMD-V may let SYSCALL jump to LSTAR with RCX and R11 set but the
privilege level unchanged, so that the guest takes a page fault at LSTAR; and INT n raises #UD instead of going through
its gate. Both end in the guest's own exception handlers. So a debug register stops the vCPU at the first instruction of
the handlers of #PF and #UD. When the frame there says "from ring 3, at LSTAR", or the bytes at the saved RIP are an
INT n, the exception is undone and the processor put where the manual says (SDM vol. 2, SYSCALL; vol. 3, 6.12). Every
other exception goes on untouched.

None of this is armed where the host is sound: see `needs_repair`.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING

from kvmpy import exits
from kvmpy.errors import GuestMemoryError
from kvmpy.kvm import Kvm
from kvmpy.machine.emulated_processor import EmulatedProcessor
from kvmpy.machine.guest_debug import DebugRegister
from kvmpy.x86.descriptors import decode_segment
from kvmpy.x86.emulator import GuestException, TruncatedInstruction, UnknownInstruction, perform
from kvmpy.x86.event_delivery import Delivered, Event, deliver
from kvmpy.x86.flags import Efer
from kvmpy.x86.msrs import Msr
from kvmpy.x86.registers import Segment

if TYPE_CHECKING:
    from kvmpy.machine.vcpu_runner import VcpuRunner

__all__ = ["Ring3Entry", "needs_repair"]

_UD, _PF = 6, 14
_P, _W, _U = 1, 2, 4
_RF = 1 << 16
_INT = 0xCD
_RIP, _RFLAGS, _RSP = 16, 17, 6
_GATE_SIZE = 16
_FRAME = struct.Struct("<5Q")  # RIP, CS, RFLAGS, RSP, SS


class Ring3Entry:
    """The repair for one vCPU. `arm` looks where the guest's handlers are; `inspect` gets the exits."""

    def __init__(self, runner: VcpuRunner) -> None:
        self._runner = runner
        self._vcpu = runner.vcpu
        self._handlers: dict[int, DebugRegister] = {}
        self._passing = False
        self.counts = {"syscall": 0, "int n": 0}
        """How often each was repaired."""

    def arm(self) -> None:
        """Stop at the handlers that the IDT names now, once the guest has set LSTAR. Between two exits."""
        vcpu = self._vcpu
        sregs = vcpu.sregs
        handlers: dict[int, int] = {}
        if sregs.efer & Efer.LMA and sregs.efer & Efer.SCE:
            for vector in (_PF, _UD):
                address = self._handler(vector)
                if address is not None:
                    handlers[vector] = address
        if handlers == {vector: register.address for vector, register in self._handlers.items()}:
            return
        debug = self._runner.debug
        for register in self._handlers.values():
            debug.remove(register)
        self._handlers = {}
        for vector, address in handlers.items():
            if debug.free:
                self._handlers[vector] = register = DebugRegister(address)
                debug.add(register)
        debug.apply()

    def _handler(self, vector: int) -> int | None:
        """Where the IDT sends a vector, or None when the gate cannot be read."""
        idt = self._vcpu.sregs.idt
        if vector * _GATE_SIZE + _GATE_SIZE - 1 > idt.limit:
            return None
        cpu = self._processor()
        try:
            gate = cpu.memory.read(idt.base + vector * _GATE_SIZE, _GATE_SIZE, implicit=True)
        except (GuestException, GuestMemoryError):
            return None
        low, _, _, attributes, middle, high = struct.unpack("<HHBBHI", gate[:12])
        address: int = low | middle << 16 | high << 32
        return address if attributes & 0x80 and address else None

    def _processor(self) -> EmulatedProcessor:
        return EmulatedProcessor(self._vcpu, self._runner.control, self._runner.loop.mmio)

    def inspect(self, event: exits.Debug) -> bool:
        """An exit at one of the handlers, or after the step past one: True, and the guest can go on."""
        if self._passing:
            self._passing = False
            self._runner.debug.run(self)
            self._runner.debug.apply()
            return True
        vector = next((vector for vector, register in self._handlers.items() if register.address == event.pc), None)
        if vector is None:
            return False
        cpu = self._processor()
        try:
            repaired = self._syscall(cpu) if vector == _PF else self._interrupt(cpu)
        except (GuestException, GuestMemoryError):
            repaired = False
        if not repaired:
            self._pass_handler(cpu)
        return True

    def _pass_handler(self, cpu: EmulatedProcessor) -> None:
        """Pass the breakpoint: do the handler's first instruction in software if it is known, else by a step."""
        try:
            code = cpu.memory.read(cpu.general[_RIP], 15)
            perform(cpu, code, 64)
        except (GuestException, GuestMemoryError, UnknownInstruction, TruncatedInstruction):
            self._passing = True
            self._runner.debug.step(self, past=cpu.general[_RIP])
            self._runner.debug.apply()
            return
        cpu.write_back()

    def _syscall(self, cpu: EmulatedProcessor) -> bool:
        """SYSCALL, if the page fault is what the host made of one."""
        rsp = cpu.general[_RSP]
        frame = cpu.memory.read(rsp, 48)
        (error,) = struct.unpack_from("<Q", frame)
        rip, cs, rflags, user_rsp, _ = _FRAME.unpack_from(frame, 8)
        if cs & 3 != 3 or error & (_P | _W | _U) != _P | _U:
            return False
        msrs = self._vcpu.get_msrs((Msr.LSTAR, Msr.STAR, Msr.SFMASK))
        if rip != msrs[Msr.LSTAR]:
            return False
        selector = msrs[Msr.STAR] >> 32 & 0xFFFC
        self._enter_ring_0(selector)
        cpu.general[_RIP] = rip
        cpu.general[_RSP] = user_rsp
        cpu.general[_RFLAGS] = rflags & ~msrs[Msr.SFMASK] & ~_RF | 2
        cpu.write_back()
        self.counts["syscall"] += 1
        return True

    def _enter_ring_0(self, selector: int) -> None:
        """CS and SS as SYSCALL loads them, whatever the descriptors say (SDM vol. 2)."""
        sregs = self._vcpu.sregs
        flat = 0xFFFF_FFFF
        sregs.cs = Segment(selector, 0, flat, type=11, l=1, g=1)
        sregs.ss = Segment(selector + 8, 0, flat, type=3, db=1, g=1)
        sregs.interrupt = None  # KVM keeps what is on its way; here may be what was delivered long ago

    def _interrupt(self, cpu: EmulatedProcessor) -> bool:
        """INT n, if that is at the RIP that the undefined-opcode exception saved."""
        rip, cs, rflags, user_rsp, ss = _FRAME.unpack(cpu.memory.read(cpu.general[_RSP], _FRAME.size))
        if cs & 3 != 3:
            return False
        code = cpu.memory.read(rip, 2)
        if code[0] != _INT:
            return False
        vcpu = self._vcpu
        state = vcpu.cpu_state()
        sregs = state.sregs
        sregs.cs, sregs.ss = self._segment(cpu, cs), self._segment(cpu, ss)
        sregs.interrupt = None  # as in _enter_ring_0
        state.regs.rip, state.regs.rsp, state.regs.rflags = rip, user_rsp, rflags & ~_RF
        delivered = deliver(vcpu.vm.memory, state, Event.software_interrupt(code[1]))
        if not isinstance(delivered, Delivered):
            return False
        vcpu.set_cpu_state(delivered.state)
        self.counts["int n"] += 1
        return True

    def _segment(self, cpu: EmulatedProcessor, selector: int) -> Segment:
        base = cpu.sregs.gdt.base + (selector & 0xFFF8)
        return decode_segment(cpu.memory.read(base, 8, implicit=True), selector)


# syscall at 0x1000 in ring 3; LSTAR is a page of ring 0 with HLT
_CODE, _HANDLER, _TABLES, _STACK = 0x1000, 0x20_0000, 0x4000, 0x3000
_SECONDS = 1.0


@functools.cache
def needs_repair() -> bool:
    """Whether SYSCALL in ring 3 keeps the privilege level on this host: found by a guest of one instruction."""
    from kvmpy.kvm.first_exit import first_exit
    from kvmpy.x86.long_mode import prepare
    from kvmpy.x86.page_tables import PageTables
    from kvmpy.x86.paging import PagingMode

    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x40_0000)
        vm.memory.write(_CODE, b"\x0f\x05")
        vm.memory.write(_HANDLER, b"\xf4")
        state = prepare(vm.memory, entry=_CODE, tables=_TABLES, stack=_STACK, ring=3, identity_map=0x40_0000)
        pages = PageTables(vm.memory, PagingMode.LEVEL4, state.sregs.cr3, size=0x3000)
        pages.map(0, 0, 0x20_0000, user=True, page_size=0x20_0000)
        pages.map(_HANDLER, _HANDLER, 0x20_0000, page_size=0x20_0000)
        state.sregs.efer |= Efer.SCE
        vcpu = vm.create_vcpu()
        vcpu.set_cpuid(kvm.supported_cpuid())
        vcpu.set_cpu_state(state)
        vcpu.set_msrs({Msr.STAR: 0x0008 << 32, Msr.LSTAR: _HANDLER, Msr.SFMASK: 0})
        return not isinstance(first_exit(vcpu, _SECONDS), exits.Hlt)
