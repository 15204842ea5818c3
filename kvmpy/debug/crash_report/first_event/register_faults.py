"""Values that control registers, MSRs and table registers do not take (SDM vol. 2, MOV, WRMSR, XSETBV, LGDT)."""

from __future__ import annotations

from kvmpy.debug.crash_report.first_event.candidate import Candidate, Cause
from kvmpy.debug.crash_report.first_event.decoder import Decoded
from kvmpy.debug.crash_report.first_event.execution import Execution
from kvmpy.debug.crash_report.first_event.memory_faults import is_canonical
from kvmpy.errors import GuestMemoryError
from kvmpy.x86.flags import Cr0, Cr4, Efer

__all__ = ["branch_fault", "register_fault"]

_EFER = 0xC000_0080
_ADDRESS_MSRS = {
    0x175: "IA32_SYSENTER_ESP", 0x176: "IA32_SYSENTER_EIP", 0xC000_0082: "IA32_LSTAR", 0xC000_0083: "IA32_CSTAR",
    0xC000_0100: "IA32_FS_BASE", 0xC000_0101: "IA32_GS_BASE", 0xC000_0102: "IA32_KERNEL_GS_BASE",
}  # fmt: skip
_KNOWN_EFER = sum(Efer)
_KNOWN_CR4 = sum(Cr4)
_OPTIONAL_CR4 = (
    Cr4.UMIP | Cr4.LA57 | Cr4.VMXE | Cr4.SMXE | Cr4.FSGSBASE | Cr4.PCIDE | Cr4.OSXSAVE | Cr4.KL | Cr4.SMEP | Cr4.SMAP
    | Cr4.PKE | Cr4.CET | Cr4.PKS | Cr4.UINTR | Cr4.LAM_SUP
)  # fmt: skip
_PDPTE_RESERVED = 0xFFF0_0000_0000_01E6


def register_fault(execution: Execution) -> Candidate | None:
    """The #GP of writing a control register, an MSR, XCR0, GDTR or IDTR; uncertain where features decide."""
    decoded = execution.decoded
    if decoded is None:
        return None
    if decoded.opcode == 0x0F22:
        return _control_register(execution, decoded)
    if decoded.opcode == 0x0F30:
        return _wrmsr(execution)
    if decoded.opcode == 0x0F32:
        index = execution.regs.rcx & 0xFFFF_FFFF
        text = f"RDMSR of MSR {index:#x}, which this processor may not have"
        return Candidate.protection(Cause.MSR, text, certain=False).noting(index=index)
    if decoded.opcode == 0x0F01:
        return _group_7(execution, decoded)
    return None


def _control_register(execution: Execution, decoded: Decoded) -> Candidate | None:
    wide = execution.bits == 64
    value = execution.register(decoded.rm, 64 if wide else 32)
    number = decoded.reg
    check = {0: _cr0, 3: _cr3, 4: _cr4, 8: _cr8}.get(number)
    if check is None:
        return None if number == 2 else Candidate.undefined(Cause.UNDEFINED, f"there is no CR{number}")
    return check(execution, value)


def _refused(register: str, value: int, why: str, *, certain: bool = True) -> Candidate:
    text = f"{register} does not take {value:#x}: {why}"
    return Candidate.protection(Cause.CONTROL_REGISTER, text, certain=certain).noting(value=value)


def _cr0(execution: Execution, value: int) -> Candidate | None:
    sregs = execution.sregs
    if value >> 32:
        return _refused("CR0", value, "bits 63:32 are reserved")
    if value & Cr0.PG and not value & Cr0.PE:
        return _refused("CR0", value, "PG needs PE")
    if value & Cr0.NW and not value & Cr0.CD:
        return _refused("CR0", value, "NW needs CD")
    switched = (value ^ sregs.cr0) & Cr0.PG
    if switched and not value & Cr0.PG:
        return _refused("CR0", value, "64-bit mode cannot switch paging off") if execution.bits == 64 else None
    if not switched:
        return None
    if sregs.efer & Efer.LME:
        if not sregs.cr4 & Cr4.PAE:
            text = f"paging is switched on with EFER.LME=1, but CR4 ({sregs.cr4:#x}) has no PAE, which long mode needs"
            return Candidate.protection(Cause.PAE_OFF, text).noting(cr4=sregs.cr4)
        if sregs.cs.l:
            return _refused("CR0", value, "CS.L must be 0 when long mode is activated")
        return None
    return _paging_without_lme(execution)


def _paging_without_lme(execution: Execution) -> Candidate | None:
    """Paging of 32 bits begins, which may not be what was meant."""
    sregs = execution.sregs
    if sregs.cr4 & Cr4.PAE:
        try:
            table = execution.memory.read(sregs.cr3 & 0xFFFF_FFE0, 32)
        except GuestMemoryError:
            table = b""
        entries = [int.from_bytes(table[at : at + 8], "little") for at in range(0, len(table), 8)]
        bad = [entry for entry in entries if entry & 1 and entry & _PDPTE_RESERVED]
        if bad:
            text = (
                f"paging is switched on with CR4.PAE=1 and EFER.LME=0: CR3 is taken for a table of PAE page-directory "
                f"pointers, whose entry {bad[0]:#x} sets reserved bits ({bad[0] & _PDPTE_RESERVED:#x}), as the entries "
                "of long mode's PML4 do"
            )
            return Candidate.protection(Cause.LME_OFF, text).noting(cr3=sregs.cr3, entry=bad[0])
    kind = "PAE" if sregs.cr4 & Cr4.PAE else "32-bit"
    text = f"paging is switched on with EFER.LME=0, so {kind} paging begins; KVM refuses it on some hosts"
    return Candidate.protection(Cause.NO_32_BIT_PAGING, text, certain=False).noting(cr4=sregs.cr4)


