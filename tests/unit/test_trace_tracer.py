"""Recording: the ring, files while the trace goes on, several threads, and what can go wrong."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import pytest

from kvmpy.debug.trace import TraceError, Tracer
from kvmpy.errors import UsageError
from traced_machine import fake_machine, notes


def tell(trace: Tracer, count: int) -> None:
    """Tell a trace of exits that come from now on."""
    for note in notes(count, start=perf_counter_ns()):
        trace.note(*note)


def test_without_a_path_the_last_events_are_kept() -> None:
    with Tracer(fake_machine(), ring=100) as trace:
        tell(trace, 5_000)
        assert len(trace.events) == 100
        assert [event.value for event in trace.events] == [number & 0xFF for number in range(4_900, 5_000)]
        assert trace.count == 5_000
    assert len(trace.events) == 100
    trace.note(*notes(1)[0])  # from a vCPU that had not heard of the end
    assert trace.count == 5_000


def test_the_observer_is_there_from_start_to_close() -> None:
    machine: Any = fake_machine()
    trace = Tracer(machine)
    assert machine.board.observer is None
    trace.start()
    assert all(runner.observer is trace for runner in machine.runners)
    machine.board.change(4, 1)
    trace.close()
    trace.close()
    assert all(runner.observer is None for runner in machine.runners)
    assert machine.board.observer is None
    assert [event.name for event in trace.events] == ["irq 4 raise"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "html"])
def test_all_events_reach_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace.{suffix}"
    with Tracer(fake_machine(), path) as trace:
        tell(trace, 3_000)
    assert trace.count == trace.written == 3_000 if suffix != "html" else trace.count == 3_000
    text = path.read_text()
    if suffix in ("txt", "jsonl"):
        assert text.count("\n") == 3_000 + (suffix == "txt")
    elif suffix == "json":
        assert sum(e.get("name") != "guest" for e in json.loads(text)["traceEvents"] if e["ph"] == "X") == 3_000
    else:
        assert text.startswith("<!DOCTYPE html>")
        assert '"count":3000' in text


def test_a_file_can_be_read_while_the_trace_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Tracer(fake_machine(), path) as trace:
        tell(trace, 3_000)
        while_running = json.loads(path.read_text())["traceEvents"]
    assert 2_000 < len(while_running) < len(json.loads(path.read_text())["traceEvents"])


def test_few_events_are_written_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpy.debug.trace.tracer._EVERY", 0)
    path = tmp_path / "trace.txt"
    with Tracer(fake_machine(), path) as trace:
        now = perf_counter_ns()
        trace.note(0, now, now, now + 1_000_000, ("port", "read", 0x3FD, 1), 0)
        assert path.read_text().count("\n") == 2


def test_a_file_and_a_ring_is_the_end_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with Tracer(fake_machine(), path, ring=10) as trace:
        tell(trace, 3_000)
        assert path.read_text() == ""
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [
        number & 0xFF for number in range(2_990, 3_000)
    ]
    assert (trace.count, trace.written) == (3_000, 10)


def test_filters_choose_what_is_kept() -> None:
    with Tracer(fake_machine(), kinds="port", ports=range(0x70, 0x72), vcpus=0, minimum=1.5e-6) as trace:
        tell(trace, 4_000)
    wanted = [n for n in notes(4_000) if n[4] == ("port", "write", 0x70, 1) and n[0] == 0 and n[3] - n[2] >= 1500]
    assert len(trace.events) == len(wanted) > 100
    assert {(event.vcpu, event.address) for event in trace.events} == {(0, 0x70)}


def test_events_of_several_threads_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = Tracer(fake_machine(4), path)

    def tell_of(vcpu: int) -> None:
        for number in range(10_000):
            trace.note(vcpu, number * 10, number * 10 + 5, number * 10 + 7, ("port", "write", 0x3F8, 1), number & 0xFF)

    with trace:
        threads = [threading.Thread(target=tell_of, args=(vcpu,)) for vcpu in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert trace.written == len(lines) == 40_000
    for vcpu in range(4):
        times = [line["time"] for line in lines if line["vcpu"] == vcpu]
        assert len(times) == 10_000
        assert times == sorted(times)


# What can go wrong


def test_a_full_disk_ends_the_trace_and_is_told_at_the_end() -> None:
    trace = Tracer(fake_machine(), "/dev/full", format="text").start()
    tell(trace, 3_000)
    with pytest.raises(TraceError, match="/dev/full: No space left on device; the trace has 0 events, 3000 are lost"):
        trace.close()
    assert trace.error is not None
    assert (trace.count, trace.written) == (3_000, 0)


def test_an_exception_in_the_block_matters_more_than_a_full_disk() -> None:
    with pytest.raises(KeyError), Tracer(fake_machine(), "/dev/full", format="html"):
        raise KeyError


def test_a_machine_is_traced_once_at_a_time() -> None:
    machine = fake_machine()
    with Tracer(machine), pytest.raises(UsageError, match="traced already"):
        Tracer(machine).start()
    with Tracer(machine) as again, pytest.raises(UsageError, match="starts once"):
        again.start()


@pytest.mark.parametrize(
    "arguments",
    [
        {"path": "trace.xml"}, {"path": "trace"}, {"path": "trace.txt", "format": "pcap"}, {"format": "text"},
        {"ring": 0}, {"ring": 1.5}, {"kinds": "nothing"},
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_happens(arguments: dict[str, Any]) -> None:
    machine: Any = fake_machine()
    with pytest.raises(UsageError):
        Tracer(machine, **arguments)
    assert machine.runners[0].observer is None


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path: Path) -> None:
    machine: Any = fake_machine()
    with pytest.raises(FileNotFoundError):
        Tracer(machine, tmp_path / "nowhere" / "trace.txt").start()
    assert machine.runners[0].observer is None


def test_a_trace_into_a_file_has_no_events_in_memory(tmp_path: Path) -> None:
    with Tracer(fake_machine(), tmp_path / "trace.txt") as trace, pytest.raises(UsageError, match="ring"):
        _ = trace.events
