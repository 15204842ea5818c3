"""Single steps in ring 3 on hosts where KVM reports none: there the trap goes to the guest, through its IDT.

A program that kvmpy starts in ring 3 has no IDT of its own, so it can be lent one: with a gate for #DB that leads to
two instructions in ring 0, OUT and IRETQ, in a page beyond the guest's RAM. With RFLAGS.TF set, every instruction of
the program ends in that OUT, which is an exit.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kvmpy.abi.flags import KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP
from kvmpy.devices.device import Region
from kvmpy.errors import OverlapError, UsageError
from kvmpy.exits import Debug
from kvmpy.kvm import Kvm
from kvmpy.kvm.first_exit import first_exit
from kvmpy.x86 import long_mode
from kvmpy.x86.descriptors import Gdt
from kvmpy.x86.flags import Rflags
from kvmpy.x86.gates import Gate, Idt
from kvmpy.x86.registers import GENERAL_REGISTERS, DescriptorTable, Segment

if TYPE_CHECKING:
    from kvmpy.debug.trace.subject import What
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine

__all__ = ["StepStub", "StubbedVcpu", "steps_come_out"]

_DB = 1
_CODE = 0x800
"""Where in the page the code is, behind the IDT."""
_PAGES = range(0xFEFE_0000, 0xFE00_0000, -0x1_0000)
"""Guest-physical places to try, where no PC has memory; mapped one to one like all below 4 GiB."""
_PORTS = range(0xFF, 0xDF, -1)
_KERNEL_CODE = 0x08
_TF = int(Rflags.TF)
_RIP, _RFLAGS, _RSP = (GENERAL_REGISTERS.index(name) for name in ("rip", "rflags", "rsp"))


def _code(port: int) -> bytes:
    return bytes([0xE6, port, 0x48, 0xCF])  # out port, al; iretq


@functools.cache
def steps_come_out() -> bool:
    """Whether this host's KVM reports single steps of ring 3 (KVM_EXIT_DEBUG), found out with a small guest."""
    entry, stub, tables = 0x1000, 0x2000, 0x10000
    idt = Idt()
    idt[_DB] = Gate("interrupt", stub, _KERNEL_CODE)
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=tables + long_mode.tables_size())
        vm.memory.write(entry, b"\x90\xeb\xfd")  # nop; jmp back to it
        vm.memory.write(stub, _code(_PORTS[0]))
        vcpu = vm.create_vcpu()
        vcpu.set_cpu_state(long_mode.prepare(vm.memory, entry=entry, tables=tables, ring=3, idt=idt))
        vcpu.set_guest_debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
        return isinstance(first_exit(vcpu, 1.0), Debug)


class StepStub:
    """The page with IDT and code, and the port that the code writes to. Raises OverlapError when no place is free."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.port = next((port for port in _PORTS if machine.ports.find(port) is None), -1)
        if self.port < 0:
            raise OverlapError(f"a port for single steps, {_PORTS[-1]:#x} to {_PORTS[0]:#x}", "devices at all of them")
        self.page = next((page for page in _PAGES if self._is_free(page)), -1)
        if self.page < 0:
            raise OverlapError("a page for single steps", "other memory at all places for it")
        self._memory = machine.vm.add_ram(self.page, size=0x1000, name="single steps")
        self._region = Region("port", self.port, 1, "single steps", None, None)
        machine.ports.add(self._region)
        idt = Idt()
        idt[_DB] = Gate("interrupt", self.page + _CODE, _KERNEL_CODE)
        machine.memory.write(self.page, idt.to_bytes()[: 0x10 * (_DB + 1)])
        machine.memory.write(self.page + _CODE, _code(self.port))
        self.what: What = ("port", "write", self.port, 1)
        """How a run loop tells of the exit."""

    def _is_free(self, page: int) -> bool:
        machine = self._machine
        return machine.memory.region_at(page) is None and machine.mmio.find(page) is None

    @property
    def idt(self) -> DescriptorTable:
        """What IDTR has to hold: all vectors but #DB are beyond its end, as before."""
        return DescriptorTable(self.page, 0x10 * (_DB + 1) - 1)

    def fits(self, vcpu: Vcpu) -> bool:
        """Whether a vCPU in ring 3 of 64-bit mode can use it: it has no IDT, and GDT and page tables as kvmpy's are."""
        sregs, memory = vcpu.sregs, self._machine.memory
        if sregs.idt.limit >= self.idt.limit or vcpu.walk(self.page).physical != self.page:
            return False
        try:
            table = memory.read(vcpu.walk(sregs.gdt.base).physical or 0, min(sregs.gdt.limit + 1, 2 * _KERNEL_CODE))
            code = Gdt.decode(table, long_mode=True).segment(_KERNEL_CODE)
        except UsageError:  # not in memory, or no such descriptor
            return False
        return bool(code.s and code.type & 8 and code.l and code.present and code.dpl == 0)

    def remove(self) -> None:
        """When no vCPU uses it any more."""
        self._machine.ports.remove(self._region)
        self._machine.vm.remove_memory(self._memory)


