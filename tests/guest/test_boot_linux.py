"""Small kernels in Linux's formats, which say on a debug port what they find at each of their entry points."""

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Machine, MiB
from kvmpy.boot import LinuxKernel
from kvmpy.devices import DebugConsole, DebugExit
from linux_images import HEADER_END, KERNEL, BzImageFile, pack, vmlinux, xen_note

# Prints what follows a pointer, up to a zero byte. For 32 and 64 bits alike; `{p}` is the prefix of a pointer.
PRINT = """
print:
    mov al, [{p}si]
    test al, al
    jz 1f
    out 0xe9, al
    inc {p}si
    jmp print
1:  ret
"""
LEAVE = "    xor eax, eax\n    out 0xf4, al\n    hlt\n"

# From boot_params in (R/E)SI: "HdrS", then the command line, then the initrd; all on the loader's stack, and with the
# segments loaded anew from the loader's GDT.
BOOT_PARAMS = """
entry:
    mov ax, 0x18
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov {p}bx, {p}si
    mov eax, [{p}bx + 0x202]
    mov [{p}bx + 0xf00], eax
    lea {p}si, [{p}bx + 0xf00]
    call print
    mov esi, [{p}bx + 0x228]
    call print
    mov esi, [{p}bx + 0x218]
    call print
"""


def code(source: str, bits: int, address: int = KERNEL) -> bytes:
    prefix = {16: "", 32: "e", 64: "r"}[bits]
    program = (source + LEAVE + PRINT).format(p=prefix)
    return assemble(f".intel_syntax noprefix\n{program}", address=address, bits=bits)


def run(kernel: LinuxKernel) -> str:
    with Machine(memory=32 * MiB, irqchip=False) as machine:
        machine.memory.fill(0, 32 * MiB, 0xCC)
        console = machine.add(DebugConsole())
        machine.add(DebugExit())
        machine.load(kernel)
        outcome = machine.run(timeout=20)
        assert outcome.end is End.EXITED, (outcome, console.text)
        return console.text


INITRD = b"+initrd\0"


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_an_unpacked_kernel_finds_its_parameters(bits: int, packed: bool) -> None:
    file = vmlinux(bits=bits, code=code(BOOT_PARAMS, bits))
    if packed:
        file = BzImageFile(payload=pack(file), lies={} if bits == 64 else {"xloadflags": 0}).to_bytes()
    assert run(LinuxKernel(file, cmdline="-quiet", initrd=INITRD)) == "HdrS-quiet+initrd"


@pytest.mark.parametrize("entry", ["32", "64"])
def test_a_decompressor_is_entered_at_its_two_entry_points(entry: str) -> None:
    first, second = code(BOOT_PARAMS, 32), code(BOOT_PARAMS, 64, KERNEL + 0x200)
    image = BzImageFile(first.ljust(0x200, b"\xcc") + second).to_bytes()
    kernel = LinuxKernel(image, cmdline="-quiet", initrd=INITRD, entry=entry)  # type: ignore[arg-type]
    assert run(kernel) == "HdrS-quiet+initrd"


def test_a_pvh_kernel_finds_its_start_info() -> None:
    # magic ("x" and more), then the command line, then the first module.
    source = """
        mov esi, ebx
        mov eax, [ebx]
        out 0xe9, al
        mov esi, [ebx + 24]
        call print
        mov edi, [ebx + 16]
        mov esi, [edi]
        call print
    """
    file = vmlinux(code=code(source, 32), note=xen_note(KERNEL))
    assert run(LinuxKernel(file, entry="pvh", cmdline="-quiet", initrd=INITRD)) == "x-quiet+initrd"


def test_setup_code_goes_from_real_mode_into_the_kernel_as_linux_does() -> None:
    # CS is 0x20 paragraphs above the others. It uses its stack, prints the command line, which is 0xe000 bytes above
    # DS, and jumps to code32_start with flat segments and ESI = 0, where the "kernel" leaves.
    setup = f"""
        .intel_syntax noprefix
        jmp setup
        .org {HEADER_END - 0x200}
    setup:
        push word ptr 0x1234
        pop bx
        mov si, 0xe000
    next:
        lodsb
        out 0xe9, al
        test al, al
        jnz next
        xor eax, eax
        mov ax, ds
        shl eax, 4
        lea ecx, [eax + gdt + 0x200]
        mov [gdt_base + 0x200], ecx
        lgdt [gdt_limit + 0x200]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        mov ax, 0x18
        mov dx, ds
        mov ds, ax
        movzx edx, dx
        shl edx, 4
        .byte 0x66, 0xea    # jmp far 0x10:KERNEL, with 32 bits
        .long {KERNEL:#x}
        .word 0x10
    gdt_limit: .word 31
    gdt_base: .long 0
    gdt: .quad 0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
    """
    # The code begins 0x200 bytes into the segment of the data.
    assembled = assemble(setup, address=0, bits=16)
    kernel = code("    mov ss, ax\n    mov esp, 0x70000\n    mov esi, [edx + 0x218]\n    call print\n", 32)
    image = BzImageFile(kernel, setup=assembled[HEADER_END - 0x200 :]).to_bytes()
    text = run(LinuxKernel(image, entry="real", cmdline="quiet", initrd=INITRD))
    assert text == "quiet\0+initrd"
