"""Flat binaries in every mode they can start in, and boot sectors."""

from pathlib import Path

import pytest

from gnu_toolchain import assemble, assemble_with_symbols
from kvmpy import End, Machine, MiB
from kvmpy.boot import FlatImage
from kvmpy.devices import DebugConsole
from kvmpy.errors import ImageError

KIB = 1024

HELLO = """
    call 1f                         # pushes: the stack is there
    hlt
1:  mov esi, offset text
    mov ecx, {length}
    mov edx, 0xe9
    cld
    rep outsb
    ret
text: .ascii "{text}"
"""


def hello(mode: str, bits: int, address: int) -> bytes:
    text = f"hello from {mode} mode"
    return assemble(HELLO.format(text=text, length=len(text)), bits=bits, address=address)


@pytest.mark.parametrize("irqchip", [False, True], ids=["", "irqchip"])
@pytest.mark.parametrize(
    ("mode", "bits", "address"),
    [
        ("real", 16, 0x1000),
        ("real", 16, 0x8000),
        ("protected16", 16, 0x1000),
        ("protected", 32, 0x1000),
        ("protected", 32, 2 * MiB),
        ("long", 64, 0x1000),
        ("long", 64, 2 * MiB + 0x10),
    ],
)
def test_a_flat_binary_says_hello_in_its_mode(mode: str, bits: int, address: int, irqchip: bool) -> None:
    code = hello(mode, bits, address)
    with Machine(memory=4 * MiB, irqchip=irqchip) as machine:
        console = machine.add(DebugConsole())
        machine.load(FlatImage(code, address=address, mode=mode))
        assert machine.run(timeout=5).end is End.HALTED
        assert console.text == f"hello from {mode} mode"


def test_long_mode_code_above_4_gib_runs() -> None:
    address = 0x1_0010_0000
    code = assemble('lea rsi, [rip + text]; mov ecx, 5; mov edx, 0xe9; rep outsb; hlt; text: .ascii "above"', bits=64)
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        machine.vm.add_ram(0x1_0000_0000, size=2 * MiB)
        console = machine.add(DebugConsole())
        machine.load(FlatImage(code, address=address, mode="long"))
        assert machine.run(timeout=5).end is End.HALTED
        assert console.text == "above"
        assert machine.vcpus[0].regs.rip > address


def test_a_long_mode_guest_may_load_segment_registers_at_once() -> None:
    code = assemble("mov ax, ss; mov ds, ax; mov es, ax; str [0x2000]; mov [0x2002], ax; hlt", bits=64)
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        machine.load(FlatImage(code, mode="long"))
        assert machine.run(timeout=5).end is End.HALTED
        assert machine.memory.read_u16(0x2000) != 0  # a task register that is loaded
        assert machine.memory.read_u16(0x2002) == 0x10


def test_execution_starts_at_the_entry_that_is_named() -> None:
    code, symbols = assemble_with_symbols("mov al, 'a'; out 0xe9, al; hlt; second: mov al, 'b'; out 0xe9, al; hlt")
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        console = machine.add(DebugConsole())
        machine.load(FlatImage(code, entry=symbols["second"]))
        machine.run(timeout=5)
        assert console.text == "b"


def test_the_stack_is_where_the_caller_wants_it() -> None:
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        machine.load(FlatImage(assemble("mov eax, 0x12345678; push eax; hlt", bits=32), mode="protected", stack=0x3000))
        machine.run(timeout=5)
        assert machine.memory.read_u32(0x2FFC) == 0x1234_5678
        assert machine.vcpus[0].regs.rsp == 0x2FFC


BOOT_SECTOR = """
    mov [0x600], dl                 # the drive
    mov [0x602], cs
    mov [0x604], sp
    call 1f
1:  pop ax
    mov [0x606], ax                 # where this runs
    mov si, offset text
    mov cx, 4
    mov dx, 0xe9
    cld
    rep outsb
    hlt
text: .ascii "boot"
    .org 510
    .byte 0x55, 0xaa
"""


def test_a_boot_sector_runs_at_0x7c00_with_the_drive_in_dl() -> None:
    sector = assemble(BOOT_SECTOR, address=0x7C00)
    assert len(sector) == 512
    with Machine(memory=1 * MiB, irqchip=False) as machine:
        console = machine.add(DebugConsole())
        machine.load(FlatImage(sector))
        assert machine.run(timeout=5).end is End.HALTED
        assert console.text == "boot"
        assert machine.memory.read_u8(0x600) == 0x80
        assert machine.memory.read_u16(0x602) == 0
        assert machine.memory.read_u16(0x606) == 0x7C0F
        assert machine.memory.read(0x7C00, 512) == sector


def test_without_the_signature_it_is_no_boot_sector() -> None:
    code = assemble("mov [0x600], dl; call 1f; 1: pop ax; mov [0x606], ax; hlt; .org 511; .byte 0xaa")
    with Machine(memory=1 * MiB, irqchip=False) as machine:
        machine.load(FlatImage(code))
        machine.run(timeout=5)
        assert machine.memory.read_u8(0x600) == 0
        assert machine.memory.read_u16(0x606) == 0x1007


def test_a_file_is_loaded_like_bytes(tmp_path: Path) -> None:
    path = tmp_path / "guest.bin"
    path.write_bytes(assemble("mov al, 'f'; out 0xe9, al; hlt"))
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        console = machine.add(DebugConsole())
        machine.load(FlatImage(path))
        machine.run(timeout=5)
        assert console.text == "f"


def test_an_image_can_be_loaded_again_to_start_afresh() -> None:
    image = FlatImage(assemble("inc byte ptr [count]; mov al, [count]; out 0xe9, al; hlt; count: .byte '0'"))
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        console = machine.add(DebugConsole())
        for _ in range(3):
            machine.load(image)
            assert machine.run(timeout=5).end is End.HALTED
        assert console.text == "111"


def test_a_long_mode_image_that_leaves_no_room_for_its_tables_is_refused() -> None:
    with Machine(memory=32 * KIB, irqchip=False) as machine, pytest.raises(ImageError, match="tables"):
        machine.load(FlatImage(b"\xf4", mode="long"))
