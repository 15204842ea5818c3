"""What a crash report costs, capture and text, in processor and wall-clock time. No test; prints a table.

    PYTHONPATH=tests:. python tests/crash_report_figures.py [PROCESSES]

The first report of a process imports what makes it. Each process runs one guest of one instruction, which ends in a
triple fault, as a flat image or an ELF file.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from gnu_toolchain import assemble, compile_c

_ONE_PROCESS = """
import sys, time
from kvmpy import Machine
from kvmpy.boot import ElfImage, FlatImage
data = open(sys.argv[1], "rb").read()
image = ElfImage(data) if data.startswith(b"\\x7fELF") else FlatImage(data, 0x1000, mode="long")
with Machine() as machine:
    machine.crash_reports = False
    machine.load(image)
    outcome = machine.run(timeout=5)
    for _ in range(2):
        cpu, wall = time.process_time(), time.perf_counter()
        page = str(machine.crash_report(outcome))
        print((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3)
        assert "triple fault" in page, page
"""


def main() -> None:
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    print(f"{processes} processes each: median ms of processor time (of wall-clock time; the slowest)")
    with tempfile.TemporaryDirectory() as folder:
        flat, elf = Path(folder) / "ud2.bin", Path(folder) / "ud2.elf"
        flat.write_bytes(assemble("ud2", bits=64))
        elf.write_bytes(Path(compile_c("void _start(void) { __builtin_trap(); }", flags=("-g",)).elf).read_bytes())
        for path in (flat, elf):
            figures = [one_process(path) for _ in range(processes + 1)][1:]  # the first may have modules to compile
            for number, label in enumerate(("first report", "second")):
                cpu = [row[number][0] for row in figures]
                wall = [row[number][1] for row in figures]
                print(
                    f"{path.suffix[1:]:<4} {label:<12} {statistics.median(cpu):6.1f}"
                    f"  ({statistics.median(wall):.1f}; {max(wall):.1f})"
                )


def one_process(path: Path) -> list[tuple[float, float]]:
    """(processor, wall) milliseconds of the first two reports of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _ONE_PROCESS, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    rows = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    return [(cpu, wall) for cpu, wall in rows]


if __name__ == "__main__":
    main()
