"""README, pages and examples agree with the code: machine code with its assembly, errors with the page about them."""

import ast
import errno
import re
import sys
from pathlib import Path

import pytest

from code_blocks import Listing, blocks, listings
from gnu_toolchain import assemble_with_symbols
from kvmpy import devices, errors
from kvmpy.devices import Device
from kvmpy.kvm import advice
from kvmpy.machine import End

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TROUBLE = ROOT / "docs" / "when-kvm-says-no.md"

LISTINGS = [
    pytest.param(listing, id=f"{path.name}:{listing.line}")
    for path in EXAMPLES
    for listing in listings(path.read_text("utf-8"))
] + [
    pytest.param(listing, id=f"{block}+{listing.line}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "python"
    for listing in listings(block.text)
]


def test_listings_are_found_in_both_spellings() -> None:
    spelled_out = listings(
        'A = bytes.fromhex(\n    # 32-bit code for 0x2000\n    "b0 2a"  # mov al, 42\n    # end:\n)\n'
    )
    assert spelled_out == [Listing(1, 32, 0x2000, ((b"\xb0\x2a", "mov al, 42"), (b"", "end:")))]
    assert listings("A = bytes([0xB0, 0x2A,  # mov al, 42\n           0xF4])  # hlt\n") == [
        Listing(1, 16, 0x1000, ((b"\xb0\x2a", "mov al, 42"), (b"\xf4", "hlt")))
    ]


@pytest.mark.parametrize("listing", LISTINGS)
def test_machine_code_is_what_the_assembly_beside_it_makes(listing: Listing) -> None:
    source = "\n".join(f"row_{number}: {assembly}" for number, (_, assembly) in enumerate(listing.rows))
    source += f"\nrow_{len(listing.rows)}:"
    image, symbols = assemble_with_symbols(source, address=listing.address, bits=listing.bits)
    edges = [symbols[f"row_{number}"] - listing.address for number in range(len(listing.rows) + 1)]
    assembled = [
        (image[start:end].hex(" "), assembly)
        for start, end, (_, assembly) in zip(edges, edges[1:], listing.rows, strict=False)
    ]
    assert [(code.hex(" "), assembly) for code, assembly in listing.rows] == assembled


def test_the_steps_of_the_single_step_example_are_the_program_that_they_name() -> None:
    text = (ROOT / "examples" / "single_step.py").read_text("utf-8")
    (program,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROGRAM"
    )
    labels = {0x1006: "double: "}
    source = "\n".join(labels.get(address, "") + assembly for address, (_, assembly) in program.items())
    image, _ = assemble_with_symbols(source)
    at = {address: bytes.fromhex(code) for address, (code, _) in program.items()}
    assert b"".join(at.values()) == image
    assert list(at) == [0x1000 + sum(map(len, list(at.values())[:number])) for number in range(len(at))]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_needs_nothing_but_kvmpy_and_python(example: Path) -> None:
    tree = ast.parse(example.read_text("utf-8"))
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert modules <= {"kvmpy", *sys.stdlib_module_names}
    assert "You learn:" in (ast.get_docstring(tree) or "")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_listed_in_the_readme(example: Path) -> None:
    assert f"examples/{example.name}" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    # The pages below api/ are written when the documentation is built, which says so itself when one is missing.
    files = [target for target in targets if target and "://" not in target and not target.startswith("api/")]
    assert [target for target in files if not (page.parent / target).exists()] == []


def trouble_rows() -> list[str]:
    """The table rows and headings of the page about errors."""
    return [line for line in TROUBLE.read_text("utf-8").splitlines() if line.startswith(("|", "#"))]


@pytest.mark.parametrize("name", errors.__all__)
def test_the_page_about_errors_knows_every_exception(name: str) -> None:
    assert any(f"`{name}`" in row for row in trouble_rows())


@pytest.mark.parametrize(
    "pair", advice._BY_IOCTL, ids=lambda pair: f"{pair[0]}-{errno.errorcode[pair[1]]}"
)  # fmt: skip
def test_the_page_about_errors_knows_every_refusal_that_has_advice(pair: tuple[str, int]) -> None:
    ioctl, number = pair
    assert any(f"`{ioctl}`" in row and f"`{errno.errorcode[number]}`" in row for row in trouble_rows())


@pytest.mark.parametrize("number", advice._BY_ERRNO, ids=lambda number: errno.errorcode[number])
def test_the_page_about_errors_knows_every_errno_that_means_the_same_everywhere(number: int) -> None:
    assert any(row.startswith("| any ") and f"`{errno.errorcode[number]}`" in row for row in trouble_rows())


def test_the_page_about_errors_promises_no_ioctl_or_errno_that_is_not_there() -> None:
    from kvmpy.abi.ioctls import IOCTLS

    for row in trouble_rows():
        cells = re.findall(r"`(KVM_[A-Z0-9_]+)`", row)
        if row.startswith("| `KVM_") and re.search(r"`E[A-Z0-9]+`", row):
            assert cells[0] in IOCTLS, row
    codes = set(re.findall(r"`(E[A-Z0-9]{3,})`", "\n".join(trouble_rows())))
    assert codes <= set(errno.errorcode.values())


@pytest.mark.parametrize("end", End, ids=lambda end: end.name)
def test_the_page_about_errors_knows_every_way_a_run_can_end(end: End) -> None:
    assert any(f"`End.{end.name}`" in row for row in trouble_rows())


def test_the_page_about_devices_lists_them_all_where_they_are(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(512))
    needed: dict[str, tuple[Path, ...]] = {"AtaDisk": (image,)}
    rows = [row for row in (ROOT / "docs" / "devices.md").read_text("utf-8").splitlines() if row.startswith("| `")]
    classes = {
        name: value
        for name in devices.__all__
        if isinstance(value := getattr(devices, name), type) and issubclass(value, Device) and value is not Device
    }
    assert {row.split("`")[1] for row in rows} == set(classes)
    for row in rows:
        name = row.split("`")[1]
        device = classes[name](*needed.get(name, ()))
        place = row.rpartition(" | ")[2].lower()
        for region in device.regions():
            assert f"{region.start:#x}" in place, row
        if device.irq:
            assert f"irq {device.irq}" in place, row
        device.close()
