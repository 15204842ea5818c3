"""What a user gets by `pip install kvmpy`."""

import email.message
import email.parser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import kvmpy

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT: dict[str, Any] = SETTINGS["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of this tree, with what is installed: no network."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "kvmpy", source / "kvmpy", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert getattr(kvmpy, "__version__", "not there") == version
    assert importlib.metadata.version("kvmpy") == version
    released = re.findall(r"^## \[([0-9][^]]*)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert released[0] == version


def test_pyelftools_is_the_only_dependency() -> None:
    assert [re.split(r"[^\w-]", name)[0] for name in PROJECT["dependencies"]] == ["pyelftools"]


def test_python_versions_agree() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert SETTINGS["tool"]["ruff"]["target-version"] == "py311"
    offered = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)}
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8")
    tested = re.search(r"^ +python: \[(.*)\]$", workflow, re.MULTILINE)
    assert tested is not None
    assert offered == set(re.findall(r"[\d.]+", tested[1]))


def test_the_licence_is_an_expression_with_its_file(metadata: email.message.Message) -> None:
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["License"] is None
    assert not [name for name in metadata.get_all("Classifier", []) if name.startswith("License")]
    assert (ROOT / "LICENSE").read_text("utf-8").startswith("MIT License")


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = (path for path in (ROOT / "kvmpy").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert shipped == {path.relative_to(ROOT).as_posix() for path in files}
    assert "kvmpy/py.typed" in shipped


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "kvmpy").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name == f"kvmpy-{PROJECT['version']}-py3-none-any.whl"


def test_the_command_starts() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="kvmpy")
    assert command.value == "kvmpy.cli:main"
    assert callable(command.load())


@pytest.mark.parametrize("script", ["setup", "test", "demo", "docs"])
def test_a_script_is_executable_and_parses(script: str) -> None:
    path = ROOT / "scripts" / script
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["sh", "-n", str(path)], check=False).returncode == 0


def test_setup_does_nothing_when_all_is_there(tmp_path: Path) -> None:
    # A place that was set up already, whose interpreter works but whose pip would fail if it were asked.
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    python = programs / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exit 9\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = [str(tmp_path / "scripts" / "setup"), "none"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert first.returncode == 1
    assert "pip could not install" in first.stderr
    for stamp in ("none", "test"):
        (tmp_path / ".venv" / f"kvmpy-{stamp}.stamp").write_text(f"{tmp_path}\n[project]\n")
        second = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
        assert (second.returncode, second.stderr) == (0, "")
        (tmp_path / ".venv" / f"kvmpy-{stamp}.stamp").unlink()
    third = subprocess.run([command[0], "everything"], capture_output=True, text=True, timeout=50, check=False)
    assert third.returncode == 2


def test_setup_says_what_a_python_lacks(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    for name, body, says in (
        (
            "no-venv",
            f'case "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"',
            "apt-get install python3-venv",
        ),
        ("too-old", "exit 1", "kvmpy needs Python 3.11 or newer"),
    ):
        python = tmp_path / name
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
        done = subprocess.run(
            [str(tmp_path / "scripts" / "setup")], env={"PATH": "/usr/bin:/bin", "KVMPY_PYTHON": str(python)},
            capture_output=True, text=True, timeout=50, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert says in done.stderr
