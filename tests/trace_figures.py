"""What a trace of 1,000,000 events costs: to write, in each format, and to open; what it adds to an exit.

No test; prints tables.

    PYTHONPATH=tests:. python tests/trace_figures.py [EVENTS]

Writing is all that happens after a run loop has told the tracer, with the telling. Opening is json.load for Perfetto's
file, for JSON lines each of the two ways of docs/tracing.md, and for the page the time that its script takes in
headless Chromium.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

from gnu_toolchain import assemble
from headless_browser import Page, explore
from kvmpy import Machine
from kvmpy.boot import FlatImage
from kvmpy.debug.trace import Tracer, tracer
from traced_machine import fake_machine, notes

EXITS = 20_000


def written(path: Path | None, events: int) -> float:
    """Microseconds of processor time for each event."""
    plan = notes(6_000)
    # Times are made up here, and pass quicker than the clock.
    tracer._EVERY = 10**18
    with Tracer(fake_machine(), path) as trace:
        start = time.perf_counter_ns()
        began = time.thread_time()
        for number in range(events):
            vcpu, entered, left, handled, what, value = plan[number % len(plan)]
            now = start + number * 10_000
            trace.note(vcpu, now, now + left - entered, now + handled - entered, what, value)
        trace.close()
        return (time.thread_time() - began) / events * 1e6


def opened(path: Path) -> str:
    """How long it takes to open the file."""
    began = time.process_time()
    if path.suffix == ".json":
        with path.open() as file:
            count = len(json.load(file)["traceEvents"])
        return f"{time.process_time() - began:.2f} s, {count:,} events of the format"
    if path.suffix == ".jsonl":
        with path.open() as file:
            count = len(json.loads(f"[{','.join(file)}]"))
        whole, began = time.process_time() - began, time.process_time()
        decode = json.JSONDecoder().raw_decode
        with path.open() as file:
            for line in file:
                decode(line)
        return f"{whole:.2f} s as a list, {time.process_time() - began:.2f} s line by line, {count:,} events"
    if path.suffix == ".html":
        document = explore({"trace": Page(path.read_text("utf-8"), {})})["trace", ""]
        return f"{document.attributes['body']['data-built']} ms in the page"
    return ""


def added(folder: Path) -> None:
    """Print what tracing adds to each exit of a running guest: 20,000 port writes, the median of 11 runs."""
    code = assemble(f"mov ecx, {EXITS}; again: out 0x99, al; dec ecx; jnz again; hlt", bits=64)
    print(f"\n{EXITS:,} port writes of a guest: us an exit, and what a trace adds")
    with Machine(irqchip=False) as machine:
        machine.map_ports(0x99, 1, write=lambda offset, size, value: None)

        def run(name: str) -> float:
            machine.load(FlatImage(code, 0x1000, mode="long"))
            context = machine.trace(folder / name) if name else nullcontext()
            with context:
                began = time.perf_counter()
                assert machine.run(timeout=60).ok
                return (time.perf_counter() - began) / EXITS * 1e6

        names = ("", "exits.txt", "exits.jsonl", "exits.json", "exits.html")
        rounds = [{name: run(name) for name in names} for _ in range(12)][1:]
        print(f"{'no trace':<12} {median(one[''] for one in rounds):6.2f}")
        for name in names[1:]:
            print(f"{name:<12} {median(one[name] - one[''] for one in rounds):+6.2f}")


def main() -> None:
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    print(f"{events:,} events: us each to write; MB; to open")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("", "trace.txt", "trace.jsonl", "trace.json", "trace.html"):
            path = Path(folder) / name if name else None
            cost = written(path, events)
            if path is None:
                print(f"{'in memory':<12} {cost:6.2f}")
            else:
                print(f"{name:<12} {cost:6.2f} {path.stat().st_size / 1e6:8.1f}  {opened(path)}", flush=True)
        added(Path(folder))


if __name__ == "__main__":
    main()
