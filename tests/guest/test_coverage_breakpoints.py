"""Coverage by one-shot breakpoints: the same code as by steps, each place once, and nothing stays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gnu_toolchain import GuestProgram, assemble_with_symbols, compile_c
from kvmpy import End, Machine, Outcome, UsageError
from kvmpy.boot import ElfImage, FlatImage
from kvmpy.debug.coverage import Coverage, CoveredCode, basic_blocks
from kvmpy.debug.coverage.step_support import breaks_in_ring3
from kvmpy.debug.symbols import LineTable, Symbol, SymbolTable, UnknownSymbolError
from kvmpy.devices import DebugExit
from two_processors import COUNTER, working_twice

pytest.importorskip("capstone")
pytestmark = pytest.mark.kvm

SECONDS = 5.0
MODES = {16: "real", 32: "protected", 64: "long"}
CODE, STACK = 0x1000, 0x7000
PROGRAM, SIZE = 0x10_0000, 0x1_0000

every_mode = pytest.mark.parametrize("bits", MODES)
both_widths = pytest.mark.parametrize("bits", [32, 64])

ENDED_WELL = Outcome(End.EXITED, "debug exit at port 0xf4, value 0x0", code=1)

BRANCHES = """
_start: mov ecx, 5
again:  call work
back:   dec ecx
        jnz again
        jmp done
never:  inc eax
        jmp done
done:   mov al, 0
        out 0xf4, al
halt:   hlt
work:   cmp ecx, 100
        ja never
more:   inc ebx
        ret
"""

HEADER = """
int twice(int x);
void leave(unsigned char code);
static inline int unused(int x)
{
    return x + 1;
}
"""

MAIN = """#include "shared.h"

static volatile int data[8];

int never(int x)
{
    return x * 3;               // missed
}

int choose(int x)
{                               // 5
    if (x > 100)                // 5
        return never(x);        // missed
    if (x < 0) {                // 5
        x = -x;                 // missed
        x += 7;                 // missed
    }
    return x;                   // 5
}

void _start(void)
{
    int sum = 0;                // 1
    for (int i = 0; i < 5; i++) // 6
        sum += choose(i);       // 5
    switch (sum) {              // 1
    case 1:
        sum = never(1);         // missed
        break;                  // missed
    case 10:
        sum = twice(sum);       // 1
        break;                  // 1
    default:
        sum = 99;               // missed
    }
    data[0] = sum;              // 1
    leave(0);                   // 1
}
"""

OTHER = """#include "shared.h"

int twice(int x)
{
    if (x == 10)                // 1
        return 20;              // 1
    return 2 * x;               // missed
}

