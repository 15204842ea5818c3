"""How Sphinx builds the documentation. `scripts/docs` does it, with warnings as errors."""

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

project = "kvmpy"
author = "the kvmpy maintainers"
project_copyright = "the kvmpy maintainers"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"kvmpy {release}"

# In docstrings `name` is code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
add_module_names = False
# Many fields have one name, such as `type`: Sphinx cannot tell which of them an annotation means.
suppress_warnings = ["ref.python"]


def write_api_pages(_app: "Sphinx") -> None:
    """Write one page for each package of kvmpy, with all its public modules, so that no module is forgotten."""
    pages = ROOT / "docs" / "api"
    wanted = {}
    for folder in [ROOT / "kvmpy", *sorted(path.parent for path in (ROOT / "kvmpy").rglob("__init__.py"))]:
        package = ".".join(folder.relative_to(ROOT).parts)
        modules = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
        names = [package, *(f"{package}.{module}" for module in modules)]
        wanted[pages / f"{package}.md"] = f"# {package}\n" + "".join(map(module_section, names))
    for page in set(pages.glob("kvmpy*.md")) - set(wanted):
        page.unlink()
    for page, text in wanted.items():
        if not page.exists() or page.read_text("utf-8") != text:
            page.write_text(text, "utf-8")


def module_section(name: str) -> str:
    """The part of a page that documents one module, or the package itself.

    A package shows its text and its public names; each name is described once, with the module that defines it.
    """
    folder = ROOT.joinpath(*name.split("."))
    if not folder.is_dir():
        return f"\n## {name.rpartition('.')[2]}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"
    public = public_names(folder / "__init__.py")
    if name == "kvmpy":  # its list is put together when it is imported
        import kvmpy

        public = [each for each in dir(kvmpy) if not each.startswith("_") and each != "TYPE_CHECKING"]
    names = ", ".join(f"`{each}`" for each in public)
    listed = f"\nPublic names: {names}\n" if names else ""
    return f"\n```{{eval-rst}}\n.. automodule:: {name}\n    :no-members:\n```\n{listed}"


def public_names(module: Path) -> list[str]:
    """What `__all__` of a module lists, read without importing it."""
    for node in ast.parse(module.read_text("utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List() | ast.Tuple() as value):
                return [name.value for name in value.elts if isinstance(name, ast.Constant)]
    return []


def escape_plain_text(_app: "Sphinx", _what: str, _name: str, _of: object, _options: object, lines: list[str]) -> None:
    """Docstrings are plain text with `code`, lists and indented blocks: a star or a final underscore means itself."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        for index in range(0, len(parts), 2):
            if not line.startswith("    "):
                parts[index] = re.sub(r"(?<=\w)_(?!\w)|(?<!^)\*|\|", lambda match: "\\" + match[0], parts[index])
        lines[number] = "".join(parts)


def setup(app: "Sphinx") -> None:
    app.connect("builder-inited", write_api_pages)
    app.connect("autodoc-process-docstring", escape_plain_text)
