"""What it costs to do an instruction in software, where KVM gives up on it: its exit, the work, and going on.

The guest repeats one instruction in ring 0 of long mode and measures itself by the TSC; two more instructions (dec,
jnz) count with each. Beside it stands a bare exit of the C loop.
"""

from __future__ import annotations

from kvmpy.bench.exit_cost import ACCESSES
from kvmpy.bench.rows import Row, Sampler, Target, alternate
from kvmpy.bench.session import Session
from kvmpy.machine import Machine
from kvmpy.x86 import long_mode

__all__ = ["CODE", "INSTRUCTIONS", "SOURCE", "measure", "program", "row_name"]

COMPLETIONS = 500
_TARGET = Target(60)
_SIZE = 0x20_0000
_ENTRY, _STACK, _TABLES = 0x1000, 0x1_8000, 0x4_0000
_COUNT, _TICKS = 0x3000, 0x3004

SOURCE = """
        # x87, SSE and AVX enabled and in use; EDX:EAX for XSAVE and XRSTOR, areas at RSI and RDI.
        mov rax, cr4
        or eax, 0x40600
        mov cr4, rax
        mov rax, cr0
        and eax, 0xfffffff3
        or eax, 0x22
        mov cr0, rax
        xor ecx, ecx
        xor edx, edx
        mov eax, 7
        xsetbv
        mov esi, 0x20000
        mov edi, 0x30000
        movups xmm0, [rsi]
        xsave64 [rdi]
        mov ebp, [0x3000]
        rdtsc
        mov r8d, eax
        mov eax, 7
        xor edx, edx
again:  {instruction}
        dec ebp
        jnz again
        rdtsc
        sub eax, r8d
        mov [0x3004], eax
        cli
        hlt
"""
CODE = (
    bytes.fromhex(
        "0f20e00d000604000f22e00f20c083e0f383c8220f22c031c931d2b8070000000f01d1be00000200bf000003000f1006"
        "480fae278b2c25003000000f314189c0b80700000031d2"
    ),
    bytes.fromhex("0f314429c089042504300000faf4"),
)
"""Machine code of SOURCE before `again` and behind the loop."""

INSTRUCTIONS = {
    "stac": bytes.fromhex("0f01cb"),
    "lock cmpxchg16b [rdi]": bytes.fromhex("f0480fc70f"),
    "pxor xmm0, xmm1": bytes.fromhex("660fefc1"),
    "addsd xmm0, xmm1": bytes.fromhex("f20f58c1"),
    "xsaveopt64 [rdi]": bytes.fromhex("480fae37"),
    "xrstor64 [rdi]": bytes.fromhex("480fae2f"),
}
"""What is repeated, by its assembly."""


def program(instruction: str) -> bytes:
    """The guest that repeats it."""
    before, behind = CODE
    body = INSTRUCTIONS[instruction] + b"\xff\xcd"  # dec ebp
    return before + body + b"\x75" + (-len(body) - 2 & 0xFF).to_bytes(1, "little") + behind


def measure(session: Session) -> list[Row]:
    """A row for each instruction that is done in software here; none where the processor or KVM does all of them."""
    count, accesses = session.count(COMPLETIONS), session.count(ACCESSES // 2)
    bare: dict[str, Sampler] = {}
    if session.has_c():
        loop, rom = session.contenders.program("exit_loop"), session.firmware("port write", accesses)
        bare["C loop, a bare exit"] = lambda: session.microseconds(int(loop.ask(str(rom)))) / accesses
    rows = []
    for instruction in INSTRUCTIONS:
        if not _completions(instruction, 1)[1]:
            continue

        def sample(instruction: str = instruction) -> float:
            return session.microseconds(_completions(instruction, count)[0]) / count

        taken = alternate(session.rounds, {"kvmpy": sample, **bare})
        rows.append(Row.of(f"{instruction}, done in software", "us", taken, target=_TARGET))
    return rows


def _completions(instruction: str, count: int) -> tuple[int, int]:
    """TSC ticks for `count` times the instruction, and how often it was done in software."""
    with Machine(memory=_SIZE, irqchip=False) as machine:
        memory = machine.memory
        memory.write(_ENTRY, program(instruction))
        memory.write_u32(_COUNT, count)
        machine.vcpus[0].set_cpu_state(
            long_mode.prepare(memory, entry=_ENTRY, tables=_TABLES, stack=_STACK, identity_map=_SIZE)
        )
        machine.run(check=True)
        return memory.read_u32(_TICKS), machine.statistics().completed.get(row_name(instruction), 0)


def row_name(instruction: str) -> str:
    """What the statistics call it."""
    return instruction.removeprefix("lock ").split()[0].removesuffix("64")
