"""Benchmarks of virtio: requests take the exits that they should (counts are no timings), and guests do their work."""

import pytest

from kvmpy.bench import console_output, virtio_requests
from kvmpy.bench.contenders import Contenders
from kvmpy.bench.exit_cost import machine_result
from kvmpy.bench.rom_programs import VIRTIO_MMIO, rom_program
from kvmpy.bench.session import Session
from kvmpy.pytest_plugin.requirement import skip_or_fail
from kvmpy.virtio import VirtioConsole, VirtioMmio


@pytest.mark.parametrize("work", virtio_requests.WORKS, ids=lambda work: work.name)
def test_a_round_of_requests_takes_the_exits_that_it_should(
    work: virtio_requests.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtio_requests, "WORKS", (work,))
    with Contenders(qemu=False) as contenders:
        if contenders.no_c:
            skip_or_fail(contenders.no_c)
        exits, microseconds = virtio_requests.measure(Session(contenders, rounds=1, scale=0.01))
    assert (exits.unit, exits.samples.values, exits.met) == ("exits", (work.exits,), True)
    assert microseconds.samples.median > 0


@pytest.mark.parametrize("work", console_output.WORKS, ids=lambda work: work.name)
def test_the_console_guest_prints_its_lines(work: console_output.Work) -> None:
    printed = bytearray()
    with Contenders(qemu=False) as contenders:
        if contenders.no_c:
            skip_or_fail(contenders.no_c)
        numbers = {"BYTES": work.size, "DEPTH": work.depth, "REQUESTS": 100, "CONSOLE": VIRTIO_MMIO}
        rom = rom_program(contenders, "console_output", **numbers)
        ticks = machine_result(rom, VirtioMmio(VirtioConsole(sink=printed.extend), address=VIRTIO_MMIO))
    assert ticks > 0
    assert printed == (b"." * (work.size - 1) + b"\n") * (100 + 2 * work.depth)
