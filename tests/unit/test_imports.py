"""The structure of the package: who imports whom, what stays out, how large a module grows.

The arrows are those of the architecture: `memory` <- `x86` <- `boot`; `memory` <- `virtio`; (`abi`, `memory`, `x86`,
`exits`) <- `kvm`; all of these and `devices` <- `machine` <- (`debug`, `snapshot`, `sandbox`) <- (`cli`, `bench`,
`pytest_plugin`). Every import counts, also one inside a function or by `importlib.import_module("kvmpy...")`.

An import under `if TYPE_CHECKING:` costs nothing at run time but is a dependency of the reader, so it follows the same
table; only those of TYPES_ONLY may also point upwards, where a class low in the house carries an object from above.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kvmpy"
MODULES = sorted(PACKAGE.rglob("*.py"))

CORE = {"errors", "abi", "exits", "memory", "x86", "kvm", "devices", "virtio", "boot"}

ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "abi": set(),
    "guest": {"errors"},
    "exits": {"errors"},
    "memory": {"errors"},
    "x86": {"errors", "memory"},
    "boot": {"errors", "memory", "x86"},
    "devices": {"errors"},
    "virtio": {"errors", "memory", "devices"},
    "kvm": {"errors", "abi", "memory", "x86", "exits"},
    "machine": CORE,
    "debug": CORE | {"machine"},
    "snapshot": CORE | {"machine"},
    "sandbox": CORE | {"machine"},
    "bench": CORE | {"machine", "debug", "snapshot", "sandbox", "kvmpy", "guest"},
    "cli": CORE | {"machine", "debug", "snapshot", "sandbox", "kvmpy", "bench"},
    "pytest_plugin": CORE | {"machine", "debug", "snapshot", "sandbox", "kvmpy", "guest"},
    # kvmpy/__init__.py resolves the public names on demand.
    "kvmpy": CORE | {"machine", "debug", "snapshot", "sandbox"},
}
"""Which layers a layer may import, itself aside. `kvmpy` is the package's own __init__.py."""

TYPES_ONLY: dict[str, set[str]] = {
    "errors": {"machine", "x86"},  # errors carry an Outcome and Violations
    "exits": {"kvm"},  # an exit knows the vCPU that its answer goes to
    "machine": {"debug"},  # an outcome carries a crash report
}
"""What a layer may import beyond its arrows under `if TYPE_CHECKING:`."""

SAME_LAYER = {"_exit": "exits", "_value": "errors", "__main__": "cli"}
"""Modules that belong to a layer of another name."""

DOORS: dict[str, set[str]] = {"kvmpy.machine.inspection": {"debug"}}
"""Modules whose functions import from a layer above when they are called: `Machine` has methods for such tools."""

OPTIONAL_PACKAGES = {
    "pytest_plugin": {"pytest"}, "boot": {"lz4", "zstandard"}, "guest": {"elftools"}, "debug": {"capstone"},
    "bench": {"matplotlib"},
}  # fmt: skip
"""Packages outside the standard library, by the layer that may import them. elftools is the one dependency."""

SPEAKING_LAYERS = {"cli", "bench", "pytest_plugin"}
"""Layers that talk to a person and may print and exit. All others are a library."""

VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "manager", "managers", "misc"}

LINES_ALLOWED = 400

LONGER: dict[str, str] = {}
"""Modules above LINES_ALLOWED, each with the reason why splitting it would not help the reader."""

DEAR = {
    "argparse", "asyncio", "dataclasses", "elftools", "inspect", "json", "logging", "pathlib", "re", "socket",
    "subprocess", "tempfile", "threading", "typing",
}  # fmt: skip
"""Modules that cost milliseconds to import, and that neither `import kvmpy` nor a bare `Kvm` needs."""

BARE_PATH = ("errors", "exits", "abi", "memory", "kvm")
BARE_PATH_X86 = ("kvmpy.x86.registers", "kvmpy.x86.modes")
"""The layers that a script loads to run a guest on a bare vCPU, and the modules of x86 that it loads."""


