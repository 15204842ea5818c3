"""Instructions that fault by themselves: undefined, privileged, switched off, divisions, traps (SDM vol. 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvmpy._value import replace
from kvmpy.debug.crash_report.first_event.candidate import Candidate, Cause
from kvmpy.debug.crash_report.first_event.decoder import Decoded, decode
from kvmpy.debug.crash_report.first_event.execution import Execution, read_linear
from kvmpy.debug.disassembly import BYTES, Disassembler
from kvmpy.exits import InternalError
from kvmpy.x86.event_delivery import Event
from kvmpy.x86.flags import Cr0, Cr4, Efer, Rflags

__all__ = [
    "completed_software_event",
    "divide_fault",
    "privilege_fault",
    "software_event",
    "undefined_fault",
    "unit_fault",
]

_NOT_IN_64_BITS = frozenset(
    (0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0x27, 0x2F, 0x37, 0x3F, 0x60, 0x61, 0x82, 0x9A, 0xCE, 0xD4, 0xD5, 0xEA)
)
"""Opcodes that 64-bit mode does not have (SDM vol. 2, table A-2, i64)."""
_NOWHERE = frozenset((0x0F04, 0x0F0A, 0x0F0B, 0x0F0C, 0x0F24, 0x0F25, 0x0F26, 0x0F27, 0x0F36, 0x0FB9, 0x0FFF))
_NAMED_UNDEFINED = {0x0F0B: "UD2", 0x0FB9: "UD1", 0x0FFF: "UD0"}
_LOCKABLE = frozenset(
    (*(row + column for row in range(0, 0x38, 8) for column in (0, 1)), 0x80, 0x81, 0x82, 0x83, 0x86, 0x87, 0xF6,
     0xF7, 0xFE, 0xFF, 0x0FAB, 0x0FB3, 0x0FBB, 0x0FBA, 0x0FB0, 0x0FB1, 0x0FC0, 0x0FC1, 0x0FC7)
)  # fmt: skip
"""SDM vol. 2, LOCK."""


def undefined_fault(execution: Execution) -> Candidate | None:
    """#UD for what is no instruction here, by the opcode map; certain where the manual says so."""
    decoded = execution.decoded
    shown = execution.code[:8].hex(" ")
    if decoded is None:
        return _undecoded(execution, shown)
    opcode = decoded.opcode
    if opcode in _NOWHERE:
        name = _NAMED_UNDEFINED.get(opcode)
        text = f"{name} raises it on purpose" if name else f"no processor has the opcode {shown[:5]}"
        return Candidate.undefined(Cause.UNDEFINED, text)
    if execution.bits == 64 and opcode in _NOT_IN_64_BITS:
        return Candidate.undefined(Cause.UNDEFINED, f"64-bit mode has no instruction with opcode {opcode:#04x}")
    if (opcode == 0xFF and decoded.group == 7) or (opcode == 0xFE and decoded.group > 1):
        return Candidate.undefined(Cause.UNDEFINED, f"the bytes {shown} are no instruction")
    if opcode in (0x8E, 0x8C) and (decoded.group > 5 or (opcode == 0x8E and decoded.group == 1)):
        what = "CS cannot be loaded by MOV" if decoded.group == 1 else "there is no such segment register"
        return Candidate.undefined(Cause.UNDEFINED, what)
    if opcode in (0x62, 0x8D, 0xC4, 0xC5, 0x0FB2, 0x0FB4, 0x0FB5) and decoded.memory is None:
        return Candidate.undefined(Cause.UNDEFINED, f"the bytes {shown} need an operand in memory")
    if decoded.lock and (decoded.memory is None or opcode not in _LOCKABLE):
        return Candidate.undefined(Cause.UNDEFINED, "LOCK stands before an instruction that cannot be locked")
    if not execution.protected and (opcode == 0x0F00 or opcode == 0x63) and execution.bits != 64:
        return Candidate.undefined(Cause.NOT_IN_THIS_MODE, "real mode does not have this instruction")
    if opcode == 0x0F05 and not execution.sregs.efer & Efer.SCE:
        return Candidate.undefined(Cause.FEATURE_OFF, "SYSCALL needs EFER.SCE, which is 0")
    if _is_xsetbv(decoded) and not execution.sregs.cr4 & Cr4.OSXSAVE:
        return Candidate.undefined(Cause.FEATURE_OFF, "XSETBV needs CR4.OSXSAVE, which is 0")
    if opcode > 0xFF and not _known_to_disassembler(execution):
        return Candidate.undefined(Cause.UNDEFINED, f"the bytes {shown} may be no instruction", certain=False)
    return None


