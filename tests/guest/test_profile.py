"""Profiles: which functions a guest is in, and how the time divides between it and Python."""

import time
from pathlib import Path

import pytest

from gnu_toolchain import assemble_with_symbols
from kvmpy import Machine
from kvmpy.boot import FlatImage
from kvmpy.debug.profile import Profile
from kvmpy.debug.symbols import SymbolTable
from kvmpy.errors import UsageError

_ORG = 0x1000
_BUSY = """
start:  call often
        call seldom
        jmp start
often:  mov ecx, 3000
1:      dec ecx
        jnz 1b
        ret
seldom: mov ecx, 300
1:      dec ecx
        jnz 1b
        ret
"""
_PORT = 0x42


def _machine(source: str) -> tuple[Machine, SymbolTable]:
    code, labels = assemble_with_symbols(source, address=_ORG, bits=64)
    machine = Machine(irqchip=False)
    machine.load(FlatImage(code, _ORG, "long"))
    return machine, SymbolTable.from_dict(labels, end=_ORG + len(code))


def _run(machine: Machine, symbols: SymbolTable, *, samples: int = 20, interval: float = 0.002) -> Profile:
    """Until there are so many samples at least."""
    with machine, machine.profile(interval=interval, symbols=symbols) as profile:
        while profile.samples < samples:
            machine.run(timeout=0.1)
    return profile


def test_functions_are_named_by_how_much_time_the_guest_spends_in_them() -> None:
    profile = _run(*_machine(_BUSY), samples=100)
    shares = {each.name: each.share for each in profile.functions()}
    assert set(shares) <= {"start", "often", "seldom"}
    assert shares["often"] > 0.7
    assert sum(each.samples for each in profile.functions(0)) == profile.samples
    assert sum(shares.values()) == pytest.approx(1)


def test_ring_3_and_code_without_symbols_are_told_apart() -> None:
    code, _ = assemble_with_symbols("1: jmp 1b", address=_ORG, bits=64)
    with Machine(irqchip=False) as machine:
        machine.load(FlatImage(code, _ORG, "long", ring=3))
        with machine.profile(interval=0.002) as user:
            while not user.samples:
                machine.run(timeout=0.05)
        machine.load(FlatImage(code, _ORG, "long"))
        with machine.profile(interval=0.002) as nameless:
            while not nameless.samples:
                machine.run(timeout=0.05)
    assert [each.name for each in user.functions()] == ["(ring 3)"]
    assert [each.name for each in nameless.functions()] == ["(unknown)"]


def test_a_guest_that_computes_leaves_python_little_and_a_slow_device_takes_it() -> None:
    computing = _run(*_machine(_BUSY), samples=5, interval=0.05).times()[0]  # samples are Python, too
    machine, symbols = _machine(f"1: out {_PORT}, al\n jmp 1b")
    machine.map_ports(_PORT, 1, write=lambda offset, size, value: time.sleep(0.005))
    waiting = _run(machine, symbols, samples=5, interval=0.05).times()[0]
    assert waiting.python_share > 0.5 > computing.python_share
    assert waiting.entries > 5
    assert waiting.wall == pytest.approx(waiting.guest + waiting.python)


def test_instructions_done_in_software_are_repairs() -> None:
    machine, symbols = _machine("1: popcnt rbx, rax\n jmp 1b")
    profile = _run(machine, symbols)
    times = profile.times()[0]
    done_in_software = sum(runner.completion.counts.total() for runner in machine.runners if runner.completion)
    assert (times.repairs > 0) == (done_in_software > 0)
    assert times.repairs <= times.python


def test_the_report_has_times_and_functions(tmp_path: Path) -> None:
    profile = _run(*_machine(_BUSY))
    profile.save(tmp_path / "profile.txt")
    text = (tmp_path / "profile.txt").read_text()
    assert text.startswith("vCPU 0: ")
    assert f"{profile.samples} samples\n" in text
    assert "  often\n" in text
    assert str(profile) == profile.text().rstrip("\n")
    profile.save(tmp_path / "profile.folded")
    lines = (tmp_path / "profile.folded").read_text().splitlines()
    assert [tuple(line.rsplit(" ", 1)) for line in lines] == [
        (f"vCPU 0;{each.name}", str(each.samples)) for each in profile.functions()
    ]


def test_afterwards_the_machine_runs_as_before_and_a_closed_one_does_not_mind() -> None:
    machine, symbols = _machine(_BUSY)
    with machine.profile(symbols=symbols) as profile:
        machine.run(timeout=0.05)
        machine.close()
    assert profile.times()[0].entries
    machine, symbols = _machine(_BUSY)
    with machine:
        plain = machine.vcpus[0].enter
        with machine.profile(symbols=symbols):
            assert machine.vcpus[0].enter is not plain
        assert machine.vcpus[0].enter is plain


def test_misuse_is_refused() -> None:
    machine, _ = _machine(_BUSY)
    with machine:
        with pytest.raises(UsageError, match="interval"):
            machine.profile(interval=0)
        profile = machine.profile()
        with profile:
            pass
        with pytest.raises(UsageError, match="once"):
            profile.start()
        machine.start()
        try:
            with pytest.raises(UsageError, match="stands"):
                machine.profile().start()
        finally:
            machine.stop()


def test_processors_that_never_run_are_said_to() -> None:
    with Machine(vcpus=2) as machine:
        machine.load(FlatImage(b"\xfa\xf4", _ORG, "real"))
        with machine.profile() as profile:
            pass
    assert profile.text().splitlines()[:2] == ["vCPU 0: never entered", "vCPU 1: never entered"]
    assert profile.python_share == 0.0
