"""Every entry state runs on the real KVM, and the guest proves from inside which mode it is in.

`WIDTH` tells the modes apart by their decoding: in 64-bit code 48 is a REX prefix, elsewhere `dec eax`; and the same
`out` writes 2 bytes in a 16-bit segment, 4 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from gnu_toolchain import assemble
from kvmpy import Hlt, IoOut, Kvm, MiB, Shutdown, Vcpu, Vm
from kvmpy.exits import Exit
from kvmpy.x86 import long_mode, modes, protected_mode
from kvmpy.x86.flags import Cr0, Cr4, Efer
from kvmpy.x86.page_tables import PageTables
from kvmpy.x86.paging import PagingMode
from kvmpy.x86.registers import CpuState

CODE, STACK, TABLES = 0x1000, 0x9000, 0x40000
WIDTH = bytes.fromhex("48 90 e7 10 f4")  # rex.w nop / dec eax; nop - out 0x10, eax - hlt
WIDTH_OF_16, WIDTH_OF_32, WIDTH_OF_64 = b"\xff\xff", b"\xff\xff\xff\xff", b"\0\0\0\0"


def run(vm: Vm, state: CpuState) -> tuple[list[bytes], Exit, Vcpu]:
    """What the guest wrote to ports until it did something else, that, and the vCPU."""
    vcpu = vm.create_vcpu()
    vcpu.set_cpuid(vm.kvm.supported_cpuid())
    vcpu.set_cpu_state(state)
    written: list[bytes] = []
    for event in vcpu.exits(timeout=5):
        if not isinstance(event, IoOut):
            return written, event, vcpu
        written.append(event.data)
    raise AssertionError("exits() ends only by leaving it")


def numbers(written: list[bytes]) -> list[int]:
    return [int.from_bytes(data, "little") for data in written]


def program(source: str, bits: int, address: int = CODE) -> bytes:
    """`source`, in which `tell` writes EAX (AX in 16-bit code) to a port. It must not depend on its address."""
    register = "ax" if bits == 16 else "eax"
    return assemble(f".macro tell; out 0x10, {register}; .endm\n{source}\nhlt", address=address, bits=bits)


# Real mode

PLACES = {
    "low": ({"entry": 0x7C00}, 0x7C00),
    "first byte": ({"entry": 0}, 0),
    "beyond 64 KiB": ({"entry": 0x1_2345}, 0x1_2345),
    "segment and offset": ({"segment": 0x07C0, "offset": 0}, 0x7C00),
    "odd segment": ({"segment": 0x1235, "offset": 0x0F77}, 0x1235 * 16 + 0xF77),
    "last segment, above 1 MiB": ({"segment": 0xFFFF, "offset": 0x1000}, 0xFFFF0 + 0x1000),
    "data elsewhere": ({"segment": 0x0100, "offset": 0x10, "data_segment": 0x0333}, 0x1010),
    "odd stack": ({"entry": 0x7C00, "stack": 0x2_3457}, 0x7C00),
    "stack at zero": ({"entry": 0x7C00, "stack": 0}, 0x7C00),
    "stack at the top": ({"entry": 0x7C00, "stack": 0x10_FFF0}, 0x7C00),
}


@pytest.mark.parametrize("place", PLACES)
def test_real_mode_at(place: str) -> None:
    arguments, linear = PLACES[place]
    state = modes.real_mode(**arguments)
    source = """
        mov eax, cr0; tell
        mov ax, cs; tell
        mov ax, ds; tell; mov ax, es; tell; mov ax, fs; tell; mov ax, gs; tell
        mov ax, ss; tell
        mov ax, sp; tell
        call here
    here: pop ax; tell
        push 0x1234
        mov al, [0x20]; tell"""
    code = program(source, 16, 0)
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=2 * MiB)
        vm.memory.write(linear, code)
        data = 16 * arguments.get("data_segment", state.sregs.cs.selector) + 0x20
        expected_byte = vm.memory.read_u8(data)
        written, end, vcpu = run(vm, state)
        assert end == Hlt()
        sregs, regs = state.sregs, state.regs
        here = code.index(bytes.fromhex("58 e7"), 24)  # pop ax; out
        assert numbers(written) == [
            sregs.cr0 & 0xFFFF, sregs.cs.selector, *[sregs.ds.selector] * 4, sregs.ss.selector, regs.rsp,
            (regs.rip + here) & 0xFFFF, (regs.rip + here) & 0xFF00 | expected_byte,
        ]  # fmt: skip
        assert not sregs.cr0 & Cr0.PE
        top = sregs.ss.base + (regs.rsp - 2 & 0xFFFF)
        assert vm.memory.read_u16(top) == 0x1234
        stack = arguments.get("stack", linear & ~0xF)
        assert top == stack - 2 or stack == 0 or "stack" not in arguments
        assert vcpu.regs.rip == (regs.rip + len(code)) & 0xFFFF


def test_real_mode_decodes_16_bit_code() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x10000)
        vm.memory.write(CODE, WIDTH)
        assert run(vm, modes.real_mode(CODE))[:2] == ([WIDTH_OF_16], Hlt())


def test_the_reset_vector_fetches_from_the_top_of_4_gib() -> None:
    rom = bytearray(b"\xf4" * 0x1_0000)
    start = program("mov ax, cs; tell; mov ax, dx; tell; mov ax, cs:[0xfff8]; tell", 16, 0)
    rom[0x8000 : 0x8000 + len(start)] = start
    rom[0xFFF0:0xFFF3] = b"\xe9" + (0x8000 - 0xFFF3 & 0xFFFF).to_bytes(2, "little")
    rom[0xFFF8:0xFFFA] = b"\x5a\xa5"
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x1_0000)
        vm.add_rom(0xFFFF_0000, bytes(rom))
        written, end, vcpu = run(vm, modes.reset_vector(signature=0x0619))
        assert end == Hlt()
        assert numbers(written) == [0xF000, 0x0619, 0xA55A]
        assert vcpu.sregs.cs.base == 0xFFFF_0000


def test_a_far_jump_from_the_reset_vector_gives_the_usual_base() -> None:
    rom = b"\xf4" * 0xFFF0 + bytes.fromhex("ea 00 10 00 00") + bytes(11)
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x1_0000)
        vm.add_rom(0xFFFF_0000, rom)
        vm.memory.write(CODE, program("mov ax, cs; tell", 16))
        written, end, vcpu = run(vm, modes.reset_vector())
        assert (numbers(written), end) == ([0], Hlt())
        assert vcpu.sregs.cs.base == 0


# Protected mode

RING0_32 = """
    mov eax, cr0; tell
    mov eax, cs; tell; mov eax, ds; tell; mov eax, es; tell; mov eax, ss; tell
    mov eax, esp; tell
    str eax; tell
    mov eax, 0x12345678; push eax; pop ebx; mov eax, ebx; tell
    mov [0x9ff0], eax"""


@pytest.mark.parametrize("bits", [16, 32])
def test_protected_mode_without_tables(bits: int) -> None:
    code, width = {16: (modes.CODE16_SELECTOR, WIDTH_OF_16), 32: (modes.CODE_SELECTOR, WIDTH_OF_32)}[bits]
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x10000)
        vm.memory.write(CODE, WIDTH)
        state = modes.protected_mode(CODE, bits=bits, stack=STACK)
        assert run(vm, state)[:2] == ([width], Hlt())
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x10000)
        vm.memory.write(CODE, assemble(RING0_32.replace("tell", "out 0x10, eax") + "\nhlt", address=CODE, bits=bits))
        written, end, _ = run(vm, state)
        data = modes.DATA_SELECTOR
        assert end == Hlt()
        assert numbers(written) == [
            state.sregs.cr0, code, data, data, data, STACK, modes.TSS_SELECTOR, 0x1234_5678
        ]  # fmt: skip
        assert state.sregs.cr0 & (Cr0.PE | Cr0.PG) == Cr0.PE
        assert vm.memory.read_u32(0x9FF0) == 0x1234_5678


def test_16_bit_protected_mode_above_64_kib_has_a_segment_of_its_own() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x40000)
        vm.memory.write(0x2_3456, WIDTH)
        written, end, vcpu = run(vm, modes.protected_mode(0x2_3456, bits=16, stack=STACK))
        assert (written, end) == ([WIDTH_OF_16], Hlt())
        assert (vcpu.sregs.cs.base, vcpu.regs.rip) == (0x2_3450, 0x6 + len(WIDTH))


def test_protected_mode_ring_3_uses_ports_by_the_bitmap_and_may_not_halt() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=MiB)
        vm.memory.write(CODE, program("mov eax, cs; tell; mov eax, ss; tell; str eax; tell; mov eax, esp; tell", 32))
        state = protected_mode.prepare(vm.memory, entry=CODE, tables=TABLES, stack=STACK, ring=3, ports=[(0x10, 4)])
        written, end, _ = run(vm, state)
        expected = [modes.USER_CODE32_SELECTOR, modes.USER_DATA_SELECTOR, modes.TSS_SELECTOR, STACK]
        assert (numbers(written), end) == (expected, Shutdown())  # hlt: #GP, and there is no IDT


def test_protected_mode_ring_3_without_tables_has_no_ports() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=0x10000)
        vm.memory.write(0x60, b"\xff" * 0x40)  # where a TSS at 0 would have its bitmap
        vm.memory.write(CODE, WIDTH)
        assert run(vm, modes.protected_mode(CODE, ring=3, stack=STACK))[:2] == ([], Shutdown())


@pytest.mark.parametrize("bits", [16, 32])
def test_prepared_protected_mode_can_load_its_selectors(bits: int) -> None:
    source = "mov ax, 0x10; mov ds, ax; mov es, ax; mov ss, ax; xor eax, eax; mov fs, eax; mov eax, ds; out 0x10, eax"
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=MiB)
        vm.memory.write(CODE, assemble(source + "; hlt", address=CODE, bits=bits))
        state = protected_mode.prepare(vm.memory, entry=CODE, tables=TABLES, stack=STACK, bits=bits)
        written, end, _ = run(vm, state)
        assert (numbers(written), end) == ([modes.DATA_SELECTOR], Hlt())


# Paging without long mode

SWITCH = """
    mov dword ptr [0x2000], {top}
    mov dword ptr [0x3000], 0x83
    mov eax, {cr4}; mov cr4, eax
    mov eax, 0x2000; mov cr3, eax
    mov eax, cr0; or eax, 0x80000000; mov cr0, eax
    hlt"""


@cache
def has_paging(mode: PagingMode) -> bool:
    """Whether a guest can switch 32-bit or PAE paging on by itself.

    With a KVM that has no VT-x or AMD-V below it (kvm_pvm) it cannot: MOV to CR0 gives #GP.
    """
    top, cr4 = {PagingMode.BITS32: (0x83, Cr4.PSE), PagingMode.PAE: (0x3001, Cr4.PAE)}[mode]
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=2 * MiB)
        vm.memory.write(CODE, assemble(SWITCH.format(top=top, cr4=int(cr4)), address=CODE, bits=32))
        return run(vm, modes.protected_mode(CODE, stack=STACK))[1] == Hlt()


@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("mode", [PagingMode.BITS32, PagingMode.PAE])
def test_32_bit_modes_with_paging(mode: PagingMode, ring: int) -> None:
    if not has_paging(mode):
        pytest.skip(f"this host's KVM runs no guest with {mode.value} (MOV to CR0 gives #GP)")
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=2 * MiB)
        source = "mov eax, cs; tell; mov eax, [0x9ff0]; tell" if ring else "mov eax, cr0; tell; mov eax, cr3; tell"
        vm.memory.write(CODE, program(source, 32))
        vm.memory.write_u32(0x9FF0, 0xCAFE_F00D)
        state = protected_mode.prepare(vm.memory, entry=CODE, tables=TABLES, stack=STACK, ring=ring, paging=mode)
        written, end, _ = run(vm, state)
        if ring:
            assert (numbers(written), end) == ([modes.USER_CODE32_SELECTOR, 0xCAFE_F00D], Shutdown())
        else:
            assert (numbers(written), end) == ([state.sregs.cr0, state.sregs.cr3], Hlt())
            assert state.sregs.cr0 & Cr0.PG


# Long mode

RING0_64 = """
    mov rax, cr0; tell
    mov rax, cr3; tell
    mov rax, cr4; tell
    mov ecx, 0xc0000080; rdmsr; tell
    mov eax, cs; tell; mov eax, ss; tell; str eax; tell
    push -2; pop rax; shr rax, 32; tell
    mov rax, rsp; tell"""


@pytest.mark.parametrize("levels", [4, 5])
def test_long_mode_ring_0(levels: int) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        if levels == 5 and not kvm.supported_cpuid().has("la57"):
            pytest.skip("this host's KVM has no 5-level paging")
        vm.add_ram(0, size=2 * MiB)
        vm.memory.write(CODE, program(RING0_64, 64))
        state = long_mode.prepare(vm.memory, entry=CODE, tables=TABLES, stack=STACK, levels=levels)
        written, end, _ = run(vm, state)
        sregs = state.sregs
        assert end == Hlt()
        assert numbers(written) == [
            sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer, modes.CODE_SELECTOR, modes.DATA_SELECTOR, modes.TSS_SELECTOR,
            0xFFFF_FFFF, STACK,
        ]  # fmt: skip
        assert sregs.efer & Efer.LMA
        assert bool(sregs.cr4 & Cr4.LA57) == (levels == 5)


@pytest.mark.parametrize(("bits", "width"), [(32, WIDTH_OF_32), (64, WIDTH_OF_64)])
@pytest.mark.parametrize("ring", [0, 3])
def test_long_mode_decodes_code_of_its_width(bits: int, width: bytes, ring: int) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=2 * MiB)
        vm.memory.write(CODE, WIDTH)
        state = long_mode.prepare(vm.memory, entry=CODE, tables=TABLES, stack=STACK, ring=ring, bits=bits)
        assert run(vm, state)[:2] == ([width], Shutdown() if ring else Hlt())


def test_long_mode_ring_3_is_unprivileged() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=2 * MiB)
        # The selectors' index may be the host's (kvm_pvm runs ring 3 on its own segments); the ring is not.
        source = "mov eax, cs; and eax, 3; tell; mov eax, ss; and eax, 3; tell; mov rax, rsp; tell; mov rax, cr0; tell"
        vm.memory.write(CODE, program(source, 64))
        state = long_mode.prepare(vm.memory, entry=CODE, tables=TABLES, stack=STACK, ring=3)
        written, end, _ = run(vm, state)
        assert (numbers(written), end) == ([3, 3, STACK], Shutdown())


@pytest.mark.parametrize("bits", [32, 64])
def test_long_mode_ring_3_uses_only_the_ports_of_its_bitmap(bits: int) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=2 * MiB)
        vm.memory.write(CODE, program("mov al, 7; out 0x20, al; out 0x21, al", bits))
        state = long_mode.prepare(
            vm.memory, entry=CODE, tables=TABLES, stack=STACK, ring=3, bits=bits, ports=[(0x20, 1)]
        )
        assert run(vm, state)[:2] == ([b"\x07"], Shutdown())


def test_compatibility_mode_reaches_its_data_and_its_tables() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=2 * MiB)
        source = "mov ax, 0x10; mov ds, ax; mov eax, cs; tell; push 0x1234; pop eax; tell; mov eax, [0x9ff0]; tell"
        vm.memory.write(CODE, program(source, 32))
        vm.memory.write_u32(0x9FF0, 0xCAFE_F00D)
        state = long_mode.prepare(vm.memory, entry=CODE, tables=TABLES, stack=STACK, bits=32)
        written, end, _ = run(vm, state)
        assert (numbers(written), end) == ([modes.CODE32_SELECTOR, 0x1234, 0xCAFE_F00D], Hlt())


def test_long_mode_at_a_high_address() -> None:
    high = 0xFFFF_FFFF_8000_0000
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=2 * MiB)
        vm.memory.write(CODE, program("lea rax, [rip]; shr rax, 32; tell; mov rax, rsp; tell", 64))
        pages = PageTables(vm.memory, PagingMode.LEVEL4, TABLES)
        pages.map(high, 0, 0x10000)
        written, end, _ = run(vm, modes.long_mode(high + CODE, pages.cr3, stack=high + STACK))
        assert (numbers(written), end) == ([0xFFFF_FFFF, 0x8000_9000], Hlt())


# The same states by the methods of a vCPU


def test_the_methods_of_a_vcpu_set_the_same_states() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0, size=2 * MiB)
        vm.memory.write(CODE, WIDTH)
        vcpu = vm.create_vcpu()
        ways: list[tuple[Callable[[], None], bytes]] = [
            (lambda: vcpu.set_real_mode(CODE), WIDTH_OF_16),
            (lambda: vcpu.set_protected_mode(CODE, bits=16, stack=STACK), WIDTH_OF_16),
            (lambda: vcpu.set_protected_mode(CODE, stack=STACK), WIDTH_OF_32),
            (lambda: vcpu.set_long_mode(CODE, tables=TABLES, stack=STACK), WIDTH_OF_64),
            (lambda: vcpu.set_real_mode(segment=CODE >> 4, offset=0), WIDTH_OF_16),
        ]
        for set_mode, width in ways:
            set_mode()
            event = vcpu.run(timeout=5)
            assert isinstance(event, IoOut)
            assert event.data == width
            assert vcpu.run(timeout=5) == Hlt()
