"""Entry states: the registers with which a processor starts in a mode (SDM vol. 3, chapters 9, 20; APM vol. 2, 14).

Every function returns a fresh `CpuState` that KVM_SET_SREGS accepts and that passes the VM-entry checks of VT-x and the
VMRUN checks of AMD-V. The hidden parts of the segment registers are filled in, so no descriptor table has to be in
memory before the guest loads a segment register or takes an exception. For states with their tables written into
guest memory see `kvmpy.x86.long_mode` and `kvmpy.x86.protected_mode`.

A stack that is not given grows down from the entry point, as a boot sector's does.
"""

from kvmpy.errors import RegisterValueError, UsageError
from kvmpy.x86.registers import CpuState, DescriptorTable, Segment

__all__ = [
    "CODE16_SELECTOR",
    "CODE32_SELECTOR",
    "CODE_SELECTOR",
    "DATA16_SELECTOR",
    "DATA_SELECTOR",
    "TSS_SELECTOR",
    "USER_CODE32_SELECTOR",
    "USER_CODE64_SELECTOR",
    "USER_DATA_SELECTOR",
    "long_mode",
    "pae",
    "paging32",
    "protected_mode",
    "real_mode",
    "reset_vector",
    "task_register",
]

# The selectors that all states use. The order suits SYSCALL and SYSRET (SDM vol. 3, 5.8.8): STAR[47:32] = 0x08 gives
# CS 0x08 and SS 0x10; STAR[63:48] = 0x1B gives SS 0x23 and CS 0x1B (32 bits) or 0x2B (64 bits).
CODE_SELECTOR = 0x08
"""Ring 0 code of the mode itself: 32 bits wide in protected mode, 64 in long mode."""
DATA_SELECTOR = 0x10
USER_CODE32_SELECTOR = 0x1B
USER_DATA_SELECTOR = 0x23
USER_CODE64_SELECTOR = 0x2B
TSS_SELECTOR = 0x30
"""The TSS; in long mode its descriptor is 16 bytes and takes 0x38 too."""
CODE32_SELECTOR = 0x40
CODE16_SELECTOR = 0x48
DATA16_SELECTOR = 0x50

# Literal bits instead of kvmpy.x86.flags: enum is too dear on the path of `import kvmpy`.
_CR0_PE, _CR0_MP, _CR0_ET, _CR0_NE, _CR0_WP, _CR0_PG = 0x1, 0x2, 0x10, 0x20, 0x1_0000, 0x8000_0000
_CR4_PSE, _CR4_PAE, _CR4_PGE, _CR4_OSFXSR, _CR4_OSXMMEXCPT, _CR4_LA57 = 0x10, 0x20, 0x80, 0x200, 0x400, 0x1000
_EFER_LME, _EFER_LMA, _EFER_NXE = 0x100, 0x400, 0x800

_REAL_MODE_TOP = 0x10_FFEF  # FFFF:FFFF, the last byte that real mode can address
_NO_TABLE = DescriptorTable(0, 0)
_REAL_MODE_VECTORS = DescriptorTable(0, 0x3FF)
_LDT_UNUSABLE = Segment(0, 0, 0, type=2, s=0, present=0, unusable=1)


def real_mode(
    entry: int = 0,
    *,
    segment: int | None = None,
    offset: int = 0,
    data_segment: int | None = None,
    stack: int | None = None,
) -> CpuState:
    """Real mode at a linear address, or at `segment:offset`.

    `entry` below 0x10000 gives CS = 0 and IP = entry; above, CS = entry >> 4 and IP = the last hex digit; the highest
    is 0x10FFEF (FFFF:FFFF). With `segment`, `entry` must be left out. `data_segment` is loaded into DS, ES, FS and GS
    and is that of CS by default. `stack` is the linear address just above the first byte pushed; the default
    grows down from the entry. Stack address 0 means SS:SP = 0:0, whose first push goes to 0xFFFE.

    Raises UsageError for an entry or stack out of reach, RegisterValueError for a segment or offset over 16 bits.
    """
    if segment is None:
        if offset:
            raise UsageError("real_mode: an offset needs a segment; a linear address alone goes into entry")
        if not 0 <= entry <= _REAL_MODE_TOP:
            raise UsageError(
                f"real mode reaches linear addresses 0 to {_REAL_MODE_TOP:#x}; the entry {entry:#x} is outside"
            )
        if entry < 0x1_0000:
            segment, offset = 0, entry
        else:
            segment = min(entry >> 4, 0xFFFF)
            offset = entry - (segment << 4)
    elif entry:
        raise UsageError("real_mode: give either a linear entry or segment and offset, not both")
    _check("cs", segment, 16)
    _check("ip", offset, 16)
    if data_segment is None:
        data_segment = segment
    _check("ds", data_segment, 16)
    top = (segment << 4) + offset & ~0xF if stack is None else stack
    if not 0 <= top <= _REAL_MODE_TOP + 1:
        raise UsageError(f"real mode reaches linear addresses 0 to {_REAL_MODE_TOP:#x}; the stack {top:#x} is outside")
    # The lowest stack segment whose 64 KiB end at or above `top`, so that SP has the most room below it.
    stack_segment = min(max(top - 0x1_0000 + 0xF, 0) >> 4, 0xFFFF)

    state = CpuState()
    regs, sregs = state.regs, state.sregs
    regs.rip = offset
    regs.rsp = top - (stack_segment << 4) & 0xFFFF
    sregs.cr0 = _CR0_ET  # caches on, as firmware leaves them
    sregs.cs = Segment(segment, segment << 4, type=11)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = Segment(data_segment, data_segment << 4, type=3)
    sregs.ss = sregs.ds if stack_segment == data_segment else Segment(stack_segment, stack_segment << 4, type=3)
    # The table real mode uses is the interrupt vector table at 0; a GDT is the guest's to load.
    sregs.idt = _REAL_MODE_VECTORS
    return state


