"""Guests in ring 0 that use vector registers, x87, the XSAVE family and system instructions, through `Machine`.

With VT-x or AMD-V the processor runs all of it; elsewhere KVM gives up on most of these, and the machine does them.
Either way the guest must not notice.
"""

from __future__ import annotations

import random
import struct

import pytest

from gnu_toolchain import assemble, assemble_with_symbols
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.machine.xsave_layout import xsave_layout
from kvmpy.x86 import long_mode
from kvmpy.x86.gates import Gate, Idt

pytestmark = pytest.mark.kvm

MIB = 1 << 20
CODE, STACK, DATA, OUT, TABLES, HANDLER = 0x1000, 0x1_8000, 0x2_0000, 0x3_0000, 0x4_0000, 0x8000
ENABLE = """
    mov rax, cr4; or eax, 0x40600; mov cr4, rax  # OSFXSR, OSXMMEXCPT, OSXSAVE
    mov rax, cr0; and eax, ~0xc; or eax, 0x22; mov cr0, rax  # neither EM nor TS; MP, NE
    xor ecx, ecx; xor edx, edx; mov eax, 7; xsetbv
    mov esi, 0x20000; mov edi, 0x30000
"""


def run(
    source: str, data: bytes = b"", *, idt: Idt | None = None, handler: str = "hlt", pages: bool = False
) -> tuple[Machine, bytes]:
    """Run a guest to HLT; `data` is at RSI, what it leaves at RDI (a page) comes back."""
    with Machine(memory=2 * MIB, irqchip=False) as machine:
        machine.memory.write(CODE, assemble(f"{ENABLE}\n{source}\nhlt", address=CODE, bits=64))
        machine.memory.write(HANDLER, assemble(handler, address=HANDLER, bits=64))
        machine.memory.write(DATA, data)
        machine.vcpus[0].set_cpu_state(
            long_mode.prepare(machine.memory, entry=CODE, tables=TABLES, stack=STACK, identity_map=2 * MIB, idt=idt)
        )
        outcome = machine.run(timeout=20)
        assert outcome.end is End.HALTED, outcome
        return machine, machine.memory.read(OUT, 0x1000)


def words(out: bytes, count: int) -> list[int]:
    return list(struct.unpack_from(f"<{count}Q", out))


def test_vector_instructions_in_a_row_with_others_between_them() -> None:
    chance = random.Random(0)
    data = chance.randbytes(64)
    _, out = run(
        """
        mov ecx, 3
        again:
        movdqu xmm1, [rsi]; movdqu xmm2, [rsi + 16]; pxor xmm1, xmm2; movdqa xmm3, xmm1; paddb xmm3, xmm1
        movdqu [rdi], xmm1; movdqu [rdi + 16], xmm3
        vmovdqu ymm4, [rsi + 32]; vpxor ymm5, ymm4, [rsi]; vmovdqu [rdi + 32], ymm5
        add rsi, 1; add rdi, 64
        dec ecx; jnz again
        vzeroupper
        movd eax, xmm1; popcnt rax, rax; mov [rdi], rax
        """,
        data + bytes(16),
    )
    data += bytes(16)
    for turn in range(3):
        part, found = data[turn : turn + 64], out[64 * turn : 64 * turn + 64]
        xored = bytes(a ^ b for a, b in zip(part[:16], part[16:32], strict=True))
        assert found[:16] == xored
        assert found[16:32] == bytes(2 * byte & 0xFF for byte in xored)
        assert found[32:] == bytes(a ^ b for a, b in zip(part[32:64], part[:32], strict=True))
    assert words(out[192:], 1)[0] == int.from_bytes(xored[:4], "little").bit_count()