def _known_to_disassembler(execution: Execution) -> bool:
    """Whether capstone has the instruction; True where it cannot say."""
    disassembler = Disassembler()
    if not disassembler.available or len(execution.code) < 15:
        return True
    found = disassembler.disassemble(execution.code, execution.rip, execution.bits, 1)
    return bool(found) and found[0].mnemonic != BYTES


def _is_xsetbv(decoded: Decoded) -> bool:
    return decoded.opcode == 0x0F01 and decoded.memory is None and (decoded.group, decoded.rm & 7) == (2, 1)


def _undecoded(execution: Execution, shown: str) -> Candidate | None:
    """Bytes that the decoder does not take: AVX, or something only a disassembler knows."""
    code = execution.code
    if len(code) < 2:
        return None
    if code[0] in (0xC4, 0xC5, 0x62):
        if not execution.sregs.cr4 & Cr4.OSXSAVE or not execution.sregs.cr0 & Cr0.PE:
            return Candidate.undefined(Cause.FEATURE_OFF, f"AVX ({shown}) needs CR4.OSXSAVE, which is 0")
        return None
    return Candidate.undefined(Cause.UNDEFINED, f"the bytes {shown} may be no instruction", certain=False)


# SSE and x87


def unit_fault(execution: Execution) -> Candidate | None:
    """Whether the unit that executes the instruction is switched off (SDM vol. 3, 2.5 and 13.1)."""
    decoded = execution.decoded
    if decoded is None:
        return None
    cr0, cr4 = execution.sregs.cr0, execution.sregs.cr4
    opcode = decoded.opcode
    if opcode == 0x9B:
        waits = cr0 & Cr0.MP and cr0 & Cr0.TS
        return Candidate.device_not_available("CR0.MP=1 and CR0.TS=1: WAIT is switched off") if waits else None
    if 0xD8 <= opcode <= 0xDF or (opcode == 0x0FAE and decoded.group < 2):
        off = cr0 & (Cr0.EM | Cr0.TS)
        return Candidate.device_not_available(f"{_set(cr0)}: the x87 unit is switched off") if off else None
    if not _is_vector(opcode):
        return None
    mmx = _is_mmx(decoded)
    if cr0 & Cr0.EM:
        return Candidate.undefined(Cause.SSE_OFF, "CR0.EM=1: SSE and MMX are switched off")
    if not mmx and not cr4 & Cr4.OSFXSR:
        return Candidate.undefined(Cause.SSE_OFF, "CR4.OSFXSR=0: the system has not switched SSE on")
    if cr0 & Cr0.TS:
        return Candidate.device_not_available("CR0.TS=1: the unit waits for its registers to be switched")
    return None


def _set(cr0: int) -> str:
    return " and ".join(f"CR0.{bit.name}=1" for bit in (Cr0.EM, Cr0.TS) if cr0 & bit)


def _is_vector(opcode: int) -> bool:
    if opcode >> 8 != 0x0F:
        return opcode >> 16 == 0x0F and opcode >> 8 & 0xFF in (0x38, 0x3A) and opcode & 0xFF < 0xE0
    second = opcode & 0xFF
    return (
        0x10 <= second <= 0x17
        or 0x28 <= second <= 0x2F
        or (0x50 <= second <= 0x7F and second not in (0x77, 0x78, 0x79))
        or second in (0xC2, 0xC4, 0xC5, 0xC6)
        or 0xD0 <= second <= 0xFE
    )


