"""What guests find out about a host's KVM: costs, modes that work, instructions that do not.

Every function here makes VMs of its own, runs guests of a few instructions in them, each under a timeout, and answers
with a small value. What a guest does is an answer, never an exception, and so is "refused", when KVM does not take the
guest's state. Other refusals (no VM, no memory) are a KvmError.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from kvmpy.cli import probe_programs as programs
from kvmpy.errors import KvmError
from kvmpy.exits import Exit, InternalError, Interrupted, IoOut, Shutdown
from kvmpy.kvm import Kvm, Vcpu
from kvmpy.kvm.run_page import EXIT_REASON, NO_EXIT
from kvmpy.x86 import long_mode, modes, protected_mode
from kvmpy.x86.cpuid import CpuidTable
from kvmpy.x86.cpuid_features import FEATURES
from kvmpy.x86.cpuid_platform import HYPERCALL_FEATURES
from kvmpy.x86.flags import Cr4, Efer
from kvmpy.x86.gates import Gate, Idt
from kvmpy.x86.paging import PagingMode
from kvmpy.x86.registers import CpuState

__all__ = [
    "MODES", "CpuidDifference", "ModeCost", "cpuid_difference", "hypercall_features", "hypercalls", "instructions",
    "interrupt_in_ring_3", "mode_cost", "paging", "runs_a_guest", "syscall_in_ring_3",
]  # fmt: skip

MODES = {
    "real": "real mode",
    "protected": "32-bit protected mode without paging",
    "long ring 0": "long mode, ring 0",
    "long ring 3": "long mode, ring 3",
}
"""The modes whose cost is measured, and what to call them."""

_MEMORY = 0x10_0000
_STUBS = 0x2000
_SCRATCH = 0x9000
_STACK = 0xC000
_TABLES = 0x1_0000
_SMALL_MAP = 0x40_0000
_TIMEOUT = 0.2
_HANGS = 0.1
"""Seconds. What answers does so in microseconds."""

_STAR, _LSTAR, _SFMASK = 0xC000_0081, 0xC000_0082, 0xC000_0084
_EXITS = 100
_FEW = 100
_MANY = 100_000
_SLOW = 100e-6
"""Seconds that 1,000 instructions take only where they are emulated (natively: less than one microsecond)."""

_EXCEPTIONS = {
    0: "#DE", 1: "#DB", 2: "NMI", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP",
    12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM", 20: "#VE", 21: "#CP", 28: "#HV",
    29: "#VC", 30: "#SX",
}  # fmt: skip
"""Vector -> mnemonic (SDM vol. 3, table 6-1; APM vol. 2, table 8-1)."""


@dataclass(frozen=True, slots=True)
class ModeCost:
    """`exit_us`: a port write to user space and back, median. `instruction_ns`: one addition of a loop."""

    exit_us: float
    instruction_ns: float


@dataclass(frozen=True, slots=True)
class CpuidDifference:
    """CPUID features that a guest sees although they were not in its table, and those that it misses."""

    added: tuple[str, ...]
    missing: tuple[str, ...]


@contextmanager
def _guest(kvm: Kvm, cpuid: CpuidTable | None) -> Iterator[Vcpu]:
    """A vCPU of a VM with 1 MiB of RAM that answers CPUID by `cpuid`."""
    with kvm.create_vm() as vm:
        # Intel processors without "unrestricted guest" need both for real mode (KVM API, sections 4.36 and 4.40).
        vm.set_identity_map_address(0xFEFF_C000)
        vm.set_tss_address(0xFEFF_D000)
        vm.add_ram(0, size=_MEMORY)
        vcpu = vm.create_vcpu()
        if cpuid is not None:
            vcpu.set_cpuid(cpuid)
        yield vcpu


def _enter(vcpu: Vcpu, mode: str, code: bytes, *, efer: int = 0, cr4: int = 0) -> None:
    """Write `code` and set the registers to start it in one of `MODES`; in long mode every exception has its stub."""
    memory = vcpu.vm.memory
    memory.write(programs.ADDRESS, code)
    if mode == "real":
        state = modes.real_mode(programs.ADDRESS, stack=_STACK)
    elif mode == "protected":
        state = protected_mode.prepare(memory, entry=programs.ADDRESS, tables=_TABLES, stack=_STACK)
    else:
        memory.write(_STUBS, programs.STUBS.code)
        idt = Idt()
        for vector in (*range(32), programs.VECTOR):
            dpl = 3 if vector == programs.VECTOR else 0
            idt[vector] = Gate("interrupt", _STUBS + vector * programs.STUB_SIZE, dpl=dpl)
        state = long_mode.prepare(
            memory, entry=programs.ADDRESS, tables=_TABLES, stack=_STACK, ring=3 if mode.endswith("3") else 0,
            identity_map=_SMALL_MAP, idt=idt,
        )  # fmt: skip
    state.sregs.efer |= efer
    state.sregs.cr4 |= cr4
    vcpu.set_cpu_state(state)


def _says(event: Exit) -> str:
    """What an exit means: "done", an exception by its name, or how the guest failed."""
    match event:
        case IoOut(port=programs.DONE):
            return "done"
        case IoOut(port=programs.EXCEPTION, data=data):
            return _EXCEPTIONS.get(data[0], f"interrupt {data[0]:#x}")
        case InternalError():
            return "not emulated"
        case Interrupted():
            return "hangs"
        case Shutdown():
            return "triple fault"
    return repr(event)


def _run(vcpu: Vcpu, timeout: float = _TIMEOUT) -> str:
    """Run to the next exit and say what it means; "refused" when KVM_RUN does not take the registers."""
    try:
        return _says(vcpu.run(timeout))
    except KvmError:
        return "refused"


def runs_a_guest(kvm: Kvm) -> bool:
    """Whether a guest of two instructions in real mode reaches user space."""
    with _guest(kvm, None) as vcpu:
        _enter(vcpu, "real", programs.EXIT.code)
        return _run(vcpu) == "done"


# Costs


def mode_cost(kvm: Kvm, mode: str, cpuid: CpuidTable) -> ModeCost | None:
    """Measure one of `MODES`. None: guests do not run in it."""
    bits = {"real": 16, "protected": 32}.get(mode, 64)
    try:
        with _guest(kvm, cpuid) as vcpu:
            _enter(vcpu, mode, programs.EXIT.code)
            exit_s = statistics.median(_time_exits(vcpu, _EXITS))
        with _guest(kvm, cpuid) as vcpu:
            _enter(vcpu, mode, programs.COUNT[bits].code)
            _time_exits(vcpu, 1)
            loops = _FEW
            if _time_loops(vcpu, loops) - exit_s < _SLOW:
                loops = _MANY
            took = min(_time_loops(vcpu, loops) for _ in range(3))
    except (KvmError, _NoExit):
        return None
    return ModeCost(exit_s * 1e6, max(took - exit_s, 0.0) / (10 * loops) * 1e9)


class _NoExit(Exception):
    """The guest did not reach its port write in time."""


def _time_loops(vcpu: Vcpu, loops: int) -> float:
    vcpu.regs.rcx = loops
    return _time_exits(vcpu, 1)[0]


def _time_exits(vcpu: Vcpu, times: int) -> list[float]:
    """Seconds from user space to the guest's port write and back, without what `Vcpu.run` does around it."""
    took: list[float] = []
    clock, page = time.perf_counter_ns, vcpu.page
    vcpu.claim()
    try:
        vcpu.arm(_TIMEOUT, _TIMEOUT)
        enter, arguments = vcpu.enter, vcpu.entry
        ends = time.monotonic() + _TIMEOUT
        for _ in range(times):
            began = clock()
            while enter(*arguments) < 0:  # that may be the heartbeat of the main thread
                if vcpu.take_kick() or time.monotonic() >= ends:
                    raise _NoExit
            took.append((clock() - began) * 1e-9)
            if page.exit_reason != IoOut.reason:
                raise _NoExit
            page.u32[EXIT_REASON // 4] = NO_EXIT
    finally:
        page.u32[EXIT_REASON // 4] = NO_EXIT
        vcpu.arm(0, 0)
        vcpu.release()
    return took


# Modes


def paging(kvm: Kvm, cpuid: CpuidTable) -> dict[str, bool]:
    """Which paging modes a guest can be started in."""
    return {
        "32-bit": _starts(kvm, cpuid, lambda vcpu: _paged(vcpu, PagingMode.BITS32)),
        "PAE": _starts(kvm, cpuid, lambda vcpu: _paged(vcpu, PagingMode.PAE)),
        "4-level": _starts(kvm, cpuid, lambda vcpu: _long(vcpu, 4)),
        "1 GiB pages": cpuid.has("pdpe1gb") and _starts(kvm, cpuid, _gigabyte_pages),
        "5-level": cpuid.has("la57") and _starts(kvm, cpuid, lambda vcpu: _long(vcpu, 5)),
    }


def _starts(kvm: Kvm, cpuid: CpuidTable, prepare: Callable[[Vcpu], CpuState]) -> bool:
    with suppress(KvmError), _guest(kvm, cpuid) as vcpu:
        vcpu.vm.memory.write(programs.ADDRESS, programs.EXIT.code)
        vcpu.set_cpu_state(prepare(vcpu))
        return _run(vcpu) == "done"
    return False


def _paged(vcpu: Vcpu, mode: PagingMode) -> CpuState:
    return protected_mode.prepare(
        vcpu.vm.memory, entry=programs.ADDRESS, tables=_TABLES, stack=_STACK, paging=mode, identity_map=_SMALL_MAP
    )


def _long(vcpu: Vcpu, levels: int) -> CpuState:
    return long_mode.prepare(
        vcpu.vm.memory, entry=programs.ADDRESS, tables=_TABLES, stack=_STACK, levels=levels, identity_map=_SMALL_MAP
    )


def _gigabyte_pages(vcpu: Vcpu) -> CpuState:
    # PML4 entry: present, writable; directory pointer entry: the same, and a page of 1 GiB at 0 (SDM vol. 3, 4.5).
    vcpu.vm.memory.write(_TABLES, (_TABLES + 0x1000 | 0x03).to_bytes(8, "little"))
    vcpu.vm.memory.write(_TABLES + 0x1000, (0x83).to_bytes(8, "little"))
    return modes.long_mode(programs.ADDRESS, _TABLES, stack=_STACK)


# Ring 3, hypercalls


def syscall_in_ring_3(kvm: Kvm, cpuid: CpuidTable) -> str:
    """What SYSCALL in ring 3 does: "switches to ring 0", "stays in ring 3", or how it failed."""
    with _guest(kvm, cpuid) as vcpu:
        try:
            _enter(vcpu, "long ring 3", programs.SYSCALL.code, efer=Efer.SCE)
            vcpu.set_msrs({_STAR: 0x1B << 48 | 0x08 << 32, _LSTAR: programs.SYSCALL_TARGET, _SFMASK: 0x700})
        except KvmError:
            return "refused"
        says = _run(vcpu)
        if says != "done":
            return says
        return "stays in ring 3" if vcpu.sregs.cs.selector & 3 or vcpu.sregs.ss.dpl else "switches to ring 0"


def interrupt_in_ring_3(kvm: Kvm, cpuid: CpuidTable) -> str:
    """What INT n through a gate of DPL 3 does in ring 3: "delivered", or what came instead."""
    with _guest(kvm, cpuid) as vcpu:
        _enter(vcpu, "long ring 3", programs.INTERRUPT.code)
        says = _run(vcpu)
        return "delivered" if says == f"interrupt {programs.VECTOR:#x}" else says


def hypercalls(kvm: Kvm, cpuid: CpuidTable) -> dict[str, str]:
    """What VMCALL and VMMCALL with an unknown number do in ring 0: "answered", "hangs", or what came instead."""
    answers = {}
    for name, program in programs.HYPERCALLS.items():
        with _guest(kvm, cpuid) as vcpu:
            _enter(vcpu, "long ring 0", program.code)
            vcpu.regs.rax = 0x7FFF_FFFF
            says = _run(vcpu, _HANGS)
            answers[name] = "answered" if says == "done" else says
    return answers


def hypercall_features(cpuid: CpuidTable, answers: Mapping[str, str]) -> list[str]:
    """The features of a table by which it asks for hypercalls that do not come back, by the `answers` of `hypercalls`.

    See `kvmpy.machine.hypercall_probe`, by which a Machine finds out the same.
    """
    instruction = "vmmcall" if cpuid.vendor in ("AuthenticAMD", "HygonGenuine") else "vmcall"
    if answers[instruction] == "answered":
        return []
    places = ((name, place) for name, place in FEATURES.items() if place.function == 0x4000_0001)
    return [
        name
        for name, place in places
        if place.register == "eax" and HYPERCALL_FEATURES >> place.bit & 1 and cpuid.has(name)
    ]


# CPUID, instructions


def cpuid_difference(kvm: Kvm, mode: str, cpuid: CpuidTable) -> tuple[CpuidDifference, frozenset[str]]:
    """How the features that a guest sees in one of `MODES` differ from those of its table, and all that it sees.

    Features that KVM changes by design are left out: OSXSAVE and OSPKE follow CR4, APIC follows the local APIC.
    """
    leaves = sorted({(place.function, place.index, place.register) for place in FEATURES.values()})
    seen: dict[tuple[int, int, str], int] = {}
    with _guest(kvm, cpuid) as vcpu:
        _enter(vcpu, mode, programs.CPUID.code)
        for function, index, register in leaves:
            vcpu.regs.rax, vcpu.regs.rcx = function, index
            # EAX is output and input: the exit of the last turn has just been completed, RIP is at CPUID again.
            if _run(vcpu) != "done":
                break
            seen[function, index, register] = getattr(vcpu.regs, f"r{register[1:]}") & 0xFFFF_FFFF
    by_design = {"osxsave", "ospke", "apic"}
    present = frozenset(
        name
        for name, place in FEATURES.items()
        if seen.get((place.function, place.index, place.register), 0) >> place.bit & 1
    )
    asked = cpuid.features()
    added, missing = present - asked - by_design, asked - present - by_design
    return CpuidDifference(tuple(sorted(added)), tuple(sorted(missing))), present


def instructions(kvm: Kvm, cpuid: CpuidTable, present: Iterable[str]) -> dict[str, str]:
    """What ring 0 of long mode does with each of `programs.INSTRUCTIONS` whose feature is in `present`.

    "runs", "wrong result", "not emulated", or the exception that came instead.
    """
    features = frozenset(present)
    answers = {}
    cr4 = 0
    if "xsave" in features:
        cr4 |= Cr4.OSXSAVE
    if "fsgsbase" in features:
        cr4 |= Cr4.FSGSBASE
    for instruction in programs.INSTRUCTIONS:
        if instruction.feature is None or instruction.feature in features:
            answers[instruction.name] = _try(kvm, cpuid, instruction, cr4, avx="avx" in features)
    return answers


def _try(kvm: Kvm, cpuid: CpuidTable, instruction: programs.Instruction, cr4: int, *, avx: bool) -> str:
    with _guest(kvm, cpuid) as vcpu:
        try:
            _enter(vcpu, "long ring 0", instruction.code, cr4=cr4)
        except KvmError:  # the guest sees a feature that its table does not have, and KVM goes by the table
            _enter(vcpu, "long ring 0", instruction.code)
        if avx:
            with suppress(KvmError):
                xcrs = vcpu.get_xcrs()
                xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = 1, 0, 7
                vcpu.set_xcrs(xcrs)
        vcpu.regs.rcx, vcpu.regs.rdi = 0xFF, _SCRATCH
        vcpu.regs.rax = vcpu.regs.rdx = 0
        says = _run(vcpu)
        wanted = instruction.ends_in
        if says != wanted:
            return says
        result = vcpu.regs.rax & 0xFFFF_FFFF
        return "runs" if instruction.result in (None, result) else "wrong result"