@pytest.mark.parametrize("everything", [False, True], ids=["up to AVX", "everything"])
@pytest.mark.parametrize(("save", "restore"), [("xsaves", "xrstors"), ("xsavec", "xrstor"), ("xsave", "xrstor")])
def test_registers_survive_saving_and_restoring(save: str, restore: str, everything: bool) -> None:
    """What a kernel does at a context switch: x87, MXCSR, XMM and YMM registers are saved, lost, and restored."""
    asked = 3 | sum(1 << component for component in xsave_layout()) if everything else 7
    data = random.Random(save).randbytes(64) + struct.pack("<I", 0x3F80)
    _, out = run(
        f"""
        mov eax, {asked}; xor edx, edx; xor ecx, ecx; xsetbv
        movups xmm0, [rsi]; vmovups ymm15, [rsi + 32]; ldmxcsr [rsi + 64]
        fninit; fld qword ptr [rsi]; fild dword ptr [rsi]
        mov ebx, 0x28000; mov eax, {asked}; xor edx, edx
        {save}64 [rbx]
        vzeroall; fninit; mov dword ptr [rdi], 0x1f80; ldmxcsr [rdi]
        vmovups [rdi + 128], ymm15; stmxcsr [rdi + 160]; fnstsw [rdi + 164]
        mov eax, {asked}; xor edx, edx
        {restore}64 [rbx]
        movups [rdi], xmm0; vmovups [rdi + 32], ymm15; stmxcsr [rdi + 64]
        fnstsw ax; mov [rdi + 68], ax
        fistp qword ptr [rdi + 72]; fstp tbyte ptr [rdi + 80]
        mov rax, [rbx + 512]; mov [rdi + 168], rax; mov rax, [rbx + 520]; mov [rdi + 176], rax
        """,
        data,
    )
    assert (out[:16], out[32:64]) == (data[:16], data[32:64])
    mxcsr, status, integer = struct.unpack_from("<IH2xq", out, 64)
    assert (mxcsr, status >> 11 & 7, integer) == (0x3F80, 6, struct.unpack_from("<i", data)[0])
    assert out[128:168] == bytes(32) + struct.pack("<II", 0x1F80, 0)
    present, layout = words(out[168:], 2)
    assert present & 7 == 7
    assert layout == (0 if save == "xsave" else 1 << 63 | asked)


def test_control_of_x87_as_kernels_use_it() -> None:
    """FNCLEX, EMMS, FWAIT, FLDCW, FNSTSW: a pending exception is raised by FWAIT, and cleared by FNCLEX."""
    idt = Idt()
    idt[16] = Gate("interrupt", HANDLER)
    _, out = run(
        """
        fninit
        mov word ptr [rsi], 0x37e; fldcw [rsi]     # invalid operations are not masked
        fstp st(0)                                 # an empty register: pending now
        fnstsw ax; mov [rdi], ax
        fwait                                      # the handler clears it and comes back
        fnstsw ax; mov [rdi + 2], ax
        mov word ptr [rsi], 0x37f; fldcw [rsi]; fld1; fnstsw ax; mov [rdi + 4], ax
        emms; fnstsw ax; mov [rdi + 6], ax
        fnstenv [rdi + 8]
        """,
        handler="fnclex; inc dword ptr [0x30100]; iretq",
        idt=idt,
    )
    pending, cleared, loaded, empty = struct.unpack_from("<4H", out)
    assert pending & 0x80C1 == 0x80C1
    assert cleared & 0x80FF == 0
    assert (loaded >> 11 & 7, empty >> 11 & 7) == (7, 0)
    assert struct.unpack_from("<H2xH2xH", out, 8)[2] == 0xFFFF  # all registers empty
    assert struct.unpack_from("<I", out, 0x100)[0] == 1


def test_stac_clac_and_the_processor_number() -> None:
    """A KVM that knows no TSC_AUX refuses WRMSR: the number is 0 then."""
    idt = Idt()
    idt[13] = Gate("interrupt", HANDLER)
    _, out = run(
        """
        stac; pushfq; pop qword ptr [rdi]
        clac; pushfq; pop qword ptr [rdi + 8]
        mov ecx, 0xc0000103; mov eax, 0x1234; xor edx, edx; wrmsr
        rdtscp; mov [rdi + 16], rcx; mov [rdi + 24], eax; mov [rdi + 28], edx
        rdtscp; mov [rdi + 32], rcx
        rdtscp; mov [rdi + 40], eax; mov [rdi + 44], edx
        xor ecx, ecx; xgetbv; mov [rdi + 48], eax; mov [rdi + 52], edx
        """,
        handler="add rsp, 8; add qword ptr [rsp], 2; inc dword ptr [0x30100]; iretq",
        idt=idt,
    )
    with_ac, without, aux, first, number, second, enabled = words(out, 7)
    assert (with_ac >> 18 & 1, without >> 18 & 1) == (1, 0)
    assert aux == number == (0 if out[0x100] else 0x1234)
    assert first < second < first + 10**12
    assert enabled == 7


def test_selectors_of_the_guests_own_table() -> None:
    """`long_mode.prepare` has code at 0x08, data at 0x10, user code at 0x28, a TSS at 0x30."""
    _, out = run("""
        mov ax, 0x08; lar ebx, eax; setz [rdi]; mov [rdi + 4], ebx
        mov ax, 0x10; verw ax; setz [rdi + 8]; verr ax; setz [rdi + 9]
        mov ax, 0x08; verw ax; setz [rdi + 10]
        mov word ptr [rsi], 0x10; verw [rsi]; setz [rdi + 11]
        mov ax, 0x30; lsl ebx, eax; setz [rdi + 12]; mov [rdi + 16], ebx
        mov ax, 0x100; lar ebx, eax; setz [rdi + 13]
    """)
    code, access = struct.unpack_from("<I4xI", out)[0] & 0xFF, struct.unpack_from("<I", out, 4)[0]
    assert (code, access & 0xF0FF00) == (1, 0xA09B00)
    assert list(out[8:14]) == [1, 1, 0, 1, 1, 0]
    assert struct.unpack_from("<I", out, 16)[0] > 0x67


