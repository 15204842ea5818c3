"""Templates as plain data: the dicts that users write, and JSON files.

All keys may be left out::

    {
      "name": "old",
      "base": "portable",                        # or "host" (the default), "plain", "nothing"
      "only": ["fpu", "tsc", ...],               # the features that may stay
      "features": {"sse4_2": false, "rdrand": true},
      "vendor": "GenuineIntel",
      "brand": "My processor",
      "leaves": [{"function": "0x80000005", "eax": "0xff48ff40", "ebx": 0, "ecx": 0, "edx": 0},
                 {"function": "0x7", "index": 1, "eax": 0}],
      "msrs": {"MISC_ENABLE": "0x1", "0x8b": "0x100000000"}
    }

Numbers are ints or text such as "0x1a0". A leaf with an `index` has subleaves; registers that are left out are 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvmpy.errors import UsageError
from kvmpy.x86.cpu_templates.named import TEMPLATES
from kvmpy.x86.cpu_templates.template import CpuTemplate
from kvmpy.x86.cpuid import SIGNIFICANT_INDEX, CpuidEntry
from kvmpy.x86.msrs import Msr

if TYPE_CHECKING:
    import os

__all__ = ["cpu_template", "load", "save", "to_dict"]

_NAMELESS = "custom"
_KEYS = frozenset({"name", "base", "only", "features", "vendor", "brand", "leaves", "msrs"})
_REGISTERS = ("eax", "ebx", "ecx", "edx")


def cpu_template(source: CpuTemplate | str | Mapping[str, Any]) -> CpuTemplate:
    """The template of that name (`TEMPLATES`), or that a dict describes. Raises UsageError for what is none."""
    if isinstance(source, CpuTemplate):
        return source
    if isinstance(source, str):
        if source not in TEMPLATES:
            raise UsageError(
                f"no CPU template is named {source!r}; there are {', '.join(TEMPLATES)}, and load() for files"
            )
        return TEMPLATES[source]
    if not isinstance(source, Mapping):
        raise UsageError(f"a CPU template is a name, a dict or a CpuTemplate, not {source!r:.60}")
    return _from_mapping(source)


def _from_mapping(data: Mapping[str, Any]) -> CpuTemplate:
    unknown = [key for key in data if key not in _KEYS]
    if unknown:
        raise UsageError(f"a CPU template has no {unknown[0]!r:.60}; it has {', '.join(sorted(_KEYS))}")
    base = _text(data, "base") or "host"
    start = CpuTemplate("nothing", "nothing") if base == "nothing" else cpu_template(base)
    features = _part(data, "features", Mapping, {})
    for name, on in features.items():
        if not isinstance(name, str) or not isinstance(on, bool):
            raise UsageError(
                f"a feature of a CPU template is a name and true or false, not {name!r:.60} and {on!r:.60}"
            )
    only = _part(data, "only", (list, tuple, set, frozenset), None)
    return replace(
        start,
        name=_text(data, "name") or _NAMELESS,
        only=start.only if only is None else frozenset(_feature_name(name) for name in only),
        on=frozenset(name.lower() for name, on in features.items() if on),
        off=frozenset(name.lower() for name, on in features.items() if not on),
        vendor=_text(data, "vendor"),
        brand=_text(data, "brand"),
        leaves=tuple(sorted(_entry(leaf) for leaf in _part(data, "leaves", (list, tuple), ()))),
        msrs=tuple(
            sorted((_msr(key), _number(value, "MSR")) for key, value in _part(data, "msrs", Mapping, {}).items())
        ),
    )


def _part(data: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any) -> Any:
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise UsageError(f"the {key} of a CPU template cannot be {value!r:.60}")
    return value


def _text(data: Mapping[str, Any], key: str) -> str:
    return str(_part(data, key, str, ""))


def _feature_name(name: object) -> str:
    if not isinstance(name, str):
        raise UsageError(f"a feature of a CPU template has a name, not {name!r:.60}")
    return name.lower()


def _number(value: object, what: str) -> int:
    if isinstance(value, str):
        try:
            return int(value, 0)
        except ValueError:
            pass
    elif isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    raise UsageError(f'{what}: {value!r:.60} is no number; write it as 416 or "0x1a0"')


def _msr(key: object) -> int:
    if isinstance(key, str) and key.upper() in Msr.__members__:
        return int(Msr[key.upper()])
    return _number(key, "MSR")


def _entry(leaf: object) -> CpuidEntry:
    if isinstance(leaf, CpuidEntry):
        return leaf
    if not isinstance(leaf, Mapping) or "function" not in leaf:
        raise UsageError(f"a leaf of a CPU template has a function, and perhaps index and registers: {leaf!r:.60}")
    unknown = [key for key in leaf if key not in ("function", "index", *_REGISTERS)]
    if unknown:
        raise UsageError(f"a leaf of a CPU template has no {unknown[0]!r:.60}")
    registers = {name: _number(leaf.get(name, 0), f"CPUID {name}") for name in _REGISTERS}
    index = leaf.get("index")
    return CpuidEntry(
        _number(leaf["function"], "CPUID function"),
        0 if index is None else _number(index, "CPUID index"),
        **registers,
        flags=0 if index is None else SIGNIFICANT_INDEX,
    )


def to_dict(template: CpuTemplate) -> dict[str, Any]:
    """A dict from which `cpu_template` makes an equal template; numbers are hexadecimal text."""
    data: dict[str, Any] = {"name": template.name, "base": template.base}
    if template.only is not None:
        data["only"] = sorted(template.only)
    features = dict.fromkeys(template.on, True) | dict.fromkeys(template.off, False)
    if features:
        data["features"] = dict(sorted(features.items()))
    data |= {key: text for key, text in (("vendor", template.vendor), ("brand", template.brand)) if text}
    if template.leaves:
        data["leaves"] = [_leaf(entry) for entry in template.leaves]
    if template.msrs:
        data["msrs"] = {hex(number): hex(value) for number, value in template.msrs}
    return data


def _leaf(entry: CpuidEntry) -> dict[str, Any]:
    index = {"index": entry.index} if entry.flags & SIGNIFICANT_INDEX else {}
    return {"function": hex(entry.function), **index, **{name: hex(getattr(entry, name)) for name in _REGISTERS}}


def save(template: CpuTemplate, path: str | os.PathLike[str]) -> None:
    """Write a template as a JSON file."""
    import json

    with open(path, "w", encoding="utf-8") as file:
        json.dump(to_dict(template), file, indent=2)
        file.write("\n")


def load(path: str | os.PathLike[str]) -> CpuTemplate:
    """Read a JSON file. Raises UsageError for one that is no template, OSError when it cannot be read."""
    import json
    import os

    with open(path, encoding="utf-8") as file:
        try:
            data = json.load(file)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{os.fspath(path)} is no CPU template: it is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{os.fspath(path)} is no CPU template, which is a JSON object")
    return cpu_template(data)