void leave(unsigned char code)
{
    __asm__ volatile("outb %0, %1" : : "a"(code), "Nd"((unsigned short)0xf4)); // 1
    for (;;)
        __asm__ volatile("hlt"); // missed
}
"""
"""`// count` says how often a line is executed. -O0: each line has its own code."""


def expected(source: str) -> dict[int, int]:
    """Line -> count, of the lines whose comment says so."""
    counts = {}
    for number, line in enumerate(source.splitlines(), 1):
        comment = line.rpartition("// ")[2] if "// " in line else ""
        if comment == "missed" or comment.isdecimal():
            counts[number] = 0 if comment == "missed" else int(comment)
    return counts


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name, text in (("shared.h", HEADER), ("main.c", MAIN), ("other.c", OTHER)):
        (folder / name).write_text(text)
    return folder


def compiled(sources: Path, bits: int, *flags: str) -> GuestProgram:
    from gnu_toolchain import TOOLCHAIN

    compile_c("void _start(void) {}\n", bits=bits)  # skips without the tools
    return TOOLCHAIN.compile_c("main.c", "other.c", bits=bits, flags=flags or ("-O0",), folder=sources)


@contextmanager
def flat(source: str, bits: int, vcpus: int = 1) -> Iterator[tuple[Machine, dict[str, int]]]:
    code, symbols = assemble_with_symbols(source, address=CODE, bits=bits)
    with Machine(vcpus=vcpus) as machine:
        machine.add(DebugExit())
        machine.load(FlatImage(code, CODE, MODES[bits], stack=STACK))
        yield machine, symbols


@contextmanager
def loaded(program: GuestProgram) -> Iterator[Machine]:
    with Machine() as machine:
        machine.add(DebugExit())
        machine.load(ElfImage(program.elf, stack=0x9_0000))
        yield machine


def run(program: GuestProgram, method: str, **options: object) -> Coverage:
    with loaded(program) as machine, Coverage(machine, method, **options) as coverage:  # type: ignore[arg-type]
        assert machine.run(SECONDS) == ENDED_WELL
    return coverage


# The same by both methods


@every_mode
def test_both_methods_find_the_same_instructions_of_a_flat_image(bits: int) -> None:
    with flat(BRANCHES, bits) as (machine, symbols):
        before = machine.memory.read(CODE, 0x100)
        blocks = basic_blocks(machine)
        with Coverage(machine, "breakpoints") as coverage:
            assert machine.memory.read(CODE, 0x100) != before
            assert machine.run(SECONDS) == ENDED_WELL
            assert machine.memory.read(CODE, 0x100) != before  # those that were not reached are still there
        assert machine.memory.read(CODE, 0x100) == before
        assert machine.vcpus[0].regs.rbx == 5
    with flat(BRANCHES, bits) as (machine, _), Coverage(machine, "steps") as steps:
        machine.run(SECONDS)
    assert coverage.addresses == steps.addresses
    assert set(coverage.counts.values()) == {1}
    assert {block.start for block in coverage.missed} == {symbols["never"], symbols["halt"]}
    assert [block for block in blocks if block.start in steps.addresses] == list(coverage.blocks)
    assert symbols["more"] in {block.start for block in coverage.blocks}


@both_widths
@pytest.mark.parametrize("flags", ["-O0", "-O1", "-O2", "-Os"])
def test_both_methods_find_the_same_instructions_of_a_c_program(bits: int, flags: str, sources: Path) -> None:
    program = compiled(sources, bits, flags)
    steps, breakpoints = run(program, "steps"), run(program, "breakpoints")
    assert breakpoints.addresses == steps.addresses
    assert breakpoints.missed
    with loaded(program) as machine:
        blocks = basic_blocks(machine)
    assert {block.start for block in blocks} & steps.addresses == {block.start for block in breakpoints.blocks}


@both_widths
@pytest.mark.parametrize(
    ("method", "places"), [("steps", "blocks"), ("breakpoints", "blocks"), ("breakpoints", "lines")]
)
def test_lines_that_were_executed_are_those_that_the_source_says(
    bits: int, method: str, places: str, sources: Path
) -> None:
    coverage = run(compiled(sources, bits), method, places=places)
    found = coverage.lines()
    assert found.keys() == {str(sources / name) for name in ("main.c", "other.c")}
    for name, source in (("main.c", MAIN), ("other.c", OTHER)):
        counts = found[str(sources / name)]
        for line, count in expected(source).items():
            assert counts[line] == (count if method == "steps" else min(count, 1)), f"{name}:{line}"


def test_nothing_of_the_breakpoints_stays_in_memory(sources: Path) -> None:
    program = compiled(sources, 64)
    memories = []
    for options in (None, {"places": "blocks"}, {"places": "lines"}):
        with loaded(program) as machine:
            if options is None:
                machine.run(SECONDS)
            else:
                with Coverage(machine, "breakpoints", **options):  # type: ignore[arg-type]
                    machine.run(SECONDS)
            memories.append(machine.memory.read(0, machine.memory.regions[0].size))
            assert not machine.debugger.software
            assert not machine.runners[0].debug.software
    assert memories[1] == memories[0]
    assert memories[2] == memories[0]


def test_a_guest_that_never_ran_has_all_blocks_missed(sources: Path) -> None:
    with loaded(compiled(sources, 64)) as machine:
        before = machine.memory.read(PROGRAM, SIZE)
        with Coverage(machine, "breakpoints") as coverage:
            pass
        assert machine.memory.read(PROGRAM, SIZE) == before
        assert coverage.addresses == set()
        assert [block.start for block in coverage.missed] == [block.start for block in basic_blocks(machine)]


def test_each_breakpoint_comes_out_once_and_nobody_else_sees_it(sources: Path) -> None:
    with loaded(compiled(sources, 64)) as machine:
        with Coverage(machine, "breakpoints") as coverage:
            machine.run(SECONDS)
        assert len(coverage.blocks) > 10
        assert [type(exit).__name__ for exit in machine.recent_exits()] == ["DeviceAccess"]
        assert not machine.runners[0].loop.other_exits


# Where breakpoints go


def test_functions_can_be_chosen(sources: Path) -> None:
    program = compiled(sources, 64)
    symbols = SymbolTable.from_elf(program.elf)
    for places in ("blocks", "lines"):
        coverage = run(program, "breakpoints", functions=["choose", "never"], places=places)
        both = [symbols.symbol(name) for name in ("choose", "never")]
        for block in (*coverage.blocks, *coverage.missed):
            assert any(symbol.address <= block.start < symbol.end for symbol in both)
        assert both[0].address in coverage.addresses
        assert both[1].address in {block.start for block in coverage.missed}


def test_a_handler_that_nothing_leads_to_is_covered_when_it_is_named() -> None:
    source = """
    _start: xor ax, ax
            mov ds, ax
            mov word ptr [0x40 * 4], offset handler
            mov word ptr [0x40 * 4 + 2], 0
            int 0x40
    back:   mov al, 0
            out 0xf4, al
            hlt
    data:   .ascii "Hello, real world"
    handler:
            nop
            iret
    """
    for starts in ([], ["handler"]):
        with flat(source, 16) as (machine, symbols):
            machine.symbols = SymbolTable.from_dict(symbols)
            data = machine.memory.read(symbols["data"], 17)
            with Coverage(machine, "breakpoints", starts=starts) as coverage:
                assert machine.memory.read(symbols["data"], 17) == data
                assert machine.run(SECONDS) == ENDED_WELL
            assert symbols["back"] in coverage.addresses
            assert (symbols["handler"] in coverage.addresses) is bool(starts)


def test_behind_hlt_code_is_told_from_data() -> None:
    source = """
    _start: call idle
            mov al, 0
            out 0xf4, al
    stop:   hlt
    next:   jmp stop
    idle:   jmp done
            hlt
    data:   .ascii "a text that must stay as it is"
    done:   ret
    """
    with flat(source, 64) as (machine, symbols):
        data = machine.memory.read(symbols["data"], 30)
        with Coverage(machine, "breakpoints", starts=[symbols["idle"] + 2]) as coverage:
            assert machine.memory.read(symbols["data"], 30) == data
            assert machine.run(SECONDS) == ENDED_WELL
        assert {symbols[name] for name in ("stop", "next")} <= {block.start for block in coverage.missed}


def test_code_of_another_width_than_the_file_says_can_be_told() -> None:
    source = ".globl f; .type f, @function; f: .byte 0xb8, 1, 0; nop; nop; mov al, 0; out 0xf4, al; .size f, . - f"
    program = _elf(source, 16)
    with Machine() as machine:
        machine.add(DebugExit())
        machine.load(ElfImage(program, mode="real", stack=STACK))
        assert len(basic_blocks(machine, bits=16, functions=["f"])[0].instructions) == 5
        assert len(basic_blocks(machine, functions=["f"])[0].instructions) < 5
        with Coverage(machine, "breakpoints", bits=16) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        assert len(coverage.addresses) == 5


def _elf(source: str, bits: int) -> Path:
    from gnu_toolchain import TOOLCHAIN

    assemble_with_symbols("nop")  # skips without the tools
    return TOOLCHAIN.assemble(source, address=CODE, bits=bits).elf


def test_what_cannot_be_is_refused_and_changes_nothing(sources: Path) -> None:
    with Machine() as machine, pytest.raises(UsageError, match="load"), Coverage(machine, "breakpoints"):
        pass
    with loaded(compiled(sources, 64)) as machine:
        before = machine.memory.read(PROGRAM, SIZE)
        with pytest.raises(UnknownSymbolError), Coverage(machine, "breakpoints", functions=["chose"]):
            pass
        with pytest.raises(UsageError, match="not in the code"), Coverage(machine, "breakpoints", starts=[0x7F_0000]):
            pass
        with pytest.raises(UsageError, match="16, 32 or 64"), Coverage(machine, "breakpoints", bits=8):
            pass
        assert machine.memory.read(PROGRAM, SIZE) == before
        assert machine.run(SECONDS) == ENDED_WELL
    with flat(BRANCHES, 64) as (machine, _):
        with pytest.raises(UsageError, match="line numbers"), Coverage(machine, "breakpoints", places="lines"):
            pass
        assert machine.run(SECONDS) == ENDED_WELL


def test_a_guest_that_starts_in_ring_3_is_refused_where_breakpoints_do_not_come_out_of_it() -> None:
    if breaks_in_ring3():
        pytest.skip("here they do")
    code, _ = assemble_with_symbols("_start: jmp _start", address=CODE, bits=64)
    with Machine() as machine:
        machine.load(FlatImage(code, CODE, "long", ring=3))
        with pytest.raises(UsageError, match="ring 3"), Coverage(machine, "breakpoints"):
            pass


# Guests that do unusual things


def test_code_that_the_guest_writes_over_a_breakpoint_stays() -> None:
    source = """
    _start: call work
            mov byte ptr [work], 0xc3   # ret, over what was executed
            mov byte ptr [later], 0x90  # nop, over a breakpoint that waits
            call work
            jmp later
    middle: nop
    later:  ud2
    still:  nop
            mov al, 0
            out 0xf4, al
    work:   nop
            ret
    """
    with flat(source, 32) as (machine, symbols):
        machine.memory.write_u8(symbols["later"] + 1, 0x90)
        with Coverage(machine, "breakpoints") as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        assert machine.memory.read_u8(symbols["work"]) == 0xC3
        assert machine.memory.read_u8(symbols["later"]) == 0x90
        assert symbols["work"] in coverage.addresses
        assert symbols["later"] not in coverage.addresses


def test_a_copy_of_the_code_that_the_guest_runs_has_no_breakpoints_left() -> None:
    source = """
    _start: mov esi, offset f
            mov edi, 0x5000
            mov ecx, offset end - f
            rep movsb
            mov eax, 0x5000
            call rax
            mov al, 0
            out 0xf4, al
    f:      mov ebx, 5
    l:      dec ebx
            jz out
            jmp l
    out:    ret
    never:  jmp f
    end:
    """
    with flat(source, 64) as (machine, symbols):
        code = machine.memory.read(symbols["f"], symbols["end"] - symbols["f"])
        with Coverage(machine, "breakpoints", starts=[symbols["f"], symbols["never"]]) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        assert machine.memory.read(0x5000, len(code)) == code
        assert {symbols["f"], symbols["l"], symbols["out"]} <= coverage.addresses
        assert symbols["never"] not in coverage.addresses
        assert machine.vcpus[0].regs.rbx == 0


def test_int3_of_the_guest_itself_is_its_own() -> None:
    source = """
    _start: xor ax, ax
            mov ds, ax
            mov word ptr [3 * 4], offset handler
            mov word ptr [3 * 4 + 2], 0
            jmp mine
    mine:   int3
    back:   int3
            mov al, bl
            out 0xf4, al
    handler:
            inc bl
            iret
    """
    with flat(source, 16) as (machine, symbols):
        machine.vcpus[0].regs.rbx = 0
        with Coverage(machine, "breakpoints", starts=[symbols["handler"]]) as coverage:
            assert machine.run(SECONDS).code == 5  # (2 << 1) | 1
        assert {symbols[name] for name in ("mine", "back", "handler")} <= coverage.addresses


def test_a_block_that_starts_with_an_instruction_done_in_software_goes_on() -> None:
    # Where KVM runs ring 0 in its emulator it gives up on POPCNT, as it does on the breakpoint that was there before.
    source = """
    _start: mov ebx, 0x70
            mov ecx, 2
    count:  popcnt edx, ebx
            dec ecx
            jnz count
            mov al, dl
            out 0xf4, al
    """
    with flat(source, 64) as (machine, symbols), Coverage(machine, "breakpoints") as coverage:
        assert machine.run(SECONDS).code == 7  # (3 << 1) | 1
        assert symbols["count"] in coverage.addresses


@every_mode
def test_breakpoints_of_a_debugger_at_the_same_places_work(bits: int) -> None:
    with flat(BRANCHES, bits) as (machine, symbols):
        before = machine.memory.read(CODE, 0x100)
        early = machine.breakpoint(symbols["work"], lambda *_: None, hardware=False)
        with Coverage(machine, "breakpoints") as coverage:
            late = machine.breakpoint(symbols["back"], hardware=False)
            for count in range(5, 0, -1):
                assert machine.run(SECONDS).end is End.BREAKPOINT
                assert machine.vcpus[0].regs.rcx == count
            assert machine.run(SECONDS) == ENDED_WELL
        assert (early.hits, late.hits) == (5, 5)
        assert {symbols["work"], symbols["back"]} <= coverage.addresses
        assert machine.debugger.read_memory(machine.vcpus[0], CODE, 0x100) == before
        early.remove()
        late.remove()
        assert machine.memory.read(CODE, 0x100) == before


def test_a_debugger_reads_memory_as_if_there_were_no_breakpoints(sources: Path) -> None:
    with loaded(compiled(sources, 64)) as machine:
        before = machine.memory.read(PROGRAM, SIZE)
        with Coverage(machine, "breakpoints"):
            assert machine.memory.read(PROGRAM, SIZE) != before
            assert machine.debugger.read_memory(machine.vcpus[0], PROGRAM, SIZE) == before


@pytest.mark.parametrize("attempt", range(3))
def test_processors_that_reach_a_breakpoint_at_the_same_time_go_on(attempt: int) -> None:
    with flat(working_twice(5), 16, vcpus=2) as (machine, symbols):
        before = machine.memory.read(CODE, 0x100)
        machine.vcpus[1].set_real_mode(CODE, stack=0x6000)
        with Coverage(machine, "breakpoints") as coverage:
            assert machine.run(SECONDS).end is End.EXITED
        assert machine.memory.read_u16(COUNTER) == 10
        assert {symbols[name] for name in ("_start", "again", "work", "wait")} <= coverage.addresses
        assert machine.memory.read(CODE, 0x100) == before


def test_runs_can_be_merged(sources: Path) -> None:
    program = compiled(sources, 64)
    steps, breakpoints, lines = (
        run(program, "steps"), run(program, "breakpoints"), run(program, "breakpoints", places="lines")
    )  # fmt: skip
    merged = steps | breakpoints
    assert type(merged) is CoveredCode
    assert merged.addresses == steps.addresses
    assert merged.counts == {address: count + 1 for address, count in steps.counts.items()}
    assert [block[:3] for block in merged.blocks] == [block[:3] for block in breakpoints.blocks]
    assert merged.missed == breakpoints.missed
    assert CoveredCode.merge(steps, breakpoints, lines).addresses == steps.addresses
    only = run(program, "breakpoints", functions=["twice"]) | run(program, "breakpoints", functions=["choose"])
    assert only.addresses < steps.addresses
    assert only.lines().keys() == steps.lines().keys()


def test_lines_of_a_flat_image_can_be_given(sources: Path, tmp_path: Path) -> None:
    program = compiled(sources, 32)
    with Machine() as machine:
        machine.add(DebugExit())
        machine.load(FlatImage(program.image, program.address, "protected", entry=program.entry, stack=0x9_0000))
        with Coverage(machine) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
    with pytest.raises(UsageError, match="-g"):
        coverage.lines()
    table = LineTable.from_elf(program.elf)
    assert coverage.lines(lines=table) == run(program, "steps").lines()
    coverage.write_lcov(tmp_path / "flat.info", lines=table, symbols=SymbolTable.from_elf(program.elf))
    run(program, "steps").write_lcov(tmp_path / "elf.info")
    assert (tmp_path / "flat.info").read_text() == (tmp_path / "elf.info").read_text()


def test_the_start_of_another_processor_is_recognized_where_the_guest_has_copied_it() -> None:
    source = """
            .code64
    _start: mov ebx, 0xfee00000
            mov dword ptr [rbx + 0xf0], 0x1ff     # software enable
            mov esi, offset other                 # the trampoline goes where the SIPI says: vector 8, 0x8000
            mov edi, 0x8000
            mov ecx, offset end - other
            rep movsb
            mov dword ptr [rbx + 0x300], 0xc4500  # INIT to all but self
            mov dword ptr [rbx + 0x300], 0xc4608  # SIPI
    wait:   cmp dword ptr [0x2000], 1
            jne wait
            mov al, 0
            out 0xf4, al
            .code16
            .globl other
            .type other, @function
    other:  xor ax, ax
            mov ds, ax
            inc dword ptr [0x2000]
            jmp stop
    middle: nop
    stop:   cli
            hlt
    end:
            .size other, . - other
    """
    code, symbols = assemble_with_symbols(source, address=CODE, bits=64)
    with Machine(vcpus=2) as machine:
        machine.add(DebugExit())
        machine.load(FlatImage(code, CODE, "long", stack=STACK))
        machine.symbols = SymbolTable(
            [Symbol("other", symbols["other"], symbols["end"] - symbols["other"], "function")]
        )
        with Coverage(machine, "breakpoints", bits=16) as coverage:
            assert machine.run(SECONDS) == ENDED_WELL
        trampoline = code[symbols["other"] - CODE :]
        assert machine.memory.read(0x8000, len(trampoline)) == trampoline
        assert {symbols["other"], symbols["wait"]} <= coverage.addresses
        assert symbols["middle"] not in coverage.addresses