def test_a_page_that_moved_is_seen_after_invpcid() -> None:
    """A page table of the guest's own maps one page; its entry changes; INVPCID of all contexts makes that count."""
    present = 3  # P, R/W
    _, out = run(
        f"""
        mov rax, cr3; mov rbx, rax
        mov qword ptr [rbx + 8], 0x50000 + {present}       # linear 512 GiB on: PDPT, PD, PT
        mov qword ptr [0x50000], 0x51000 + {present}
        mov qword ptr [0x51000], 0x52000 + {present}
        mov qword ptr [0x52000], 0x60000 + {present}
        mov qword ptr [0x60000], 0x1111; mov qword ptr [0x61000], 0x2222
        mov rbx, 0x8000000000
        mov rax, [rbx]; mov [rdi], rax
        mov qword ptr [0x52000], 0x61000 + {present}
        mov qword ptr [rsi], 0; mov qword ptr [rsi + 8], 0; mov eax, 2
        invpcid rax, [rsi]
        mov rax, [rbx]; mov [rdi + 8], rax
        """
    )
    assert words(out, 2) == [0x1111, 0x2222]


@pytest.mark.parametrize(
    ("instruction", "vector"),
    [("movaps xmm0, [rsi + 1]", 13), ("pxor xmm0, [rsi + 8]", 13), ("xsave [rsi + 8]", 13), ("ldmxcsr [rdi]", 13)],
)
def test_what_they_raise_comes_through_the_guests_own_gates(instruction: str, vector: int) -> None:
    """The instruction before it is done, the one behind it is not; the saved RIP is the instruction's."""
    idt = Idt()
    idt[vector] = Gate("interrupt", HANDLER)
    _, out = run(
        f"""
        mov dword ptr [rdi], 0xffffffff; mov eax, 7; xor edx, edx
        lea rbx, [rip + here]; movups xmm1, [rsi]; movups [rdi + 64], xmm1
        here: {instruction}
        movups [rdi + 80], xmm1
        """,
        b"0123456789abcdef",
        idt=idt,
        handler="mov rax, [rsp]; mov [rdi + 8], rax; mov rax, [rsp + 8]; sub rax, rbx; mov [rdi + 16], rax; hlt",
    )
    assert words(out[8:], 2) == [0, 0]  # error code; RIP is that of `here`
    assert out[64:96] == b"0123456789abcdef" + bytes(16)


def test_task_switched_makes_them_raise_device_not_available() -> None:
    """The way of kernels that restore vector registers lazily."""
    idt = Idt()
    idt[7] = Gate("interrupt", HANDLER)
    _, out = run(
        """
        mov rax, cr0; or eax, 8; mov cr0, rax
        pxor xmm0, xmm0
        fnclex
        vpxor ymm1, ymm1, ymm1
        """,
        idt=idt,
        handler="clts; inc dword ptr [0x30000]; iretq",
    )
    assert struct.unpack_from("<I", out)[0] == 1


def test_the_host_has_avx() -> None:
    """What the guests here use; a host without it cannot run them."""
    assert 2 in xsave_layout()


IN_A_ROW = """
    mov rax, cr4; or eax, 0x600; mov cr4, rax
    mov rax, cr0; and eax, ~0xc; mov cr0, rax
    first: pxor xmm0, xmm0
    second: pcmpeqd xmm1, xmm1
    third: movdqu [0x20000], xmm1
    fourth: pslld xmm1, 4
    fifth: movd eax, xmm1
    hlt
"""


@pytest.mark.parametrize("hardware", [True, False], ids=["register", "memory"])
def test_a_breakpoint_among_them_stops_the_machine(hardware: bool) -> None:
    code, symbols = assemble_with_symbols(IN_A_ROW, address=CODE, bits=64)
    with Machine(memory=2 * MIB, irqchip=False) as machine:
        machine.load(FlatImage(code, CODE, "long", stack=STACK))
        point = machine.breakpoint(symbols["fourth"], hardware=hardware)
        assert machine.run(timeout=20).end is End.BREAKPOINT
        assert machine.vcpus[0].regs.rip == symbols["fourth"]
        assert machine.memory.read(DATA, 16) == b"\xff" * 16
        point.remove()
        assert machine.run(timeout=20).end is End.HALTED
        assert machine.vcpus[0].regs.rax == 0xFFFF_FFF0


