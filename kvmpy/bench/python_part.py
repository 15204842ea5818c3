"""What Python adds to an exit: the run loop of a Machine over a stub that comes back at once in place of KVM_RUN.

The loop, its tables, the device and the call through ctypes are those of a real machine, and so is the shape of the
run page; only the ioctl is a C function that sets the exit reason and returns (kvm_run_stub.c). So this is the figure
that carries over to other hosts, and it can be measured without KVM.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from typing import Any, cast

from kvmpy.bench import guests
from kvmpy.bench.exit_cost import Register
from kvmpy.bench.rows import Row, Sampler, Target, alternate
from kvmpy.bench.session import Session
from kvmpy.devices.device import Region
from kvmpy.kvm.run_page import PIO_DATA, RunPage
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine.bus import Bus
from kvmpy.machine.run_loop import IO, MMIO, RunLoop
from kvmpy.memory.region import host_address_of

__all__ = ["measure"]

EXITS = 30_000
_PAGE_SIZE = 0x3000
_OUT, _IN = 1, 0

# The union of struct kvm_run at offset 32: `io` (direction, size, port, count, data_offset) and `mmio` (phys_addr,
# data, len, is_write), see KVM API, chapter 5.
_IO_EXIT = "<BBHIQ"
_MMIO_EXIT = "<QQIB"


class _StubVcpu:
    """As much of a vCPU as the run loop sees: a run page, and what to call in place of KVM_RUN."""

    def __init__(self, stub: ctypes.CDLL) -> None:
        memory = os.memfd_create("kvm_run")
        try:
            os.ftruncate(memory, _PAGE_SIZE)
            self.page = RunPage(memory, _PAGE_SIZE)
        finally:
            os.close(memory)
        self._address = ctypes.c_void_p(host_address_of(self.page.u8))
        self._begin: Any = stub.stub_begin
        self.enter: Any = stub.stub_run
        self.entry = (0, 0, 0)

    def exits(self, count: int, reason: int, layout: str, *fields: int) -> None:
        """Prepare `count` exits of one kind."""
        struct.pack_into(layout, self.page.u8, 32, *fields)
        self._begin(self._address, ctypes.c_uint(reason), ctypes.c_ulong(count))


def measure(session: Session) -> list[Row]:
    """Nanoseconds of Python per exit; of that, what the call through ctypes takes."""
    if not session.has_c():
        return []
    vcpu = _StubVcpu(session.contenders.library("kvm_run_stub"))
    loop = _run_loop(vcpu)
    count = session.count(EXITS)

    def exits(reason: int, layout: str, *fields: int) -> Sampler:
        def sample() -> float:
            vcpu.exits(count, reason, layout, *fields)
            start = time.perf_counter_ns()
            loop.run()
            return (time.perf_counter_ns() - start) / count

        return sample

    def calls() -> float:
        vcpu.exits(count, IO, _IO_EXIT, _OUT, 1, guests.DEVICE_PORT, 1, PIO_DATA)
        enter, (fd, request, zero) = vcpu.enter, vcpu.entry
        start = time.perf_counter_ns()
        for _ in range(count):
            enter(fd, request, zero)
        return (time.perf_counter_ns() - start) / count

    samplers = {
        "port write": exits(IO, _IO_EXIT, _OUT, 1, guests.DEVICE_PORT, 1, PIO_DATA),
        "port read": exits(IO, _IO_EXIT, _IN, 1, guests.DEVICE_PORT, 1, PIO_DATA),
        "MMIO write": exits(MMIO, _MMIO_EXIT, guests.DEVICE_MMIO, 0, 4, 1),
        "MMIO read": exits(MMIO, _MMIO_EXIT, guests.DEVICE_MMIO, 0, 4, 0),
        "ctypes": calls,
    }
    taken = alternate(session.rounds, samplers)
    calls_taken = taken.pop("ctypes")
    rows = [
        Row(f"{name}, Python alone", "ns", samples, target=Target(600 if name == "port write" else 900))
        for name, samples in taken.items()
    ]
    return [*rows, Row("of that, calling C through ctypes", "ns", calls_taken)]


def _run_loop(vcpu: _StubVcpu) -> RunLoop:
    ports, mmio = Bus("port", 1 << 16), Bus("mmio", 1 << 52)
    register = Register()
    ports.add(Region("port", guests.DEVICE_PORT, 4, "register", register.read, register.write))
    mmio.add(Region("mmio", guests.DEVICE_MMIO, 0x1000, "register", register.read, register.write))
    return RunLoop(
        cast(Vcpu, vcpu), ports, mmio,
        attend=lambda number: True, other=lambda event: True, guard=lambda handler: handler,
    )  # fmt: skip