def _cr3(execution: Execution, value: int) -> Candidate | None:
    if execution.long_mode and value >> 52 & ~(1 << 11):
        return _refused("CR3", value, "bits from 52 on are reserved", certain=not value >> 61 & 3)
    return None


def _cr4(execution: Execution, value: int) -> Candidate | None:
    sregs = execution.sregs
    if value & ~_KNOWN_CR4:
        return _refused("CR4", value, f"the bits {value & ~_KNOWN_CR4:#x} are reserved")
    if execution.long_mode and not value & Cr4.PAE:
        text = "PAE cannot be cleared in long mode"
        return Candidate.protection(Cause.PAE_OFF, text).noting(cr4=value)
    if value & Cr4.PCIDE and not sregs.cr4 & Cr4.PCIDE and (not execution.long_mode or sregs.cr3 & 0xFFF):
        return _refused("CR4", value, "PCIDE needs long mode and CR3[11:0] = 0")
    if execution.long_mode and (value ^ sregs.cr4) & Cr4.LA57:
        return _refused("CR4", value, "LA57 cannot change in long mode")
    new = value & ~sregs.cr4 & int(_OPTIONAL_CR4)
    if new:
        names = " ".join(flag.name or "" for flag in Cr4 if flag & new)
        return _refused("CR4", value, f"this processor may not have {names}", certain=False)
    return None


def _cr8(execution: Execution, value: int) -> Candidate | None:
    return _refused("CR8", value, "only bits 3:0 may be set") if value > 0xF else None


def _wrmsr(execution: Execution) -> Candidate | None:
    regs, sregs = execution.regs, execution.sregs
    index = regs.rcx & 0xFFFF_FFFF
    value = (regs.rdx & 0xFFFF_FFFF) << 32 | regs.rax & 0xFFFF_FFFF
    values = {"index": index, "value": value}
    if index == _EFER:
        if value & ~_KNOWN_EFER:
            text = f"EFER does not take {value:#x}: the bits {value & ~_KNOWN_EFER:#x} are reserved"
            return Candidate.protection(Cause.MSR, text).noting(**values)
        if (value ^ sregs.efer) & Efer.LME and sregs.cr0 & Cr0.PG:
            text = "EFER.LME cannot change while paging is on"
            return Candidate.protection(Cause.MSR, text).noting(**values)
    name = _ADDRESS_MSRS.get(index)
    if name is not None and not is_canonical(execution, value):
        text = f"{name} does not take {value:#x}, which is not canonical"
        return Candidate.protection(Cause.MSR, text).noting(**values)
    text = f"WRMSR of {value:#x} to MSR {index:#x}, which this processor may not have or not take"
    return Candidate.protection(Cause.MSR, text, certain=False).noting(**values)


def _group_7(execution: Execution, decoded: Decoded) -> Candidate | None:
    if decoded.memory is None and (decoded.group, decoded.rm & 7) == (2, 1):  # XSETBV
        regs = execution.regs
        value = (regs.rdx & 0xFFFF_FFFF) << 32 | regs.rax & 0xFFFF_FFFF
        if regs.rcx & 0xFFFF_FFFF or not value & 1 or value & 6 == 4:
            text = f"XSETBV of {value:#x} to XCR{regs.rcx & 0xFFFF_FFFF}: bit 0 must be 1, and AVX needs SSE"
            return Candidate.protection(Cause.CONTROL_REGISTER, text).noting(value=value)
        return None
    if decoded.memory is None or decoded.group not in (2, 3) or execution.bits != 64:
        return None
    segment, offset = execution.effective_address(decoded)
    data = execution.read(segment, offset + 2, 8)
    base = int.from_bytes(data or b"", "little")
    if is_canonical(execution, base):
        return None
    name = "LGDT" if decoded.group == 2 else "LIDT"
    text = f"{name}: the base {base:#x} is not canonical"
    return Candidate.protection(Cause.NOT_CANONICAL, text).noting(address=base)


def branch_fault(execution: Execution) -> Candidate | None:
    """Near JMP, CALL and RET to where no code can be. AMD goes there first: then it is the fetch that faults."""
    decoded = execution.decoded
    if decoded is None:
        return None
    target = _branch_target(execution, decoded)
    if target is None:
        return None
    if execution.bits == 64:
        if not is_canonical(execution, target):
            text = f"the target {target:#x} is not canonical"
            return Candidate.protection(Cause.TARGET_NOT_CANONICAL, text).noting(address=target)
    elif target > execution.sregs.cs.limit:
        limit = execution.sregs.cs.limit
        text = f"the target {target:#x} is beyond the limit {limit:#x} of CS"
        return Candidate.protection(Cause.TARGET_BEYOND_LIMIT, text).noting(offset=target, limit=limit)
    return None


def _branch_target(execution: Execution, decoded: Decoded) -> int | None:
    """Where a near branch goes, when it is taken for sure."""
    width = 64 if execution.bits == 64 else decoded.operand_bits
    mask = (1 << width) - 1
    if decoded.opcode in (0xC2, 0xC3):
        items = execution.stack_items(1, width // 8)
        return None if items is None else items[0]
    if decoded.opcode in (0xE8, 0xE9, 0xEB):
        return (execution.regs.rip + decoded.length + decoded.signed_immediate) & mask
    if decoded.opcode == 0xFF and decoded.group in (2, 4):
        return execution.operand(decoded, width)
    return None
