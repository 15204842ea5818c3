"""The three ways as a table and as a picture."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from kvmpy.bench.ways import WAYS, WORKLOADS, Figures, Results
from kvmpy.bench.ways_report import as_text, draw
from kvmpy.cli import main
from kvmpy.errors import UsageError

EXITS = {"emulated": 20_000, "paravirtual": 750, "cooperative": 0}
RESULTS: Results = {
    way: {name: Figures(EXITS[way], 0.0125, 0 if name == "ticks" else 40_000) for name in WORKLOADS} for way in WAYS
}


def test_the_table_says_exits_times_and_bytes() -> None:
    lines = as_text(RESULTS).splitlines()
    assert lines[0].split() == ["work", "way", "exits", "seconds", "bytes", "per", "exit"]
    assert lines[2].split() == ["print", "emulated", "20,000", "0.013", "2"]
    assert lines[3].split() == ["paravirtual", "750", "0.013", "53"]
    assert lines[4].split() == ["cooperative", "0", "0.013", "no", "exit"]
    assert next(line for line in lines if line.startswith("ticks")).split() == ["ticks", "emulated", "20,000", "0.013"]


@pytest.mark.parametrize(("name", "start"), [("plot.svg", b"<?xml"), ("plot.PNG", b"\x89PNG")])
def test_a_picture_is_drawn(tmp_path: Path, name: str, start: bytes) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (extra `plot`)")
    draw(RESULTS, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(start)
    if name == "plot.svg":
        assert len(re.findall(rb"<path", content)) > 3 * len(WORKLOADS)


def test_other_kinds_of_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        draw(RESULTS, tmp_path / "plot.jpeg")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UsageError, match="pip install"):
        draw(RESULTS, tmp_path / "plot.svg")


@pytest.mark.parametrize(
    "arguments", [["--plot", "x.svg"], ["ways", "--markdown"], ["ways", "--only", "exits"], ["ways", "--plot", "x.gif"]]
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) != 0
    assert "kvmpy" in capsys.readouterr().err
