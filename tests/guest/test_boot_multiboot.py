"""Multiboot kernels that say on the serial port what they were given, and a game that others wrote."""

import os
import struct
import time
from pathlib import Path

import pytest

from gnu_toolchain import assemble, compile_c
from kvmpy import End, Machine, MiB
from kvmpy.boot import MultibootKernel, MultibootModule
from kvmpy.devices import I8042, DebugExit, Uart16550
from multiboot_files import Header1, Header2, tag

LOAD = 0x10_0000
MEMORY = 8 * MiB

# Both kernels in C begin so: EAX and EBX as they were, on a stack of their own.
START = """
__asm__ (".globl _start; _start: movl $stack + 4096, %%esp; pushl %%ebx; pushl %%eax; pushl $0; popf; call kernel");
__attribute__((section(".multiboot"), used, aligned(8))) static const unsigned header[] = { %s };
char stack[4096];
typedef unsigned u32;
typedef unsigned long long u64;
static inline void outb(unsigned short port, unsigned char value)
{ __asm__ volatile ("outb %%0, %%1" : : "a"(value), "Nd"(port)); }
static void put(char character) { outb(0x3f8, character); }
static void print(const char *text) { while (*text) put(*text++); }
static void hex(u64 value)
{
    int digits = 1;
    while (digits < 16 && value >> 4 * digits) digits++;
    while (digits--) put("0123456789abcdef"[value >> 4 * digits & 15]);
}
static void say(const char *name, u64 value) { print(name); put(' '); hex(value); put('\\n'); }
static void quote(const char *name, const char *text) { print(name); put(' '); print(text); put('\\n'); }
static void bytes(const char *start, const char *end) { while (start < end) put(*start++); put('\\n'); }
static void state(u32 magic)
{
    u32 cr0, eflags;
    __asm__ ("movl %%%%cr0, %%0; pushf; popl %%1" : "=r"(cr0), "=r"(eflags));
    say("magic", magic);
    say("PG", cr0 >> 31);
    say("PE", cr0 & 1);
    say("IF", eflags >> 9 & 1);
}
"""

KERNEL1 = """
struct module { u32 start, end; const char *string; u32 reserved; };
struct range { u32 size; u64 base, length; u32 type; } __attribute__((packed));
struct info {
    u32 flags, mem_lower, mem_upper, boot_device; const char *cmdline; u32 mods_count; struct module *mods;
    u32 syms[4]; u32 mmap_length; char *mmap; u32 drives[2]; u32 config_table; const char *boot_loader_name;
};
void kernel(u32 magic, struct info *info)
{
    state(magic);
    say("flags", info->flags);
    say("lower", info->mem_lower);
    say("upper", info->mem_upper);
    quote("cmdline", info->cmdline);
    quote("loader", info->boot_loader_name);
    for (u32 i = 0; i < info->mods_count; i++) {
        quote("module", info->mods[i].string);
        say("aligned", info->mods[i].start % 4096 == 0);
        bytes((char *) info->mods[i].start, (char *) info->mods[i].end);
    }
    for (char *at = info->mmap; at < info->mmap + info->mmap_length; at += ((struct range *) at)->size + 4) {
        struct range *range = (struct range *) at;
        say("base", range->base);
        say("length", range->length);
        say("type", range->type);
    }
    for (;;) outb(0xf4, 0);
}
"""

KERNEL2 = """
struct tag { u32 type, size; u32 data[]; };
void kernel(u32 magic, char *info)
{
    state(magic);
    say("aligned", (u32) info % 8 == 0);
    char *end = info + *(u32 *) info;
    for (char *at = info + 8; at < end; at += ((struct tag *) at)->size + 7 & -8) {
        struct tag *tag = (struct tag *) at;
        switch (tag->type) {
        case 1: quote("cmdline", (char *) tag->data); break;
        case 2: quote("loader", (char *) tag->data); break;
        case 3:
            quote("module", (char *) (tag->data + 2));
            bytes((char *) tag->data[0], (char *) tag->data[1]);
            break;
        case 4: say("lower", tag->data[0]); say("upper", tag->data[1]); break;
        case 6:
            for (char *range = at + 16; range < at + tag->size; range += tag->data[0]) {
                say("base", *(u64 *) range);
                say("length", *(u64 *) (range + 8));
                say("type", *(u32 *) (range + 16));
            }
            break;
        case 8: say("framebuffer", *(u64 *) tag->data); say("width", tag->data[3]); break;
        case 0: say("end", at + tag->size == end); break;
        }
    }
    for (;;) outb(0xf4, 0);
}
"""

MEMORY_MAP = """base 0
length 9fc00
type 1
base 9fc00
length 400
type 2
base f0000
length 10000
type 2
base 100000
length 700000
type 1
"""


