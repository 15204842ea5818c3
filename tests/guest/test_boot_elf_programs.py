"""ELF files as gcc and ld make them, from the loader to the exit code that they compute."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from gnu_toolchain import compile_c
from kvmpy import End, Machine, MiB, Outcome
from kvmpy.boot import ElfImage, FlatImage
from kvmpy.devices import DebugConsole, DebugExit, Uart16550
from kvmpy.pytest_plugin.requirement import skip_or_fail

PORTS = """
static inline void outb(unsigned short port, unsigned char value)
{ __asm__ volatile ("outb %0, %1" : : "a"(value), "Nd"(port)); }

static inline void outl(unsigned short port, unsigned value)
{ __asm__ volatile ("outl %0, %1" : : "a"(value), "Nd"(port)); }

static inline void print(const char *text) { while (*text) outb(0xe9, *text++); }

static inline void __attribute__((noreturn)) leave(unsigned value) { for (;;) outl(0xf4, value); }
"""

# Everything that a loader can get wrong ends up in the code: constants, initialised data, zeroed data, the stack.
PROGRAM = f"""{PORTS}
const unsigned table[] = {{ 3, 1, 4, 1, 5, 9, 2, 6 }};
unsigned data[3] = {{ 0x100, 0x200, 0x300 }};
unsigned char zeroes[0x3210];
const char *volatile greeting = "greetings\\n";   /* a pointer in memory: gcc must not know it */

static unsigned sum(const unsigned *values, unsigned count)
{{ return count ? *values + sum(values + 1, count - 1) : 0; }}