def reset_vector(signature: int = 0x600) -> CpuState:
    """The state after power-up or RESET (SDM vol. 3, table 9-1): the first instruction is fetched from 0xFFFFFFF0.

    `signature` is what RDX holds, the processor's family, model and stepping (CPUID leaf 1, EAX).
    """
    _check("edx", signature, 32)
    state = CpuState()
    state.regs.rip = 0xFFF0
    state.regs.rdx = signature
    state.sregs.cs = Segment(0xF000, 0xFFFF_0000, type=11)
    return state


def protected_mode(
    entry: int,
    *,
    bits: int = 32,
    stack: int | None = None,
    ring: int = 0,
    gdt: DescriptorTable | None = None,
    idt: DescriptorTable | None = None,
    tss: Segment | None = None,
) -> CpuState:
    """Protected mode without paging, with flat 4 GiB segments.

    `bits` is the width of the code segment: 32, or 16, which starts CS at `entry` rounded down to 16 bytes (at 0 for
    an entry below 0x10000) with a limit of 64 KiB; the data segments are flat in both. `ring` is 0 or 3. `gdt` and
    `idt` are what GDTR and IDTR hold; empty by default, so loading a segment register or any exception then ends in a
    triple fault. The selectors are this module's constants. `tss` is the task register, see `task_register`; by
    default one without an I/O bitmap, which forbids all ports to ring 3.

    Raises UsageError for another width or ring, RegisterValueError for an address over 32 bits.
    """
    _check("eip", entry, 32)
    _check("esp", stack or 0, 32)
    _check_ring(ring)
    selector = USER_CODE32_SELECTOR if ring else CODE_SELECTOR
    ip = entry
    if bits == 32:
        code = Segment(selector, 0, 0xFFFF_FFFF, type=11, dpl=ring, db=1, g=1)
    elif bits == 16:
        base = 0 if entry < 0x1_0000 else entry & ~0xF
        ip = entry - base
        code = Segment(selector if ring else CODE16_SELECTOR, base, 0xFFFF, type=11, dpl=ring)
    else:
        raise UsageError(f"a protected-mode code segment is 16 or 32 bits wide, not {bits}")
    state = _flat(entry, code, stack=stack, ring=ring, gdt=gdt, idt=idt, tss=tss)
    state.regs.rip = ip
    state.sregs.cr0 = _CR0_PE | _CR0_ET | _CR0_NE
    return state


def paging32(
    entry: int,
    cr3: int,
    *,
    stack: int | None = None,
    ring: int = 0,
    gdt: DescriptorTable | None = None,
    idt: DescriptorTable | None = None,
    tss: Segment | None = None,
) -> CpuState:
    """Protected mode with 32-bit paging, 4 MiB pages allowed (CR4.PSE) and CR0.WP set (SDM vol. 3, 4.3).

    `cr3` is the physical address of the page directory, 4 KiB aligned and below 4 GiB. The other parameters are those
    of `protected_mode`; `entry` and `stack` are virtual addresses. Raises UsageError and RegisterValueError alike.
    """
    _check_cr3(cr3, 32, 0x1000)
    state = protected_mode(entry, stack=stack, ring=ring, gdt=gdt, idt=idt, tss=tss)
    sregs = state.sregs
    sregs.cr0 |= _CR0_PG | _CR0_WP
    sregs.cr3 = cr3
    sregs.cr4 = _CR4_PSE
    return state


def pae(
    entry: int,
    cr3: int,
    *,
    stack: int | None = None,
    ring: int = 0,
    gdt: DescriptorTable | None = None,
    idt: DescriptorTable | None = None,
    tss: Segment | None = None,
) -> CpuState:
    """Protected mode with PAE paging, EFER.NXE and CR0.WP set (SDM vol. 3, 4.4).

    `cr3` is the physical address of the four page-directory pointers, 32-byte aligned and below 4 GiB. They must be in
    memory before KVM_SET_SREGS, which loads them. The other parameters are those of `protected_mode`.
    """
    _check_cr3(cr3, 32, 0x20)
    state = protected_mode(entry, stack=stack, ring=ring, gdt=gdt, idt=idt, tss=tss)
    sregs = state.sregs
    sregs.cr0 |= _CR0_PG | _CR0_WP
    sregs.cr3 = cr3
    sregs.cr4 = _CR4_PAE
    sregs.efer = _EFER_NXE
    return state