def kernel(header: bytes, body: str) -> bytes:
    words = ", ".join(f"{word:#x}" for (word,) in struct.iter_unpack("<I", header))
    return compile_c(START % words + body, address=LOAD, bits=32, flags=("-Wno-parentheses",)).elf.read_bytes()


def run(image: MultibootKernel) -> str:
    """What the kernel prints until it leaves. RAM is full of 0xcc before it is loaded."""
    with Machine(memory=MEMORY, irqchip=False) as machine:
        machine.memory.fill(0, MEMORY, 0xCC)
        console = machine.add(Uart16550())
        machine.add(DebugExit())
        machine.load(image)
        outcome = machine.run(timeout=30)
        assert outcome.end is End.EXITED, (outcome, console.text)
        return console.text


MODULES = [MultibootModule(b"contents of one", "one --fast"), MultibootModule(b"two")]


def test_a_multiboot_kernel_finds_what_it_was_given() -> None:
    text = run(MultibootKernel(kernel(Header1(flags=3).to_bytes(), KERNEL1), cmdline="root=/dev/ram", modules=MODULES))
    # The flags: memory, command line, modules, ELF sections, memory map, name of the loader.
    assert text == (
        "magic 2badb002\nPG 0\nPE 1\nIF 0\nflags 26d\n"
        "lower 27f\nupper 1c00\ncmdline root=/dev/ram\nloader kvmpy\n"
        "module one --fast\naligned 1\ncontents of one\nmodule \naligned 1\ntwo\n" + MEMORY_MAP
    )


def test_a_multiboot2_kernel_finds_what_it_was_given() -> None:
    header = Header2([tag(1, 1, 3, 4, 6), tag(5, 80, 25, 0), tag(6)]).to_bytes()
    text = run(MultibootKernel(kernel(header, KERNEL2), cmdline="root=/dev/ram", modules=MODULES))
    assert text == (
        "magic 36d76289\nPG 0\nPE 1\nIF 0\naligned 1\n"
        "cmdline root=/dev/ram\nloader kvmpy\nmodule one --fast\ncontents of one\nmodule \ntwo\n"
        "lower 27f\nupper 1c00\n" + MEMORY_MAP + "framebuffer b8000\nwidth 50\nend 1\n"
    )


PRINTS_OK = """
    mov dx, 0x3f8
    mov al, 'o'
    out dx, al
    mov al, 'k'
    out dx, al
    cmp dword ptr [bss], 0      # what follows the file is zeroed
    jne failed
    cmp dword ptr [ebx], 0      # the information has flags
    je failed
    mov dword ptr [bss], 1
    xor eax, eax
    out 0xf4, al
failed:
    hlt
    .balign 16
bss:
"""


def flat(header_size: int) -> bytes:
    source = f".intel_syntax noprefix\n.org {header_size}\nentry:{PRINTS_OK}"
    return assemble(source, address=LOAD, bits=32)[header_size:]


def test_kernels_that_are_no_elf_files_run_where_their_header_says() -> None:
    for size in (32, 64):
        code = flat(size)
        end = LOAD + size + len(code) + 16
        if size == 32:
            header = Header1(addresses=(LOAD, LOAD, 0, end, LOAD + size)).to_bytes()
        else:
            header = Header2([tag(2, LOAD, LOAD, 0, end), tag(3, LOAD + size)]).to_bytes()
        assert len(header) == size
        assert run(MultibootKernel(header + code)) == "ok"


INVADERS = Path(os.environ.get("KVMPY_CACHE") or Path.home() / ".cache" / "kvmpy") / "grub-invaders/boot/invaders.exec"


def characters(machine: Machine) -> list[str]:
    """The text screen, line by line."""
    cells = machine.memory.read(0xB_8000, 80 * 25 * 2)
    return [cells[line : line + 160 : 2].decode("cp437").replace("\0", " ") for line in range(0, len(cells), 160)]


def wait_for(machine: Machine, text: str) -> str:
    """The line of the screen on which `text` appears, before anybody loses patience."""
    deadline = time.monotonic() + 25
    while time.monotonic() < deadline and machine.running:
        for line in reversed(characters(machine)):
            if text in line:
                return line
        time.sleep(0.01)
    pytest.fail(f"no {text!r} on the screen:\n" + "\n".join(characters(machine)))


@pytest.mark.skipif(not INVADERS.exists(), reason="`scripts/fetch-kernel invaders` has not been run")
def test_invaders_can_be_played() -> None:
    with Machine(memory=16 * MiB) as machine:
        keyboard = machine.add(I8042())
        machine.load(MultibootKernel(INVADERS))
        machine.start(timeout=30)
        wait_for(machine, "-*-")
        ship = wait_for(machine, "/ \\").index("/ \\")
        keyboard.press(b"\xe0\x4b")  # left, and held
        wait_for(machine, " " * (ship - 4) + "/ \\")
        keyboard.press(b"\xe0\xcb\x39")  # let go, and fire
        wait_for(machine, "|")
        machine.stop()
