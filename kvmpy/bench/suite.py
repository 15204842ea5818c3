"""All benchmarks, by name, and what a run of them gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kvmpy import Kvm, __version__
from kvmpy.bench import (
    boot_time,
    console_output,
    disk_reads,
    exit_cost,
    instruction_completion,
    interpreter_lock,
    kick_latency,
    process_start,
    python_part,
    register_access,
    serial_output,
    shared_folder,
    virtio_requests,
    vm_lifecycle,
)
from kvmpy.bench.contenders import Contenders
from kvmpy.bench.host import describe_host
from kvmpy.bench.rows import Row
from kvmpy.bench.session import Session

__all__ = ["BENCHMARKS", "WITHOUT_KVM", "Results", "run_benchmarks"]

BENCHMARKS: dict[str, Callable[[Session], list[Row]]] = {
    # First, while this process is small and has no garbage.
    "memory": vm_lifecycle.measure_memory,
    "exits": exit_cost.measure,
    "python": python_part.measure,
    "serial": serial_output.measure,
    "virtio": virtio_requests.measure,
    "disk": disk_reads.measure,
    "console": console_output.measure,
    "folder": shared_folder.measure,
    "start": process_start.measure,
    "boot": boot_time.measure,
    "lifecycle": vm_lifecycle.measure_rate,
    "kicks": kick_latency.measure,
    "lock": interpreter_lock.measure,
    "registers": register_access.measure,
    "completion": instruction_completion.measure,
}
"""Name -> what measures its rows."""

WITHOUT_KVM = {"python"}
"""Benchmarks that need no /dev/kvm."""

_AMONG_OTHERS = {"virtio", "exits", "serial", "disk", "console", "folder", "kicks", "lock", "registers", "completion"}
"""Those that measure a guest which runs, and not how it comes and goes: see `_another_vm`."""


@dataclass(frozen=True, slots=True)
class Results:
    """What was measured, where, and what could not be compared with."""

    host: dict[str, str]
    rounds: int
    rows: dict[str, list[Row]]
    missing: dict[str, str]


@contextlib.contextmanager
def _another_vm() -> Iterator[None]:
    """Keep a VM while others come and go.

    KVM patches its own code when a host's first vCPU comes and when its last one goes; without this, the contenders
    would by chance run in one or the other of two states.
    """
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_vcpu()
        yield


def run_benchmarks(
    names: Iterable[str] = BENCHMARKS, *, rounds: int = 15, scale: float = 1.0, qemu: bool = True,
    began: Callable[[str], None] = lambda name: None,
) -> Results:  # fmt: skip
    """Run the named benchmarks, one after the other; `began` is told the name of each. See `Session` for the rest.

    Raises BenchError when a contender cannot be built or fails, KvmError when KVM refuses.
    """
    with Contenders(qemu=qemu) as contenders:
        session = Session(contenders, rounds, scale)
        host = {"kvmpy": __version__, **describe_host()}
        if version := contenders.qemu_version():
            host["QEMU"] = version
        rows = {}
        for name in names:
            began(name)
            with _another_vm() if name in _AMONG_OTHERS else contextlib.nullcontext():
                rows[name] = BENCHMARKS[name](session)
        return Results(host, rounds, rows, session.missing)
