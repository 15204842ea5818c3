"""Tables and JSON of `kvmpy bench`, and the rows that need no KVM."""

import json
import shutil

import pytest

from kvmpy import cli
from kvmpy.bench.report import as_data, as_markdown, as_text
from kvmpy.bench.rows import Row, Samples, Target
from kvmpy.bench.suite import BENCHMARKS, WITHOUT_KVM, Results, run_benchmarks

ROW = Row.of(
    "exit", "us", {"kvmpy": Samples((11.0, 22.0, 33.0)), "C loop": Samples((10.0, 20.0, 30.0))},
    ratios={"C loop": Target(1.05)}, note="a | b",
)  # fmt: skip
ALONE = Row("python", "ns", Samples((123.4,)), target=Target(600))
RESULTS = Results({"CPU": "some", "load": "0.5"}, 3, {"exits": [ROW], "python": [ALONE]}, {"QEMU": "is not there"})

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs `gcc` (Debian package gcc)")


def test_the_text_shows_medians_spreads_ratios_and_targets() -> None:
    lines = as_text(RESULTS).splitlines()
    exit_line = next(line for line in lines if line.startswith("exit "))
    assert exit_line.split("  ")[0] == "exit"
    for part in ("22.0 (11.0..33.0)", "C loop", "20.0", "1.10 (1.10..1.10)", "<= 1.05 x", "no"):
        assert part in exit_line
    python_line = next(line for line in lines if line.startswith("python "))
    for part in ("123", "<= 600 ns", "yes"):
        assert part in python_line
    assert "exit: a | b" in lines
    assert "No QEMU: is not there" in lines


def test_the_markdown_is_one_table_with_the_machine_below() -> None:
    lines = as_markdown(RESULTS).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {9}
    assert "Measured on: CPU some." in lines


def test_the_data_is_json() -> None:
    data = json.loads(json.dumps(as_data(RESULTS)))
    first, second = data["rows"]
    assert (first["benchmark"], first["name"], first["median"], first["target"]) == ("exits", "exit", 22.0, None)
    (against,) = first["against"]
    assert against["contender"] == "C loop"
    assert against["ratio"]["samples"] == pytest.approx([1.1, 1.1, 1.1])
    assert (against["target"], against["met"]) == ("<= 1.05", False)
    assert (second["target"], second["met"]) == ("<= 600", True)
    assert data["missing"] == {"QEMU": "is not there"}


@needs_gcc
def test_the_run_loop_over_a_stub_is_measured_without_kvm() -> None:
    results = run_benchmarks(["python"], rounds=2, scale=0.002)
    rows = results.rows["python"]
    assert [row.name.split(",")[0] for row in rows] == [
        "port write", "port read", "MMIO write", "MMIO read", "of that",
    ]  # fmt: skip
    assert all(len(row.samples.values) == 2 and row.samples.low > 0 for row in rows)
    assert [row.target and row.target.limit for row in rows] == [600, 900, 900, 900, None]


def test_without_a_compiler_the_rows_that_need_one_are_missing_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    results = run_benchmarks(["python"], rounds=1)
    assert results.rows == {"python": []}
    assert "gcc" in results.missing["C loop"]


def test_progress_is_told_by_name() -> None:
    told: list[str] = []
    run_benchmarks([], began=told.append)
    assert told == []
    if shutil.which("gcc"):
        run_benchmarks(["python"], rounds=1, scale=0.001, began=told.append)
        assert told == ["python"]


@needs_gcc
def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--only", "python", "--rounds", "5", "--json", "--no-qemu"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["rounds"] == 5
    assert {row["benchmark"] for row in data["rows"]} == {"python"}
    assert data["host"]["Python"].startswith("CPython")


@pytest.mark.parametrize("rounds", ["4", "0", "-1", "many"])
def test_too_few_rounds_are_refused(rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "--rounds", rounds])
    assert caught.value.code == 2
    assert "--rounds" in capsys.readouterr().err


def test_without_kvm_the_command_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_kvm(path: str, *arguments: object) -> int:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr("kvmpy.kvm.system.os.open", no_kvm)
    assert cli.main(["bench", "--only", "exits"]) == 1
    assert "/dev/kvm" in capsys.readouterr().err


def test_the_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    text = capsys.readouterr().out
    assert set(BENCHMARKS) >= WITHOUT_KVM
    for name in BENCHMARKS:
        assert f"\n  {name} " in text
