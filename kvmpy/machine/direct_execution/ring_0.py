"""Our own ring 0 in the guest: descriptor tables, and the little code that brings exceptions of ring 3 out.

KVM emulates it, a microsecond an instruction. Each handler is an OUT, at which KVM_RUN comes back, and an IRETQ. Only
CLI and STI are done there and then.
"""

from __future__ import annotations

import struct

from kvmpy.machine.direct_execution.context import BASE, FLAGS, GDT, IDT, PAGE, PENDING, RETURN, STACK, STUBS, TSS

__all__ = [
    "CLEAR_CODE",
    "CODE_0",
    "CODE_3",
    "DATA_0",
    "DATA_3",
    "HLT_CODE",
    "IRETQ_CODE",
    "STUB_CODE",
    "TASK",
    "TSS_LIMIT",
    "write_ring_0",
]

STUB_CODE, IRETQ_CODE = BASE + STUBS * PAGE, BASE + RETURN * PAGE
"""16 bytes for each vector, which begin with the OUT; and the way back."""
CLEAR_CODE, HLT_CODE, _GP_CODE = IRETQ_CODE + 16, IRETQ_CODE + 64, IRETQ_CODE + 256
"""Clears entries of page tables, RCX of them, whose addresses are at RSI; waits for an interrupt."""
CODE_0, DATA_0, DATA_3, CODE_3, TASK = 0x10, 0x18, 0x2B, 0x33, 0x40
"""Selectors. Ring 3 has the host's, whatever is said here."""
TSS_LIMIT = 0x68 + 0x2000
_PORT = 0xE7
_ERROR_CODES = frozenset((8, 10, 11, 12, 13, 14, 17, 21))
_GP = 13


def write_ring_0(data: memoryview) -> None:
    """Write all that into the area of direct execution."""
    tss, top = BASE + TSS * PAGE, BASE + (STACK + 1) * PAGE
    gdt = [0] * 16
    gdt[CODE_0 >> 3], gdt[DATA_0 >> 3] = 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
    gdt[CODE_3 >> 3], gdt[DATA_3 >> 3] = 0x00AF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF
    gdt[TASK >> 3] = 0x0000_8B00_0000_0000 | TSS_LIMIT | (tss & 0xFF_FFFF) << 16 | (tss >> 24 & 0xFF) << 56
    gdt[(TASK >> 3) + 1] = tss >> 32
    struct.pack_into("<16Q", data, GDT * PAGE, *gdt)
    for vector in range(256):
        stub = _GP_CODE if vector == _GP else STUB_CODE + 16 * vector
        gate = (stub & 0xFFFF, CODE_0, 0, 0xEE, stub >> 16 & 0xFFFF, stub >> 32, 0)
        struct.pack_into("<HHBBHII", data, IDT * PAGE + 16 * vector, *gate)
        drop_error_code = b"\x48\x83\xc4\x08" if vector in _ERROR_CODES else b""
        _write(data, STUB_CODE + 16 * vector, bytes((0xE6, _PORT)) + drop_error_code + b"\x48\xcf")
    struct.pack_into("<IQQQ", data, TSS * PAGE, 0, top, top, top)
    struct.pack_into("<H", data, TSS * PAGE + 0x66, 0x68)  # all ports are free: IN and OUT come out as they are
    data[TSS * PAGE + TSS_LIMIT] = 0xFF
    _write(data, IRETQ_CODE, b"\x48\xcf")
    # lodsq; mov qword [rax], 0; dec rcx; jnz; mov rax, cr3; mov cr3, rax; out
    clear = bytes.fromhex("48ad 48c70000000000 48ffc9 75f2 0f20d8 0f22d8") + bytes((0xE6, _PORT))
    _write(data, CLEAR_CODE, clear)
    _write(data, HLT_CODE, b"\xfb\xf4\xeb\xfc")  # sti; hlt; jmp back
    _write(data, _GP_CODE, _general_protection())


def _write(data: memoryview, linear: int, code: bytes) -> None:
    data[linear - BASE : linear - BASE + len(code)] = code


def _general_protection() -> bytes:
    """CLI and STI for which there is no stand-in, so that KVM need not come out."""
    out = bytearray()

    def add(code: str) -> int:
        """Answers where the last byte is, if that is the distance of a jump."""
        out.extend(bytes.fromhex(code))
        return len(out) - 1

    def add_with_cell(code: str, place: int, tail: str) -> None:
        add(code)
        end = _GP_CODE + len(out) + 4 + len(bytes.fromhex(tail))
        out.extend(struct.pack("<i", BASE + place - end) + bytes.fromhex(tail))

    add("50 488b442410 8a00")  # push rax; mov rax, [rsp + 16]; mov al, [rax]
    to_cli = add("3cfa 7400")  # cmp al, CLI; je
    others = [add("3cfb 7500")]  # cmp al, STI; jne
    others.append(add("488b442410 807801f4 7400"))  # mov rax, [rsp + 16]; cmp byte [rax + 1], HLT; je
    add_with_cell("803d", 8 * PENDING, "00")  # cmp byte [pending], 0; jne
    others.append(add("7500"))
    add_with_cell("c605", 8 * FLAGS + 1, "02")  # mov byte [flags + 1], 2
    done = len(out)
    add("48ff442410 58 4883c408 48cf")  # inc qword [rsp + 16]; pop rax; add rsp, 8; iretq
    out[to_cli] = len(out) - to_cli - 1
    add_with_cell("c605", 8 * FLAGS + 1, "00")
    out.extend((0xEB, done - len(out) - 2 & 0xFF))
    for jump in others:
        out[jump] = len(out) - jump - 1
    add("58 e9")  # pop rax; jmp to the usual stub
    out.extend(struct.pack("<i", STUB_CODE + 16 * _GP - (_GP_CODE + len(out) + 4)))
    return bytes(out)
