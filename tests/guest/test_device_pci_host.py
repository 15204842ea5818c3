"""PCI configuration space by ports 0xCF8 and 0xCFC, as guests walk it."""

from gnu_toolchain import assemble
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import HostBridge, PciHostBridge

KIB = 1024

READ_CONFIG = """
read_config:                        # EAX: address, becomes the dword there
    mov dx, 0xcf8
    out dx, eax
    mov dx, 0xcfc
    in eax, dx
    ret
"""


def run(source: str, pci: PciHostBridge) -> Machine:
    image = FlatImage(assemble(source))
    machine = Machine(memory=64 * KIB, irqchip=False)
    machine.add(pci)
    machine.load(image)
    assert machine.run(timeout=5).end is End.HALTED
    return machine


def test_mechanism_1_is_there_and_shows_the_440fx() -> None:
    source = f"""
        mov dx, 0xcf8; mov eax, 0x80000000; out dx, eax
        in eax, dx; mov [0x2000], eax                       # the enable bit stays: mechanism 1
        mov eax, 0x80000000; call read_config; mov [0x2004], eax
        mov eax, 0x80000008; call read_config; mov [0x2008], eax
        mov dx, 0xcfe; mov eax, 0x80000000; call 1f; in ax, dx; mov [0x200c], ax    # a word in the middle
        mov dx, 0xcff; mov eax, 0x80000008; call 1f; in al, dx; mov [0x200e], al    # a byte
        hlt
    1:  push dx; mov dx, 0xcf8; out dx, eax; pop dx; ret
        {READ_CONFIG}"""
    with run(source, PciHostBridge()) as machine:
        assert machine.memory.read_u32(0x2000) == 0x8000_0000
        assert machine.memory.read_u32(0x2004) == 0x1237_8086
        assert machine.memory.read_u32(0x2008) >> 16 == 0x0600
        assert machine.memory.read_u16(0x200C) == 0x1237
        assert machine.memory.read_u8(0x200E) == 0x06


WALK = f"""
    mov di, 0x2000
    mov ebx, 0x80000000
1:  mov eax, ebx
    call read_config
    cmp eax, 0xffffffff
    je 2f
    mov [di], ebx
    mov [di + 4], eax
    add di, 8
2:  add ebx, 0x800                  # the next of 32 devices, and of the buses after them
    cmp ebx, 0x80020000
    jb 1b
    hlt
    {READ_CONFIG}
"""


def test_a_walk_over_two_buses_finds_what_is_there_and_nothing_else() -> None:
    pci = PciHostBridge()
    pci.functions[1, 31, 0] = HostBridge()
    with run(WALK, pci) as machine:
        found = [machine.memory.read_u32(0x2000 + 4 * at) for at in range(6)]
        assert found == [0x8000_0000, 0x1237_8086, 0x8001_F800, 0x1237_8086, 0, 0]
        assert not machine.statistics().unclaimed


def test_a_machine_without_pci_answers_all_ones() -> None:
    with run(WALK, PciHostBridge(present=False)) as machine:
        assert machine.memory.read(0x2000, 8) == bytes(8)
        assert not machine.statistics().unclaimed


def test_without_the_enable_bit_nothing_answers() -> None:
    source = f"xor eax, eax; call read_config; mov [0x2000], eax; hlt; {READ_CONFIG}"
    with run(source, PciHostBridge()) as machine:
        assert machine.memory.read_u32(0x2000) == 0xFFFF_FFFF


def test_registers_of_the_chip_keep_what_is_written_and_its_identity_does_not() -> None:
    source = f"""
        mov eax, 0x80000058; call read_config               # PAM registers
        mov eax, 0x33221100; out dx, eax
        mov dx, 0xcfd; mov al, 0x77; out dx, al
        mov dx, 0xcfc; in eax, dx; mov [0x2000], eax
        mov eax, 0x80000000; call read_config
        xor eax, eax; out dx, eax; in eax, dx; mov [0x2004], eax
        hlt
        {READ_CONFIG}"""
    with run(source, PciHostBridge()) as machine:
        assert machine.memory.read_u32(0x2000) == 0x3322_7700
        assert machine.memory.read_u32(0x2004) == 0x1237_8086


def test_the_reset_register_resets_on_the_rise_of_its_bit() -> None:
    source = "mov dx, 0xcf9; mov al, 2; out dx, al; in al, dx; mov [0x2000], al; mov al, 6; out dx, al; 1: jmp 1b"
    image = FlatImage(assemble(source))
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        machine.add(PciHostBridge())
        machine.load(image)
        outcome = machine.run(timeout=5)
        assert outcome.end is End.RESET
        assert "0xcf9" in outcome.message
        assert machine.memory.read_u8(0x2000) == 2