class StubbedVcpu:
    """A vCPU that steps by a stub."""

    def __init__(self, vcpu: Vcpu, stub: StepStub) -> None:
        self._vcpu = vcpu
        self._stub = stub
        self._idt = DescriptorTable(0, 0)
        self._segments: tuple[Segment, Segment] = (vcpu.sregs.cs, vcpu.sregs.ss)

    def start(self) -> None:
        """Between two exits, the program in ring 3."""
        self._idt = self._vcpu.sregs.idt
        self._vcpu.sregs.idt = self._stub.idt
        self.renew()

    def stop(self) -> None:
        """The same; where the vCPU is in the stub, its IRETQ is done here."""
        regs, sregs = self._vcpu.regs, self._vcpu.sregs
        if self._in_stub:
            rip, rflags, rsp = self._frame()
            regs.rip, regs.rflags, regs.rsp = rip, rflags, rsp
            sregs.cs, sregs.ss = self._segments
        regs.rflags &= ~_TF
        sregs.idt = self._idt

    def renew(self) -> None:
        """Have the next instruction trap."""
        if not self._in_stub and not self._vcpu.regs.rflags & _TF:
            self._vcpu.regs.rflags |= _TF

    def is_step(self, what: What) -> bool:
        """Whether an exit is that of the stub."""
        return what == self._stub.what and self._in_stub

    def registers(self) -> tuple[int, ...]:
        """Those of the program, in the order of GENERAL_REGISTERS, without TF. For the IRETQ of the stub, TF is set."""
        values = [getattr(self._vcpu.regs, name) for name in GENERAL_REGISTERS]
        if self._in_stub:
            values[_RIP], values[_RFLAGS], values[_RSP] = self._frame()
            if (at := self._frame_address()) is not None:
                self._vcpu.vm.memory.write_u64(at + 0x10, values[_RFLAGS] | _TF)
        values[_RFLAGS] &= ~_TF
        return tuple(values)

    def address(self) -> int:
        """Of the program's next instruction."""
        rip: int = self._frame()[0] if self._in_stub else self._vcpu.regs.rip
        return rip

    @property
    def _in_stub(self) -> bool:
        return bool(self._stub.page <= self._vcpu.regs.rip < self._stub.page + 0x1000)

    def _frame_address(self) -> int | None:
        """Guest-physical, of what the trap pushed: RIP, CS, RFLAGS, RSP, SS. None: a program has broken the stack."""
        memory, physical = self._vcpu.vm.memory, self._vcpu.walk(self._vcpu.regs.rsp).physical
        if physical is None or memory.region_at(physical) is None or memory.region_at(physical + 0x27) is None:
            return None
        return physical

    def _frame(self) -> tuple[int, int, int]:
        memory, at = self._vcpu.vm.memory, self._frame_address()
        if at is None:
            return 0, 0, 0
        return memory.read_u64(at), memory.read_u64(at + 0x10), memory.read_u64(at + 0x18)
