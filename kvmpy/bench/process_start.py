"""From starting a process to its end: `python hello.py`, and what of that is Python, the import, and not QEMU.

Every process is `sys.executable -I`, which ignores PYTHON* variables: so PYTHONDONTWRITEBYTECODE does not keep the
bytecode caches from being written by the first, uncounted run, and no shim is in the way of the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import kvmpy
from kvmpy.bench.contenders import BenchError
from kvmpy.bench.rows import Row, Sampler, Target, alternate
from kvmpy.bench.session import Session

__all__ = ["interpreter", "measure"]

HELLO = Path(__file__).with_name("hello.py")
IMPORT = "from kvmpy import Hlt, IoOut, Kvm"
NOTE = "sys.executable -I, bytecode cached"

_ROOT = Path(kvmpy.__file__).parent.parent


def measure(session: Session) -> list[Row]:
    """The whole process, and what importing the names of hello.py adds to an empty one."""
    python = interpreter()
    samplers: dict[str, Sampler] = {
        "kvmpy": lambda: _milliseconds(*python, str(HELLO)),
        "python -c pass": lambda: _milliseconds(*python, "-c", "pass"),
        "import": lambda: _milliseconds(*python, "-c", IMPORT),
    }
    if session.has_qemu():
        rom = session.firmware("exit")
        samplers["QEMU microvm"] = lambda: session.contenders.qemu_start(rom)
    taken = alternate(2 * session.rounds, samplers)
    imported, empty = taken.pop("import"), taken["python -c pass"]
    hello = Row.of(
        "whole process, python hello.py", "ms", taken,
        target=Target(40), ratios={"QEMU microvm": Target(1.0)}, note=NOTE,
    )  # fmt: skip
    return [hello, Row(f"{IMPORT} adds", "ms", imported.minus(empty), target=Target(25), note=NOTE)]


def interpreter() -> tuple[str, ...]:
    """The interpreter, with the options by which it finds this kvmpy and does not read PYTHON* variables."""
    command = [sys.executable, "-I", "-c", "import kvmpy; print(kvmpy.__file__)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.stdout.strip() != kvmpy.__file__:
        raise BenchError(
            f"{sys.executable} -I imports another kvmpy than this one, or none; install it: "
            f"{sys.executable} -m pip install -e {_ROOT}"
        )
    return (sys.executable, "-I")


def _milliseconds(*command: str) -> float:
    start = time.perf_counter_ns()
    output = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    process = os.posix_spawn(command[0], command, os.environ, file_actions=output)
    _, status = os.waitpid(process, 0)
    if status:
        raise BenchError(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return (time.perf_counter_ns() - start) / 1e6
