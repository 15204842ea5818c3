"""What a request to a virtio device costs: exits, which are exact, and time. The device answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kvmpy import End, Machine
from kvmpy.bench.contenders import BenchError
from kvmpy.bench.rows import Row, Samples, Target
from kvmpy.bench.session import Session
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit
from kvmpy.virtio import Entropy, Feature, VirtioMmio
from kvmpy.virtio import mmio_registers as reg

__all__ = ["measure"]

PROGRAM = "guest_programs/virtio_requests"
ADDRESS, RESULT = 0xD000_0000, 0x8000
ROUNDS = 400
EVENT_IDX = 1 << Feature.EVENT_IDX

_FLAGS = (
    "-std=gnu11", "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie", "-fno-stack-protector",
    "-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-mno-red-zone", "-mgeneral-regs-only",
    f"-I{Path(__file__).parents[1] / 'guest' / 'include'}",
    "-Wl,-Ttext=0x100000,--build-id=none,-z,max-page-size=0x1000",
)  # fmt: skip


class Work(NamedTuple):
    """Rounds of `batch` requests each. The most exits of a round are `exits`."""

    name: str
    exits: int
    batch: int = 1
    wanted: int = EVENT_IDX
    interrupt: bool = True
    ioeventfd: bool = False
    irqfd: bool = True
    ring: int = 0


WORKS = (
    Work("one", 3),
    Work("one, interrupt by ioctl", 3, irqfd=False),
    Work("one, ioeventfd", 2, ioeventfd=True),
    Work("32, no event index", 3, batch=32, wanted=0),
    Work("32", 3, batch=32),
    Work("32, ioeventfd", 2, batch=32, ioeventfd=True),
    Work("one, polled", 1, interrupt=False, ring=3),
    Work("one, ioeventfd, polled", 0, interrupt=False, ioeventfd=True, ring=3),
    Work("32, ioeventfd, polled", 0, batch=32, interrupt=False, ioeventfd=True, ring=3),
)


def measure(session: Session) -> list[Row]:
    """Exits of a round, and microseconds of it, by a driver in C. Ring 3 where it polls: native on all hosts."""
    if not session.has_c():
        return []
    rows = []
    for work in WORKS:
        taken = [_play(session, work) for _ in range(session.rounds)]
        exits, times = (Samples(tuple(values)) for values in zip(*taken, strict=True))
        rows.append(Row(f"virtio requests: {work.name}", "exits", exits, target=Target(work.exits)))
        rows.append(Row(f"virtio requests: {work.name}", "us", times))
    return rows


def _play(session: Session, work: Work) -> tuple[float, float]:
    """Exits and microseconds of a round."""
    rounds = session.count(ROUNDS)
    numbers = (
        f"-DADDRESS={ADDRESS:#x}", "-DDEVICE_ID=4", f"-DWANTED={work.wanted:#x}ULL", f"-DRESULT={RESULT:#x}",
        f"-DINTERRUPT={int(work.interrupt)}", f"-DBATCH={work.batch}", f"-DROUNDS={rounds}",
    )  # fmt: skip
    (session.contenders.folder / PROGRAM).parent.mkdir(exist_ok=True)
    program = session.contenders.build(PROGRAM, *_FLAGS, *numbers)
    with Machine(memory=4 << 20) as machine:
        entropy = Entropy(lambda length: b"\x5a" * length)
        machine.add(VirtioMmio(entropy, address=ADDRESS, irq=5, ioeventfd=work.ioeventfd, irqfd=work.irqfd))
        machine.add(DebugExit())
        machine.load(ElfImage(program, ring=work.ring))
        outcome = machine.run(timeout=60)
        if outcome.end != End.EXITED or outcome.code != 1:
            raise BenchError(f"the guest of the virtio requests failed ({work.name}): {outcome}")
        statistics = machine.statistics()
        exits = sum(
            statistics.count("mmio", ADDRESS + register)
            for register in (reg.QUEUE_NOTIFY, reg.INTERRUPT_STATUS, reg.INTERRUPT_ACK)
        )
        return exits / rounds, session.microseconds(machine.memory.read_u64(RESULT)) / rounds