void _start(void)
{{
    unsigned dirty = 0;
    for (unsigned i = 0; i < sizeof zeroes; i += 0x10)
        dirty |= zeroes[i];
    dirty |= zeroes[sizeof zeroes - 1];
    data[1] += sum(table, 8);
    zeroes[0x1234] = 1;
    print(greeting);
    leave(dirty ? 0xdead : sum(data, 3) + zeroes[0x1234]);
}}
"""
RESULT = 0x600 + 31 + 1


def run(source: Path | bytes, *, memory: int = 4 * MiB, **options: int) -> tuple[Outcome, str, ElfImage]:
    """How a guest ends, what it printed. RAM is full of 0xCC before it is loaded."""
    with Machine(memory=memory, irqchip=False) as machine:
        machine.memory.fill(0, memory, 0xCC)
        console = machine.add(DebugConsole())
        machine.add(DebugExit())
        image = ElfImage(source, **options)  # type: ignore[arg-type]
        machine.load(image)
        return machine.run(timeout=20), console.text, image


def check(outcome: Outcome, text: str) -> None:
    assert outcome.end is End.EXITED, outcome
    assert outcome.code == RESULT << 1 | 1
    assert text == "greetings\n"


def link(directory: Path, source: str, *options: str, script: str = "", bits: int = 64) -> Path:
    """`source` compiled with `options` of gcc and linked by `script`."""
    gcc = shutil.which("gcc")
    if gcc is None or platform.machine() != "x86_64":
        skip_or_fail("needs `gcc` for x86 (Debian package gcc)")
    (directory / "program.c").write_text(source)
    command = [
        gcc, f"-m{bits}", "-O1", "-Wall", "-Werror", "-ffreestanding", "-nostdlib", "-fno-stack-protector",
        "-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-mno-red-zone", "-mgeneral-regs-only",
        "-Wl,--build-id=none", "-Wl,-z,noexecstack", *options, "-o", "program.elf", "program.c",
    ]  # fmt: skip
    if script:
        (directory / "layout.ld").write_text(script)
        command += ["-Wl,-T,layout.ld"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return directory / "program.elf"


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("address", [0x10_0000, 0x1_2000])
def test_a_program_at_a_fixed_address_computes_its_result(bits: int, address: int) -> None:
    program = compile_c(PROGRAM, address=address, bits=bits)
    outcome, text, image = run(program.elf)
    check(outcome, text)
    assert image.machine == {32: "i386", 64: "x86-64"}[bits]
    assert image.symbols()["zeroes"] == program.symbols["zeroes"]


def test_a_64_bit_program_runs_in_ring_3() -> None:
    outcome, text, _ = run(compile_c(PROGRAM).elf, ring=3)
    check(outcome, text)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("base", [None, 0x20_0000, 0x3_3000])
def test_a_position_independent_program_runs_wherever_it_is_put(tmp_path: Path, bits: int, base: int | None) -> None:
    program = link(tmp_path, PROGRAM, "-fPIE", "-static-pie", bits=bits)
    headers = subprocess.run(["readelf", "-r", program], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "_RELATIVE" in headers  # `greeting` is one: without them the test would show little
    outcome, text, image = run(program, **({} if base is None else {"base": base}))
    check(outcome, text)
    assert image.position_independent
    assert image.segments[0].address == (base or 0x10_0000)


HIGH = 0xFFFF_FFFF_8000_0000
HIGHER_HALF = f"""
ENTRY(_start)
SECTIONS
{{
    . = {HIGH:#x} + 0x100000;
    .text : AT(ADDR(.text) - {HIGH:#x}) {{ *(.text .text.*) }}
    .rodata : AT(ADDR(.rodata) - {HIGH:#x}) {{ *(.rodata .rodata.*) }}
    . = ALIGN(0x1000);
    .data : AT(ADDR(.data) - {HIGH:#x}) {{ *(.data .data.* .data.rel.*) }}
    .bss : AT(ADDR(.bss) - {HIGH:#x}) {{ *(.bss .bss.*) *(COMMON) }}
    /DISCARD/ : {{ *(.comment) *(.note .note.*) *(.eh_frame) }}
}}
"""


def test_a_higher_half_kernel_starts_at_its_virtual_address(tmp_path: Path) -> None:
    kernel = link(
        tmp_path, PROGRAM, "-static", "-no-pie", "-fno-pie", "-mcmodel=kernel", "-Wl,-z,max-page-size=0x1000",
        script=HIGHER_HALF,
    )  # fmt: skip
    outcome, text, image = run(kernel)
    check(outcome, text)
    assert image.entry > HIGH
    assert min(segment.address for segment in image.segments) == 0x10_0000


def test_physical_memory_stays_reachable_beside_a_higher_half_kernel(tmp_path: Path) -> None:
    source = f"""{PORTS}
    unsigned here = 0x1234;
    void _start(void)
    {{
        volatile unsigned *physical = (volatile unsigned *) ((unsigned long) &here - {HIGH:#x}UL);
        *physical += 1;
        leave(*(volatile unsigned *) &here);
    }}"""
    kernel = link(
        tmp_path, source, "-static", "-no-pie", "-fno-pie", "-mcmodel=kernel", "-Wl,-z,max-page-size=0x1000",
        script=HIGHER_HALF,
    )  # fmt: skip
    outcome, _, _ = run(kernel)
    assert outcome.code == 0x1235 << 1 | 1


TWO_ENTRIES = f"""{PORTS}
void _start(void) {{ leave(1); }}
void other(void) {{ leave(2); }}
"""


@pytest.mark.parametrize("bits", [32, 64])
def test_the_entry_can_be_another_symbol(bits: int) -> None:
    program = compile_c(TWO_ENTRIES, bits=bits)
    assert run(program.elf)[0].code == 3
    assert run(program.elf, entry=program.symbols["other"])[0].code == 5


def test_the_entry_of_a_moved_program_is_meant_as_linked(tmp_path: Path) -> None:
    program = link(tmp_path, TWO_ENTRIES, "-fPIE", "-static-pie")
    linked = ElfImage(program).symbols()["other"] - ElfImage(program).bias
    assert run(program, entry=linked, base=0x30_0000)[0].code == 5


def test_a_32_bit_program_is_entered_in_protected_mode_and_a_64_bit_one_in_long_mode() -> None:
    # The same bytes: 48 is `dec eax` for 32 bits, and a prefix for 64.
    probe = f"""{PORTS}
    void _start(void)
    {{
        unsigned value;
        __asm__ volatile ("xorl %%eax, %%eax; .byte 0x48; nop; movl %%eax, %0" : "=r"(value) : : "eax");
        leave(value & 1);
    }}"""
    assert run(compile_c(probe, bits=32).elf)[0].code == 3
    assert run(compile_c(probe, bits=64).elf)[0].code == 1


def test_the_tables_and_the_stack_lie_outside_of_the_program_and_its_zeroed_memory() -> None:
    program = compile_c(PROGRAM, address=0x1000)
    # RAM that is hardly larger than the program with .bss, tables and a stack: they must find their place above it.
    outcome, text, _ = run(program.elf, memory=0x1_4000)
    check(outcome, text)


# A guest in C that knows the hardware

SERIAL = f"""{PORTS}
static inline unsigned char inb(unsigned short port)
{{ unsigned char value; __asm__ volatile ("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }}

enum {{ COM1 = 0x3f8, LSR = 5, DR = 0x01, THRE = 0x20 }};

static void put(char character)
{{
    while (!(inb(COM1 + LSR) & THRE)) ;
    outb(COM1, character);
}}

static unsigned char get(void)
{{
    while (!(inb(COM1 + LSR) & DR)) ;
    return inb(COM1);
}}

static void put_number(unsigned number)
{{
    if (number >= 10)
        put_number(number / 10);
    put('0' + number % 10);
}}

/* Adds up the numbers of a line. */
void _start(void)
{{
    unsigned sum = 0, number = 0;
    unsigned char character;
    put('>');
    do {{
        character = get();
        if (character >= '0' && character <= '9') {{
            number = number * 10 + character - '0';
        }} else {{
            sum += number;
            number = 0;
        }}
    }} while (character != '\\r');
    put('=');
    put_number(sum);
    put('\\n');
    leave(0);
}}
"""


@pytest.mark.parametrize("bits", [32, 64])
def test_a_guest_in_c_reads_and_writes_the_serial_port(bits: int) -> None:
    program = compile_c(SERIAL, bits=bits)
    with Machine(memory=4 * MiB, irqchip=False) as machine:
        console = machine.add(Uart16550())
        machine.add(DebugExit())
        machine.load(ElfImage(program.elf))
        machine.start(timeout=20)
        console.expect(b">")
        console.send("123 4567 89\r")
        console.expect(b"=4779\n")
        assert machine.wait(timeout=5).ok


def test_a_flat_image_of_c_runs_at_the_address_it_was_linked_for() -> None:
    source = PROGRAM.replace("void _start(void)\n{", '__attribute__((section(".text.entry"))) void _start(void)\n{', 1)
    program = compile_c(source, address=0x2000, bits=32)
    assert program.entry == 0x2000
    with Machine(memory=1 * MiB, irqchip=False) as machine:
        console = machine.add(DebugConsole())
        machine.add(DebugExit())
        machine.load(FlatImage(program.image, address=0x2000, mode="protected"))
        check(machine.run(timeout=10), console.text)


def test_a_mode_that_the_class_of_the_file_does_not_say_can_be_given(tmp_path: Path) -> None:
    # Real-mode code in an ELF64 file.
    script = "ENTRY(_start) SECTIONS { . = 0x8000; .text : { *(.text) } /DISCARD/ : { *(*) } }"
    source = '__asm__ (".code16; .globl _start; _start: movb $114, %al; outb %al, $0xe9; hlt");'
    program = link(tmp_path, source, "-static", "-no-pie", "-Wl,-z,max-page-size=0x1000", script=script)
    with Machine(memory=1 * MiB, irqchip=False) as machine:
        console = machine.add(DebugConsole())
        machine.load(ElfImage(program, mode="real"))
        assert machine.run(timeout=5).end is End.HALTED
        assert console.text == "r"