def long_mode(
    entry: int,
    cr3: int,
    *,
    stack: int | None = None,
    ring: int = 0,
    bits: int = 64,
    levels: int = 4,
    gdt: DescriptorTable | None = None,
    idt: DescriptorTable | None = None,
    tss: Segment | None = None,
) -> CpuState:
    """Long mode: 64-bit code, or with `bits=32` compatibility mode (SDM vol. 3, 4.5 and 9.8.5; APM vol. 2, 14.6).

    `cr3` is the physical address of the top page table, 4 KiB aligned, of 4 or 5 `levels`. `entry` and `stack` are
    virtual. SSE is switched on (CR4.OSFXSR and OSXMMEXCPT), EFER.NXE, CR4.PGE and CR0.WP are set, EFER.SCE is not. The
    other parameters are those of `protected_mode`. Ring 3 ignores IOPL on some hosts, so ports need a `tss` with an
    I/O bitmap (`kvmpy.x86.long_mode.prepare` writes one).

    Raises UsageError for an entry that is not canonical, for other widths, levels and rings, RegisterValueError for
    addresses that do not fit.
    """
    if levels not in (4, 5):
        raise UsageError(f"long-mode paging has 4 or 5 levels, not {levels}")
    _check_ring(ring)
    _check_cr3(cr3, 52, 0x1000)
    if bits == 64:
        _check_canonical("rip", entry, levels)
        _check_canonical("rsp", stack or 0, levels)
        selector = USER_CODE64_SELECTOR if ring else CODE_SELECTOR
        code = Segment(selector, 0, 0xFFFF_FFFF, type=11, dpl=ring, l=1, g=1)
    elif bits == 32:
        _check("eip", entry, 32)
        _check("esp", stack or 0, 32)
        selector = USER_CODE32_SELECTOR if ring else CODE32_SELECTOR
        code = Segment(selector, 0, 0xFFFF_FFFF, type=11, dpl=ring, db=1, g=1)
    else:
        raise UsageError(f"a long-mode code segment is 64 or 32 bits wide, not {bits}")
    state = _flat(entry, code, stack=stack, ring=ring, gdt=gdt, idt=idt, tss=tss)
    sregs = state.sregs
    sregs.cr0 = _CR0_PE | _CR0_MP | _CR0_ET | _CR0_NE | _CR0_WP | _CR0_PG
    sregs.cr3 = cr3
    sregs.cr4 = _CR4_PAE | _CR4_PGE | _CR4_OSFXSR | _CR4_OSXMMEXCPT | (_CR4_LA57 if levels == 5 else 0)
    sregs.efer = _EFER_LME | _EFER_LMA | _EFER_NXE
    return state


def task_register(base: int = 0, limit: int = 0x67, selector: int = TSS_SELECTOR) -> Segment:
    """A task register over a 32- or 64-bit TSS at `base` whose last byte is at `limit` (0x67: no I/O bitmap).

    The type is a busy TSS, as LTR leaves it and VM entry demands (SDM vol. 3, 26.3.1.2).
    """
    _check("tr.base", base, 64)
    _check("tr.limit", limit, 32)
    # VM entry: with any of limit bits 31:20 set G must be 1, with any of bits 11:0 clear it must be 0.
    return Segment(selector, base, limit, type=11, s=0, g=1 if limit >> 20 else 0)


def _flat(
    entry: int,
    code: Segment,
    *,
    stack: int | None,
    ring: int,
    gdt: DescriptorTable | None,
    idt: DescriptorTable | None,
    tss: Segment | None,
) -> CpuState:
    """What all protected modes share: flat data segments, tables, no LDT."""
    state = CpuState()
    sregs = state.sregs
    state.regs.rip = entry
    state.regs.rsp = entry & ~0xF if stack is None else stack
    selector = USER_DATA_SELECTOR if ring else DATA_SELECTOR
    data = Segment(selector, 0, 0xFFFF_FFFF, type=3, dpl=ring, db=1, g=1)
    sregs.cs = code
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.tr = tss if tss is not None else task_register()
    sregs.ldt = _LDT_UNUSABLE
    sregs.gdt = gdt if gdt is not None else _NO_TABLE
    sregs.idt = idt if idt is not None else _NO_TABLE
    return state


def _check(register: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise RegisterValueError(register, value, bits)


def _check_ring(ring: int) -> None:
    if ring not in (0, 3):
        raise UsageError(f"an entry state is for ring 0 or 3, not {ring}")


def _check_cr3(cr3: int, bits: int, alignment: int) -> None:
    _check("cr3", cr3, bits)
    if cr3 % alignment:
        raise UsageError(f"cr3 {cr3:#x} is not aligned to {alignment:#x} bytes")


def _check_canonical(register: str, address: int, levels: int) -> None:
    _check(register, address, 64)
    width = 57 if levels == 5 else 48
    if address >> (width - 1) not in (0, (1 << (65 - width)) - 1):
        raise UsageError(f"{register} {address:#x} is not a canonical {width}-bit address")
