"""The guests that `kvmpy doctor` runs: machine code beside the assembly it comes from.

A user needs no assembler; a test assembles every source with GNU as (Intel syntax) and compares. All are linked for
`ADDRESS`. They report by port: `DONE` says that the end was reached, `EXCEPTION` has the vector in AL.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ADDRESS", "COUNT", "CPUID", "DONE", "EXCEPTION", "EXIT", "HYPERCALLS", "INSTRUCTIONS", "INTERRUPT", "STUBS",
    "STUB_SIZE", "SYSCALL", "SYSCALL_TARGET", "VECTOR", "Instruction", "Program",
]  # fmt: skip

ADDRESS = 0x1000
DONE = 0xE0
EXCEPTION = 0xE1

VECTOR = 0x40
"""An interrupt that no hardware uses, for INT n."""


@dataclass(frozen=True, slots=True)
class Program:
    """`code` is `source`, assembled for `bits`."""

    source: str
    bits: int
    code: bytes


@dataclass(frozen=True, slots=True)
class Instruction(Program):
    """One instruction to try in ring 0 of long mode.

    It starts with RCX = 0xff, RAX = RDX = 0 and RDI at 4 KiB of zeros. `feature` is the CPUID bit that announces it.
    `ends_in` is "done", or the exception or interrupt that it must cause; EAX is then `result`, or anything when that
    is None.
    """

    name: str
    feature: str | None = None
    result: int | None = None
    ends_in: str = "done"


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text)


EXIT = Program("1: out 0xe0, al; jmp 1b", 64, _bytes("e6e0 ebfc"))
"""An exit for every two instructions; the same bytes in every mode."""

_COUNT = "1: out 0xe0, al; 2: .rept 8; add eax, 1; .endr; dec ecx; jnz 2b; jmp 1b"
COUNT = {
    16: Program(_COUNT, 16, _bytes("e6e0" + "6683c001" * 8 + "6649 75dc ebd8")),
    32: Program(_COUNT, 32, _bytes("e6e0" + "83c001" * 8 + "49 75e5 ebe1")),
    64: Program(_COUNT, 64, _bytes("e6e0" + "83c001" * 8 + "ffc9 75e4 ebe0")),
}
"""Ten instructions for each count in ECX between two exits, by the width of the code."""

CPUID = Program("1: cpuid; out 0xe0, al; jmp 1b", 64, _bytes("0fa2 e6e0 ebfa"))
"""CPUID with the registers it finds, then an exit."""

SYSCALL = Program(
    "syscall; hlt; .skip 13, 0x90; mov al, 0x55; out 0xe0, al; hlt", 64,
    _bytes("0f05 f4" + "90" * 13 + "b055 e6e0 f4"),
)  # fmt: skip
SYSCALL_TARGET = ADDRESS + 16
"""Where LSTAR points in `SYSCALL`."""

INTERRUPT = Program("int 0x40; out 0xe0, al; hlt", 64, _bytes("cd40 e6e0 f4"))

HYPERCALLS = {
    "vmcall": Program("vmcall; out 0xe0, al; hlt", 64, _bytes("0f01c1 e6e0 f4")),
    "vmmcall": Program("vmmcall; out 0xe0, al; hlt", 64, _bytes("0f01d9 e6e0 f4")),
}

STUB_SIZE = 8
STUBS = Program(
    f".set n, 0; .rept {VECTOR + 1}; mov al, n; out 0xe1, al; hlt; nop; nop; nop; .set n, n + 1; .endr", 64,
    b"".join(bytes((0xB0, n, 0xE6, EXCEPTION, 0xF4, 0x90, 0x90, 0x90)) for n in range(VECTOR + 1)),
)  # fmt: skip
"""A handler for every vector up to `VECTOR`, `STUB_SIZE` bytes each."""


def _try(
    name: str, source: str, code: str, feature: str | None = None, *, result: int | None = None,
    ends_in: str = "done",
) -> Instruction:  # fmt: skip
    return Instruction(f"{source}; out 0xe0, al; hlt", 64, _bytes(code + "e6e0f4"), name, feature, result, ends_in)


INSTRUCTIONS = (
    _try("int3", "int3", "cc", ends_in="#BP"),
    _try("int n", "int 0x40", "cd40", ends_in=f"interrupt {VECTOR:#x}"),
    _try("lar", "mov ecx, 0x08; lar eax, ecx", "b908000000 0f02c1"),
    _try("fwait", "fwait", "9b", "fpu"),
    _try("fld1", "fninit; fld1", "dbe3 d9e8", "fpu"),
    _try("emms", "emms", "0f77", "mmx"),
    _try("fxsave", "fxsave [rdi]", "0fae07", "fxsr"),
    _try("ldmxcsr", "mov dword ptr [rdi], 0x1f80; ldmxcsr [rdi]", "c707801f0000 0fae17", "sse"),
    _try("movd", "movd xmm0, ecx; movd eax, xmm0", "660f6ec1 660f7ec0", "sse2", result=0xFF),
    _try("pxor", "pxor xmm0, xmm0", "660fefc0", "sse2"),
    _try("crc32", "crc32 eax, cl", "f20f38f0c1", "sse4_2"),
    _try("popcnt", "popcnt eax, ecx", "f30fb8c1", "popcnt", result=8),
    _try("lzcnt", "lzcnt eax, ecx", "f30fbdc1", "abm", result=24),
    _try("tzcnt", "tzcnt eax, edx", "f30fbcc2", "bmi1", result=32),
    _try("andn", "andn eax, edx, ecx", "c4e268f2c1", "bmi1", result=0xFF),
    _try("movbe", "movbe eax, [rdi]", "0f38f007", "movbe", result=0),
    _try("cmpxchg16b", "cmpxchg16b [rdi]", "480fc70f", "cx16"),
    _try("rdtscp", "rdtscp", "0f01f9", "rdtscp"),
    _try("rdrand", "rdrand eax", "0fc7f0", "rdrand"),
    _try("aesenc", "aesenc xmm0, xmm1", "660f38dcc1", "aes"),
    _try("vzeroupper", "vzeroupper", "c5f877", "avx"),
    _try("xgetbv", "xor ecx, ecx; xgetbv", "31c9 0f01d0", "xsave"),
    _try("xsave", "mov eax, 3; xsave [rdi]", "b803000000 0fae27", "xsave"),
    _try("stac", "stac", "0f01cb", "smap"),
    _try("invpcid", "mov ecx, 2; invpcid rcx, [rdi]", "b902000000 660f38820f", "invpcid"),
    _try("rdfsbase", "rdfsbase rax", "f3480faec0", "fsgsbase"),
)
