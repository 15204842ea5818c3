"""Addresses as one types them: numbers, symbols, registers, distances from these, and source lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.debug.source_place import is_source_line, source_line_address
from kvmpy.errors import UsageError
from kvmpy.x86.register_text import code_bits
from kvmpy.x86.registers import GENERAL_REGISTERS

if TYPE_CHECKING:
    from kvmpy.debug.symbols import SymbolTable
    from kvmpy.kvm import Vcpu
    from kvmpy.machine import Machine

__all__ = ["ADDRESS_REGISTERS", "resolve"]

_CONTROL = ("cr2", "cr3")

ADDRESS_REGISTERS = (*(name for name in GENERAL_REGISTERS if name != "rflags"), *_CONTROL)
"""The registers that `resolve` knows."""


def resolve(where: int | str, machine: Machine, vcpu: Vcpu) -> int:
    """The linear address for a number, "symbol", "register", these with "+distance" or "-distance", or "file:line".

    A symbol comes before a register of the same name. RIP counts from the base of CS, RSP from that of SS; a distance
    is decimal, or hex with 0x. Raises UnknownSymbolError, which lists similar names, and UsageError for anything else.
    """
    if isinstance(where, int) and not isinstance(where, bool):
        address = where
    elif isinstance(where, str):
        address = source_line_address(machine, where) if is_source_line(where) else _named(where, machine.symbols, vcpu)
    else:
        raise UsageError(f"an address is a number, or the name of a symbol or register, not {where!r}")
    if not 0 <= address < 1 << 64:
        raise UsageError(f"an address has 64 bits; {address:#x} does not fit")
    return address


def _named(where: str, symbols: SymbolTable, vcpu: Vcpu) -> int:
    if where in symbols:  # names may have signs in them
        return symbols.address_of(where)
    at = max(where.rfind("+"), where.rfind("-"))
    name, distance = (where[:at].strip(), _distance(where[at:])) if at > 0 else (where.strip(), 0)
    if distance is None:
        name, distance = where.strip(), 0
    if name not in symbols:
        if name in ADDRESS_REGISTERS:
            return (_register(name, vcpu) + distance) & ((1 << 64) - 1)
        try:
            return int(name, 0) + distance
        except ValueError:
            pass  # no number either; the symbol table says which names are similar
    return symbols.address_of(name) + distance


def _distance(text: str) -> int | None:
    try:
        return int(text.replace(" ", ""), 0)
    except ValueError:
        return None


def _register(name: str, vcpu: Vcpu) -> int:
    sregs = vcpu.sregs
    if name in _CONTROL:
        return int(getattr(sregs, name))
    value = int(getattr(vcpu.regs, name))
    segment = {"rip": sregs.cs, "rsp": sregs.ss, "rbp": sregs.ss}.get(name)
    if segment is None or code_bits(sregs) == 64:
        return value
    if name != "rip":
        value &= 0xFFFF_FFFF if sregs.ss.db else 0xFFFF  # SS.B says how wide the stack pointer is (SDM vol. 1, 6.2.3)
    return (int(segment.base) + value) & 0xFFFF_FFFF