class Import(NamedTuple):
    """One imported module, absolute; `types_only` when it stands under `if TYPE_CHECKING:`."""

    target: str
    line: int
    types_only: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def layer(name: str) -> str:
    """The layer of a module of kvmpy, by its dotted name."""
    first = name.removeprefix("kvmpy.").split(".")[0]
    return SAME_LAYER.get(first, first)


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(tree: ast.AST, name: str, is_package: bool, types_only: bool = False) -> Iterator[Import]:
    """All imports below `tree`, a part of the module `name`."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import(names=aliases):
                for alias in aliases:
                    yield Import(alias.name, node.lineno, types_only)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                package = name.split(".") if is_package else name.split(".")[:-1]
                anchor = ".".join(package[: len(package) - level + 1]) if level else ""
                base = ".".join(filter(None, (anchor, module)))
                for alias in aliases:
                    inner = f"{base}.{alias.name}"
                    yield Import(inner if inner in NAMES else base, node.lineno, types_only)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield Import(target, node.lineno, types_only)
            case ast.If(test=test) if is_type_checking(test):
                yield from imports(ast.Module(node.body, []), name, is_package, True)
                yield from imports(ast.Module(node.orelse, []), name, is_package, types_only)
                continue
        yield from imports(node, name, is_package, types_only)


@functools.cache
def imports_of(path: Path) -> list[Import]:
    return list(imports(parse(path), module_name(path), path.name == "__init__.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def broken_arrows(name: str, found: list[Import]) -> list[str]:
    """What is wrong with the imports `found` in the module `name`."""
    here = layer(name)
    if here not in ARROWS:
        return [f"{name}: {here} is a new layer; give it its arrows in ARROWS"]
    problems = []
    for target, line, types_only in found:
        if target.split(".")[0] != "kvmpy":
            continue
        there = layer(target)
        allowed = (
            ARROWS[here] | {here} | DOORS.get(name, set()) | (TYPES_ONLY.get(here, set()) if types_only else set())
        )
        if there not in allowed:
            problems.append(f"{name}, line {line}: {here} must not import {target}")
    return problems


def each_module(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@each_module(MODULES)
def test_imports_go_one_way(path: Path) -> None:
    assert not broken_arrows(module_name(path), imports_of(path))


@pytest.mark.parametrize(
    ("name", "source", "broken"),
    [
        ("kvmpy.x86.modes", "from kvmpy.kvm import Vm", True),
        ("kvmpy.x86.modes", "import kvmpy.memory.region", False),
        ("kvmpy.x86.modes", "from . import registers", False),
        ("kvmpy.x86.modes", "from ..machine import Machine", True),
        ("kvmpy.x86.modes", "from kvmpy import errors", False),
        ("kvmpy.x86.modes", "from kvmpy import Kvm", True),
        ("kvmpy.x86.modes", "def f():\n    import kvmpy.abi", True),
        ("kvmpy.x86.modes", "import importlib\nimportlib.import_module('kvmpy.kvm')", True),
        ("kvmpy.x86.modes", "if TYPE_CHECKING:\n    from kvmpy.kvm import Vm", True),
        ("kvmpy.errors", "if TYPE_CHECKING:\n    from kvmpy.machine.outcome import Outcome", False),
        ("kvmpy.errors", "if TYPE_CHECKING:\n    pass\nelse:\n    from kvmpy.machine.outcome import Outcome", True),
        ("kvmpy.errors", "from kvmpy.machine.outcome import Outcome", True),
        ("kvmpy.devices.cmos", "from kvmpy.machine.board import Board", True),
        ("kvmpy.cli.run", "from kvmpy import Machine\nfrom kvmpy.bench import exits", False),
        ("kvmpy.machine.inspection", "def f():\n    from kvmpy.debug import debugger", False),
        ("kvmpy.machine.machine", "def f():\n    from kvmpy.debug import debugger", True),
        ("kvmpy.nowhere", "import os", True),
    ],
)
def test_the_rule_tells_right_from_wrong(name: str, source: str, broken: bool) -> None:
    assert bool(broken_arrows(name, list(imports(ast.parse(source), name, False)))) is broken


@each_module(MODULES)
def test_a_module_needs_the_standard_library_and_elftools_only(path: Path) -> None:
    allowed = sys.stdlib_module_names | {"kvmpy"} | OPTIONAL_PACKAGES.get(layer(module_name(path)), set())
    assert {found.target.split(".")[0] for found in imports_of(path)} <= allowed


@each_module([path for folder in ("kvmpy", "examples", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))])
def test_nothing_imports_fcntl(path: Path) -> None:
    # fcntl.ioctl takes a C int and, from Python 3.14, retries EINTR for ever: a kick would be lost.
    assert "fcntl" not in {found.target for found in imports_of(path)}


@each_module([path for path in MODULES if layer(module_name(path)) not in SPEAKING_LAYERS])
def test_the_library_neither_prints_nor_exits(path: Path) -> None:
    forbidden = ("print", "exit", "quit", "sys.exit", "os._exit", "os.abort")
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    assert not [f"line {call.lineno}" for call in calls if ast.unparse(call.func) in forbidden]
    assert "SystemExit" not in {node.id for node in ast.walk(parse(path)) if isinstance(node, ast.Name)}


def test_names_say_what_a_thing_is() -> None:
    names = {part.strip("_") for name in NAMES for part in name.split(".")}
    assert not names & VAGUE_NAMES


def test_a_module_is_small_enough_to_hold_in_the_head() -> None:
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > LINES_ALLOWED and name not in LONGER} == {}
    assert [name for name in LONGER if lines.get(name, 0) <= LINES_ALLOWED] == [], "no longer needed in LONGER"


def loaded_by(*statements: str) -> set[str]:
    """The top-level modules that an interpreter without site-packages has after `statements`."""
    program = ["import sys", f"sys.path.insert(0, {str(ROOT)!r})", *statements, "print(*sys.modules)"]
    command = [sys.executable, "-I", "-S", "-c", "; ".join(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return {name if name.startswith("kvmpy.") else name.split(".")[0] for name in done.stdout.split()}


def test_a_machine_loads_nothing_of_the_tools_that_look_into_it() -> None:
    assert not {name for name in loaded_by("import kvmpy.machine") if name.startswith("kvmpy.debug")}


def test_importing_the_package_loads_next_to_nothing() -> None:
    assert not loaded_by("import kvmpy") & (DEAR | {"ctypes", "enum", "functools", "mmap"})


def test_a_bare_vcpu_needs_no_dear_module() -> None:
    names = [name for name in NAMES if layer(name) in BARE_PATH or name in BARE_PATH_X86]
    assert not loaded_by(*(f"import {name}" for name in sorted(names))) & DEAR