def _is_mmx(decoded: Decoded) -> bool:
    second = decoded.opcode & 0xFF
    packed = 0x60 <= second <= 0x7F or 0xD1 <= second <= 0xFE or second in (0xC4, 0xC5)
    return decoded.opcode >> 8 == 0x0F and packed and not decoded.operand_prefix and not decoded.rep


# Privilege

_PRIVILEGED = {
    0xF4: "HLT", 0x0F06: "CLTS", 0x0F08: "INVD", 0x0F09: "WBINVD", 0x0F20: "MOV from a control register",
    0x0F21: "MOV from a debug register", 0x0F22: "MOV to a control register", 0x0F23: "MOV to a debug register",
    0x0F30: "WRMSR", 0x0F32: "RDMSR", 0x0F35: "SYSEXIT", 0x0F07: "SYSRET",
}  # fmt: skip
_PRIVILEGED_GROUPS = {
    (0x0F00, 2): "LLDT", (0x0F00, 3): "LTR", (0x0F01, 2): "LGDT", (0x0F01, 3): "LIDT", (0x0F01, 6): "LMSW",
    (0x0F01, 7): "INVLPG or SWAPGS",
}  # fmt: skip
_IOPL_SENSITIVE = {0xFA: "CLI", 0xFB: "STI"}
_IN_OUT = {0xE4: 1, 0xE5: 0, 0xE6: 1, 0xE7: 0, 0xEC: 1, 0xED: 0, 0xEE: 1, 0xEF: 0, 0x6C: 1, 0x6D: 0, 0x6E: 1, 0x6F: 0}
"""Opcode -> bytes of the port access, 0 for the operand size."""


def privilege_fault(execution: Execution) -> Candidate | None:
    """#GP of instructions that the current privilege level may not execute (SDM vol. 3, 5.9)."""
    decoded, cpl = execution.decoded, execution.cpl
    if decoded is None or not cpl:
        return None
    name = _PRIVILEGED.get(decoded.opcode) or _PRIVILEGED_GROUPS.get((decoded.opcode, decoded.group))
    if name is not None and not (decoded.opcode == 0x0F01 and decoded.group in (2, 3) and decoded.memory is None):
        return Candidate.protection(Cause.PRIVILEGED, f"{name} may be executed in ring 0 only, and this is ring {cpl}")
    if cpl <= execution.iopl:
        return None
    name = _IOPL_SENSITIVE.get(decoded.opcode)
    if name is not None:
        text = f"{name} needs CPL <= IOPL; CPL is {cpl}, IOPL {execution.iopl}"
        return Candidate.protection(Cause.PRIVILEGED, text, certain=not execution.sregs.cr4 & (Cr4.PVI | Cr4.VME))
    if decoded.opcode in _IN_OUT:
        return _port_fault(execution, decoded)
    return None


