"""Instructions in software, for hosts whose KVM gives up on some (KVM_EXIT_INTERNAL_ERROR, suberror 1).

A KVM that runs ring 0 in its own instruction emulator knows only what that knows. `perform` finishes the one
instruction that it stopped at, from the processor's state, and the guest goes on. One row of the table for each
instruction (`kvmpy.x86.emulator.table`); it is no second emulator: what KVM can do, it does.
"""

from __future__ import annotations

from functools import cache

from kvmpy.x86.emulator import (
    bit_manipulation,
    far_return,
    legacy_integer,
    locked,
    software_interrupts,
    system,
    table,
    undefined,
    vector_512,
    vector_cipher,
    vector_elements,
    vector_integer,
    vector_moves,
    vector_shifts,
    vector_shuffles,
    x87_control,
    x87_environment,
    x87_moves,
    xsave,
)
from kvmpy.x86.emulator.guest_exception import GuestException, SoftwareInterrupt
from kvmpy.x86.emulator.processor import RFLAGS, RIP, Operands, Processor
from kvmpy.x86.emulator.table import Row, UnknownInstruction
from kvmpy.x86.instruction import Instruction, TruncatedInstruction

__all__ = [
    "GuestException", "Operands", "Processor", "Row", "SoftwareInterrupt", "TruncatedInstruction",
    "UnknownInstruction", "decode", "perform",
]  # fmt: skip

_FAMILIES = (
    bit_manipulation, far_return, legacy_integer, locked, software_interrupts, system, undefined, vector_512,
    vector_cipher, vector_elements, vector_integer, vector_moves, vector_shifts, vector_shuffles, x87_control,
    x87_environment, x87_moves, xsave,
)  # fmt: skip
"""The modules whose rows make the table: what kernels meet."""

_OTHERS = (
    "mmx", "opmasks", "vector_512_conversions", "vector_512_floating", "vector_512_moves", "vector_512_packed",
    "vector_512_scalars", "vector_conversions", "vector_floating", "vector_hash", "vector_strings", "x87_arithmetic",
    "x87_comparison",
)  # fmt: skip
"""Modules with more rows, loaded when the first instruction comes that is not in the others: that takes 30 ms."""

_UD = 6
_RF = 1 << 16


@cache
def _load_the_others() -> None:
    from importlib import import_module

    for name in _OTHERS:
        import_module(f"{__name__}.{name}")


def decode(code: bytes, bits: int) -> tuple[Row, Instruction]:
    """The row and the decoded form of the instruction at the start of `code`, in `bits`-bit code.

    Raises UnknownInstruction, or TruncatedInstruction.
    """
    try:
        return table.decode(code, bits)
    except UnknownInstruction:
        _load_the_others()
        return table.decode(code, bits)


def perform(cpu: Processor, code: bytes, bits: int) -> Row:
    """Do the instruction at the start of `code`, which stands at RIP in `bits`-bit code, and step over it.

    Registers change in `cpu.general`, `cpu.sregs` and `cpu.extended_state()`; memory at once. Raises GuestException or
    SoftwareInterrupt for the event that the guest is to get; nothing has changed then, except that RIP is behind the
    instruction for a SoftwareInterrupt. Raises UnknownInstruction where the table has no row, or none for what the
    instruction would do here, TruncatedInstruction when `code` ends too soon.
    """
    row, it = decode(code, bits)
    if it.lock and not (row.lockable and it.memory is not None):
        raise GuestException.of(_UD)
    general = cpu.general
    following = general[RIP] + it.length & (1 << bits if bits == 64 else 1 << 32) - 1
    before = list(general)
    operands = Operands(cpu, it)
    general[RFLAGS] &= ~_RF  # before: IRET may set it
    try:
        row.execute(operands)
    except SoftwareInterrupt:
        general[RIP], general[RFLAGS] = following, before[RFLAGS]
        raise
    except (GuestException, UnknownInstruction):
        general[:] = before
        raise
    general[RIP] = following if operands.target is None else operands.target
    return row
