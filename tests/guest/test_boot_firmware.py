"""A ROM of our own, from the reset vector on. (SeaBIOS is in test_seabios.py.)"""

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Machine, MiB, OverlapError, Vm
from kvmpy.boot import FirmwareImage
from kvmpy.devices import DebugConsole, PostPort

# Linked for offset 0 of segment F000. The processor's first instruction is the far jump, 16 bytes before the end.
ROM = """
start:
    {code}
    hlt
print:                              # CS:SI, CX bytes
    mov dx, 0xe9
    cld
    rep outs dx, byte ptr cs:[si]
    ret
text: .ascii "from the reset vector"
length = . - text
    .org 0xfff0
reset:
    .byte 0xea                      # jmp far 0xf000:start
    .word start, 0xf000
    .org 0xfff8
    .ascii "01/01/70"
"""


def rom(code: str) -> bytes:
    image = assemble(ROM.format(code=code), address=0)
    assert len(image) == 0x10000
    return image


def test_a_64_kib_rom_starts_at_the_reset_vector() -> None:
    image = rom("mov al, 0x11; out 0x80, al; mov si, offset text; mov cx, offset length; mov sp, 0x7000; call print")
    with Machine(memory=1 * MiB, irqchip=False) as machine:
        console = machine.add(DebugConsole())
        post = machine.add(PostPort())
        machine.load(FirmwareImage(image))
        assert machine.vcpus[0].regs.rip == 0xFFF0
        assert machine.run(timeout=5).end is End.HALTED
        assert console.text == "from the reset vector"
        assert post.codes == (0x11,)
        assert machine.vcpus[0].sregs.cs.base == 0xF0000  # the far jump left the ROM under 4 GiB


def test_a_rom_that_was_mapped_from_the_start_is_the_one_that_is_loaded() -> None:
    image = FirmwareImage(rom("mov al, 0x33; out 0x80, al"))
    with Machine(memory=1 * MiB, rom=image.memory_needs()) as machine:
        post = machine.add(PostPort())
        (mapped,) = (region for region in machine.memory.regions if region.read_only)
        machine.load(image)
        assert [region for region in machine.memory.regions if region.read_only] == [mapped]
        assert machine.run(timeout=5).end is End.HALTED
        assert post.codes == (0x33,)
        with pytest.raises(OverlapError, match="firmware ROM"):
            machine.load(FirmwareImage(rom("nop")))


def test_all_memory_is_there_before_the_interrupt_controllers(monkeypatch: pytest.MonkeyPatch) -> None:
    # After them KVM lets a change of memory wait for some ticks of the host's clock (SRCU), 5 to 10 ms.
    image, create = FirmwareImage(rom("")), Vm.create_irqchip
    mapped: list[str] = []

    def create_irqchip(vm: Vm) -> None:
        mapped.extend(region.name for region in vm.memory.regions)
        create(vm)

    monkeypatch.setattr(Vm, "create_irqchip", create_irqchip)
    with Machine(memory=1 * MiB, rom=image.memory_needs()) as machine:
        machine.load(image)
        assert mapped == ["RAM", "firmware ROM"] == [region.name for region in machine.memory.regions]


def test_a_rom_runs_before_its_jump_from_below_4_gib() -> None:
    image = bytearray(rom(""))
    image[0xFFF0:0x10000] = b"\xb0\x22\xe6\x80\xf4".ljust(16, b"\xf4")  # mov al, 0x22; out 0x80, al; hlt
    image[0x0000:0xFFF0] = bytes(0xFFF0)
    with Machine(memory=1 * MiB, irqchip=False) as machine:
        post = machine.add(PostPort())
        machine.load(FirmwareImage(bytes(image)))
        assert machine.run(timeout=5).end is End.HALTED
        assert post.codes == (0x22,)
        assert machine.vcpus[0].sregs.cs.base == 0xFFFF_0000


def test_the_rom_cannot_be_written_and_its_copy_under_1_mib_can() -> None:
    # Flat 4 GiB data segments without leaving real mode: load a limit in protected mode and come back.
    image = rom("""
        lgdt cs:[gdtr]
        mov eax, cr0; or al, 1; mov cr0, eax
        mov bx, 8; mov ds, bx
        and al, 0xfe; mov cr0, eax
        mov ebx, 0xffff8000; mov byte ptr [ebx], 0x77
        mov al, [ebx]; out 0x80, al
        mov ebx, 0x000f8000; mov byte ptr [ebx], 0x77
        mov al, [ebx]; out 0x80, al
        hlt
    gdtr: .word 15; .long gdt + 0xf0000
    gdt: .quad 0, 0x008f92000000ffff""")
    with Machine(memory=1 * MiB, irqchip=False) as machine:
        post = machine.add(PostPort())
        machine.load(FirmwareImage(image))
        assert machine.run(timeout=5).end is End.HALTED
        assert post.codes == (0x00, 0x77)
        assert machine.memory.read_u8(0xFFFF_8000) == 0x00
        assert machine.memory.read_u8(0xF_8000) == 0x77
        assert [(entry.kind, entry.direction, entry.address) for entry in machine.statistics().unclaimed] == [
            ("mmio", "write", 0xFFFF_8000)
        ]


def test_firmware_sees_the_registers_of_a_reset() -> None:
    image = rom("xor ax, ax; mov ds, ax; mov [0x600], edx; mov ecx, cr0; mov [0x604], ecx; pushfd; pop [0x608]")
    with Machine(memory=1 * MiB, irqchip=False) as machine:
        machine.load(FirmwareImage(image))
        assert machine.run(timeout=5).end is End.HALTED
        assert machine.memory.read_u32(0x600) == 0x600
        assert machine.memory.read_u32(0x604) & 0x8000_0001 == 0  # neither paging nor protection