def _port_fault(execution: Execution, decoded: Decoded) -> Candidate | None:
    """Above IOPL the TSS's I/O bitmap decides (SDM vol. 1, 18.5.2)."""
    size = _IN_OUT[decoded.opcode] or min(decoded.operand_bits // 8, 4)
    port = decoded.immediate if 0xE4 <= decoded.opcode <= 0xE7 else execution.regs.rdx & 0xFFFF
    tr = execution.sregs.tr
    why = ""
    base = read_linear(execution.memory, execution.state, tr.base + 0x66, 2)
    place = int.from_bytes(base, "little") + port // 8
    if tr.limit < 0x67 or len(base) < 2:
        why = f"the TSS (limit {tr.limit:#x}) has no I/O bitmap"
    elif place + 1 > tr.limit:
        why = f"the I/O bitmap has no bit for it within the TSS limit {tr.limit:#x}"
    else:
        bits = int.from_bytes(read_linear(execution.memory, execution.state, tr.base + place, 2), "little")
        if not bits >> port % 8 & ((1 << size) - 1):
            return None
        why = "its bit in the I/O bitmap is 1"
    text = f"ring {execution.cpl} may not use port {port:#x}: IOPL is {execution.iopl}, and {why}"
    return Candidate.protection(Cause.PORT_DENIED, text).noting(port=port)


# Divisions


def divide_fault(execution: Execution) -> Candidate | None:
    """#DE: division by zero, or a quotient that does not fit (SDM vol. 2, DIV, IDIV, AAM)."""
    decoded = execution.decoded
    if decoded is None:
        return None
    if decoded.opcode == 0xD4 and not decoded.immediate & 0xFF and execution.bits != 64:
        return Candidate.exception(0, Cause.DIVIDE, "AAM 0 divides by zero")
    if decoded.opcode not in (0xF6, 0xF7) or decoded.group not in (6, 7):
        return None
    bits = decoded.operand_bits if decoded.opcode == 0xF7 else 8
    divisor = execution.operand(decoded, bits)
    if divisor is None:
        return None
    if divisor == 0:
        return Candidate.exception(0, Cause.DIVIDE, "the divisor is zero").noting(divisor=0)
    mask = (1 << bits) - 1
    regs = execution.regs
    dividend = regs.rax & 0xFFFF if bits == 8 else (regs.rdx & mask) << bits | regs.rax & mask
    if decoded.group == 7:
        divisor, dividend = _signed(divisor, bits), _signed(dividend, 2 * bits)
        quotient = abs(dividend) // abs(divisor)
        negative = (dividend < 0) != (divisor < 0)
        fits = quotient <= 1 << bits - 1 if negative else quotient < 1 << bits - 1
    else:
        fits = dividend // divisor <= mask
    if fits:
        return None
    high = "AH" if bits == 8 else {16: "DX", 32: "EDX", 64: "RDX"}[bits]
    text = f"the quotient of {dividend:#x} and {divisor:#x} does not fit {bits} bits; is {high} cleared before?"
    return Candidate.exception(0, Cause.DIVIDE, text).noting(divisor=divisor & mask)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


# Events that an instruction asks for


def software_event(execution: Execution) -> Iterator[Candidate]:
    """INT n, INT3, INTO and INT1."""
    decoded = execution.decoded
    if decoded is None:
        return
    opcode = decoded.opcode
    if opcode == 0xCD:
        vector = decoded.immediate & 0xFF
        event = Event.software_interrupt(vector, instruction_length=decoded.length)
        yield Candidate(
            event, Cause.SOFTWARE_INTERRUPT, f"the instruction is INT {vector:#04x}", True, {"vector": vector}
        )
    elif opcode == 0xCC:
        yield Candidate(Event.int3(), Cause.BREAKPOINT, "the instruction is INT3, a breakpoint", True, {"vector": 3})
    elif opcode == 0xCE and execution.regs.rflags & Rflags.OF and execution.bits != 64:
        yield Candidate(Event.into(), Cause.SOFTWARE_INTERRUPT, "INTO, and RFLAGS.OF is set", True, {"vector": 4})
    elif opcode == 0xF1:
        yield Candidate.exception(1, Cause.BREAKPOINT, "the instruction is INT1 (ICEBP)")


def completed_software_event(execution: Execution, exits: Sequence[object]) -> Candidate | None:
    """INT n or INT3 that kvmpy completed for a KVM that cannot emulate it: RIP is behind it when the guest ends."""
    failures = [event for event in exits[-2:] if isinstance(event, InternalError) and event.instruction]
    if not failures or failures[-1] is exits[-1]:
        return None
    decoded = decode(failures[-1].instruction, execution.bits)
    if decoded is None or decoded.opcode not in (0xCC, 0xCD):
        return None
    place = execution.rip - decoded.length
    if place < 0 or read_linear(execution.memory, execution.state, place, decoded.length) != decoded.data:
        return None
    if decoded.opcode == 0xCC:
        event, cause, text = Event.int3(), Cause.BREAKPOINT, "the instruction before RIP is INT3, a breakpoint"
    else:
        event = Event.software_interrupt(decoded.immediate)
        cause, text = Cause.SOFTWARE_INTERRUPT, f"the instruction before RIP is INT {decoded.immediate:#04x}"
    event = replace(event, instruction_length=0)  # RIP is the return address already
    return Candidate(event, cause, text, True, {"vector": event.vector, "instruction": place})