def test_steps_stop_at_each_of_them() -> None:
    code, symbols = assemble_with_symbols(IN_A_ROW, address=CODE, bits=64)
    with Machine(memory=2 * MIB, irqchip=False) as machine:
        machine.load(FlatImage(code, CODE, "long", stack=STACK))
        machine.breakpoint(symbols["first"])
        assert machine.run(timeout=20).end is End.BREAKPOINT
        for name in ("second", "third", "fourth", "fifth"):
            machine.step()
            assert machine.vcpus[0].regs.rip == symbols[name]


def test_an_exception_of_sse_arithmetic_reaches_the_guests_handler() -> None:
    """Division by zero, not masked: #XM, with ZE in MXCSR; the handler masks it and comes back, and then it is done."""
    idt = Idt()
    idt[19] = Gate("interrupt", HANDLER)
    _, out = run(
        """
        mov dword ptr [rsi], 0x1d80; ldmxcsr [rsi]
        mov eax, 3; cvtsi2sd xmm1, eax; pxor xmm2, xmm2
        divsd xmm1, xmm2
        movsd [rdi + 8], xmm1; stmxcsr [rdi + 16]
        """,
        idt=idt,
        handler="stmxcsr [rdi]; mov dword ptr [rsi], 0x1f80; ldmxcsr [rsi]; inc dword ptr [rdi + 4]; iretq",
    )
    flags, times, result, after = struct.unpack_from("<IIdI", out)
    assert (flags, times, result, after) == (0x1D84, 1, float("inf"), 0x1F84)


def test_x87_computes_in_32_bit_protected_mode() -> None:
    source = """
        mov eax, cr0; and eax, ~0xc; or eax, 0x22; mov cr0, eax
        fninit
        fild dword ptr [two]; fsqrt; fst qword ptr [0x3000]
        fild dword ptr [three]; fdivp; fstp tbyte ptr [0x3010]
        fld1; fcomp qword ptr [0x3000]; fnstsw ax; mov [0x3020], ax
        fldpi; fimul dword ptr [three]; fistp dword ptr [0x3028]
        hlt
    two: .long 2
    three: .long 3
    """
    with Machine(memory=MIB, irqchip=False) as machine:
        machine.load(FlatImage(assemble(source, address=CODE, bits=32), CODE, "protected", stack=STACK))
        assert machine.run(timeout=20).end is End.HALTED
        out = machine.memory.read(0x3000, 0x30)
    assert struct.unpack_from("<d", out)[0] == 2**0.5
    # The root of 2 with 64 bits of significand, divided by 3, rounded to 64 bits again; 1 is less than the root: C0.
    assert out[0x10:0x1A].hex(" ") == "b0 30 d3 f7 ef ee 5b f1 fd 3f"
    assert struct.unpack_from("<H", out, 0x20)[0] & 0x4500 == 0x100
    assert struct.unpack_from("<i", out, 0x28)[0] == 9


def test_the_outcome_says_what_was_done_in_software() -> None:
    with Machine(memory=2 * MIB, irqchip=False) as machine:
        machine.load(FlatImage(assemble("popcnt eax, ecx; popcnt ecx, eax; hlt", bits=64), address=0x1000, mode="long"))
        outcome = machine.run(timeout=20)
        assert outcome.ok
        # Nothing where the processor runs ring 0 itself.
        assert outcome.completed in ({}, {"popcnt": 2})
        assert outcome.completed == machine.statistics().completed


def test_rom_stays_as_it_is() -> None:
    # Such a write is an exit like those to addresses where nothing is (KVM API, section 4.35, KVM_MEM_READONLY).
    rom = bytes(range(256)) * 16
    source = """
        mov ebx, 0x200000
        movdqu xmm1, [rsi]; movdqu [rbx + 0x10], xmm1; movss [rbx + 0x20], xmm1
        movdqu xmm2, [rbx + 0x10]; movdqu [rdi], xmm2
        mov qword ptr [rbx + 0x28], 1
    """
    with Machine(memory=2 * MIB, irqchip=False) as machine:
        machine.vm.add_rom(0x20_0000, rom)
        machine.memory.write(CODE, assemble(f"{ENABLE}\n{source}\nhlt", address=CODE, bits=64))
        machine.memory.write(DATA, b"\xee" * 16)
        machine.vcpus[0].set_cpu_state(
            long_mode.prepare(machine.memory, entry=CODE, tables=TABLES, stack=STACK, identity_map=4 * MIB)
        )
        outcome = machine.run(timeout=20)
        assert outcome.end is End.HALTED, outcome
        assert machine.memory.read(OUT, 16) == rom[0x10:0x20]
        assert machine.memory.read(0x20_0000, len(rom)) == rom
