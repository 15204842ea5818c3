"""How a prompt shows values: numbers in hex, everything else as it shows itself."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from types import MethodType

from kvmpy._value import field_names
from kvmpy.debug.prompt.command_list import CommandList

__all__ = ["shown"]

_DEEPEST = 20


def shown(value: object) -> str:
    """The text for `value` at a prompt.

    Ints are in hex, also within lists, tuples, sets, dicts and the values of kvmpy; bool, enums and other subclasses
    of those types are as ever. What kvmpy lays out for reading (registers, walks, outcomes ...) is shown so.
    """
    if isinstance(value, MethodType) and value.__module__.startswith("kvmpy.debug.prompt."):
        return str(CommandList({value.__name__: value}))  # somebody left out the parentheses
    if type(value).__module__.partition(".")[0] == "kvmpy" and _has_a_text(value):
        return str(value)
    return _hex(value, ())


def _has_a_text(value: object) -> bool:
    if isinstance(value, (Enum, BaseException, type)):
        return False
    return type(value).__str__ is not object.__str__


def _hex(value: object, around: tuple[int, ...]) -> str:
    """`around`: the containers that this one is in, so that one which contains itself comes to an end."""
    kind = type(value)
    if isinstance(value, int) and kind is int:
        return hex(value)
    if (names := _fields_of_ours(kind)) is not None:
        parts = ", ".join(f"{name}={_hex(getattr(value, name), around)}" for name in names)
        return f"{kind.__name__}({parts})"
    if kind not in (list, tuple, set, frozenset, dict) or not value:
        return repr(value)
    if id(value) in around or len(around) >= _DEEPEST:
        return "..."
    inside = (*around, id(value))
    if isinstance(value, dict):
        items = [f"{_hex(key, inside)}: {_hex(content, inside)}" for key, content in value.items()]
        return f"{{{', '.join(items)}}}"
    assert isinstance(value, (list, tuple, set, frozenset))
    items = [_hex(item, inside) for item in value]
    text = ", ".join(items)
    if kind is list:
        return f"[{text}]"
    if kind is tuple:
        return f"({text},)" if len(items) == 1 else f"({text})"
    return f"{{{text}}}" if kind is set else f"frozenset({{{text}}})"


def _fields_of_ours(kind: type) -> tuple[str, ...] | None:
    """The fields of a class of kvmpy that has such."""
    if kind.__module__.partition(".")[0] == "kvmpy" and is_dataclass(kind):
        return tuple(field.name for field in fields(kind))
    return field_names(kind)
