"""The benchmarks on the real KVM, with little work: what they measure really happens."""

import shutil
import time
from pathlib import Path

import pytest

from kvmpy.bench import exit_cost, guests, process_start
from kvmpy.bench.contenders import Contenders
from kvmpy.bench.session import Session
from kvmpy.bench.suite import BENCHMARKS, WITHOUT_KVM, run_benchmarks
from kvmpy.boot import FirmwareImage
from kvmpy.devices import DebugExit, Uart16550
from kvmpy.machine import Machine

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs `gcc` (Debian package gcc)")
needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None, reason="needs `qemu-system-x86_64` (Debian package qemu-system-x86)"
)

ACCESSES = [name for name in guests.PROGRAMS if name.startswith(("port", "MMIO"))]


@pytest.mark.parametrize("name", ACCESSES)
def test_a_guest_makes_as_many_accesses_as_it_was_told(name: str) -> None:
    accesses: list[str] = []
    accesses_at_result: list[int] = []

    def read(offset: int, size: int) -> int:
        accesses.append("read")
        return 0

    def write(offset: int, size: int, value: int) -> None:
        accesses.append("write")

    with Machine() as machine:
        machine.map_ports(guests.RESULT_PORT, 1, write=lambda *_: accesses_at_result.append(len(accesses)))
        if name.startswith("port"):
            machine.map_ports(guests.DEVICE_PORT, 4, read=read, write=write)
        else:
            machine.map_mmio(guests.DEVICE_MMIO, 0x1000, read=read, write=write)
        machine.add(DebugExit(guests.EXIT_PORT))
        machine.load(FirmwareImage(guests.firmware(name, 37)))
        machine.run(timeout=20, check=True)
    assert accesses == [name.split()[1]] * 37
    assert accesses_at_result == [37] * 4


def test_the_serial_guest_writes_its_characters() -> None:
    with Machine() as machine:
        machine.map_ports(guests.RESULT_PORT, 1)
        machine.add(DebugExit(guests.EXIT_PORT))
        console = machine.add(Uart16550())
        machine.load(FirmwareImage(guests.firmware("serial output", 25)))
        machine.run(timeout=20, check=True)
    assert console.text == "." * 25


@needs_gcc
@pytest.mark.parametrize("name", ACCESSES)
def test_the_c_loop_runs_the_same_guest(name: str, tmp_path: Path) -> None:
    rom = tmp_path / "rom"
    with Contenders(qemu=False) as contenders:
        loop = contenders.program("exit_loop")
        times = []
        for count in (50, 5000):
            rom.write_bytes(guests.firmware(name, count))
            times.append(int(loop.ask(str(rom))))
    assert 0 < times[0] < times[1]  # a hundredfold of work: no timing, only that the work is done


@needs_qemu
@pytest.mark.parametrize("name", ACCESSES)
def test_qemu_runs_the_same_guest(name: str, tmp_path: Path) -> None:
    rom = tmp_path / "rom"
    rom.write_bytes(guests.firmware(name, 20))
    with Contenders() as contenders:
        assert contenders.qemu_result(rom) > 0


@needs_qemu
def test_qemu_writes_the_same_characters(tmp_path: Path) -> None:
    rom, serial = tmp_path / "rom", tmp_path / "serial"
    rom.write_bytes(guests.firmware("serial output", 25))
    with Contenders() as contenders:
        contenders.qemu_result(rom, serial=serial)
    assert serial.read_bytes() == b"." * 25


def test_the_guest_measures_itself(tmp_path: Path) -> None:
    rom = tmp_path / "rom"
    rom.write_bytes(guests.firmware("port write", 1000))
    before = time.perf_counter_ns()
    ticks = exit_cost.machine_result(rom)
    around = (time.perf_counter_ns() - before) / 1e3
    with Contenders(qemu=False) as contenders:
        measured = Session(contenders).microseconds(ticks)
    assert 0 < measured < around


def test_hello_says_four(capsys: pytest.CaptureFixture[str]) -> None:
    program = process_start.HELLO.read_text("utf-8")
    exec(compile(program, str(process_start.HELLO), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == "4\n"


@pytest.mark.deadline(120)
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in WITHOUT_KVM])
def test_a_benchmark_measures_something(name: str) -> None:
    results = run_benchmarks([name], rounds=1, scale=0.05)
    rows = results.rows[name]
    assert rows or name == "completion"  # where the processor runs ring 0, nothing is done in software
    for row in rows:
        assert row.samples.values
        if row.unit == "exits":  # requests may need none: tests/guest/test_bench_virtio.py
            assert row.samples.low >= 0
        elif "adds" not in row.name and name != "memory":
            assert row.samples.low > 0
        if shutil.which("gcc") and name in ("exits", "lifecycle", "kicks") and "that KVM queues" not in row.name:
            assert "C loop" in [comparison.contender for comparison in row.comparisons]
