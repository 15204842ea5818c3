"""What there is at a prompt, one line each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["CommandList"]

_WIDTH = 30


class CommandList:
    """Functions by the names that a prompt gives them. Prints each with its parameters and what it does."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._functions = dict(functions)

    def __str__(self) -> str:
        lines = []
        for name, function in self._functions.items():
            call, summary = _call(name, function), _summary(function)
            lines.append(
                f"{call:<{_WIDTH}}  {summary}" if len(call) <= _WIDTH else f"{call}\n{'':<{_WIDTH}}  {summary}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from kvmpy.x86.html_text import preformatted

        return preformatted(str(self))


def _call(name: str, function: Callable[..., Any]) -> str:
    """The name with its parameters: "step(n=1, timeout=10.0)"."""
    words = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        words.append(f"{parameter.name}{default}")
    return f"{name}({', '.join(words)})"


def _summary(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]
