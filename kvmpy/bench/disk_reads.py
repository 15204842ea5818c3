"""Reads from a virtio disk whose image is in the host's page cache: what the device itself costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from kvmpy.bench.contenders import BenchError
from kvmpy.bench.exit_cost import machine_result
from kvmpy.bench.rom_programs import VIRTIO_MMIO, rom_program
from kvmpy.bench.rows import Row, Sampler, Target, alternate
from kvmpy.bench.session import Session
from kvmpy.virtio import Block, VirtioMmio

__all__ = ["measure"]

IMAGE_SIZE = 32 << 20


class Work(NamedTuple):
    """Requests of `size` bytes, `depth` of them under way, each `stride` requests further on in the image."""

    name: str
    size: int
    depth: int
    stride: int
    requests: int
    target: float


WORKS = (
    Work("4 KiB, scattered, 32 under way", 0x1000, 32, 1021, 6000, 0.5),
    # QEMU makes one read of adjacent ones.
    Work("4 KiB, adjacent, 32 under way", 0x1000, 32, 1, 6000, 0.5),
    Work("64 KiB, one at a time", 0x1_0000, 1, 1, 400, 0.8),
    Work("64 KiB, 8 under way", 0x1_0000, 8, 1, 800, 0.8),
    Work("64 KiB, 32 under way", 0x1_0000, 32, 1, 800, 0.8),
    Work("1 MiB, 2 under way", 0x10_0000, 2, 1, 80, 0.8),
)


def measure(session: Session) -> list[Row]:
    """Against QEMU's virtio-blk on virtio-mmio, with the same guest and the same image."""
    if not session.has_c():
        return []
    image = session.contenders.folder / "disk.img"
    image.write_bytes(os.urandom(1 << 20) * (IMAGE_SIZE >> 20))
    return [_row(session, work, image) for work in WORKS]


def _row(session: Session, work: Work, image: Path) -> Row:
    count = session.count(work.requests)
    contenders = session.contenders
    rom = rom_program(
        contenders, "disk_reads",
        BYTES=work.size, DEPTH=work.depth, STRIDE=work.stride, REQUESTS=count, DISK=VIRTIO_MMIO,
    )  # fmt: skip

    def rate(ticks: int) -> float:
        """MiB per second."""
        if not ticks:
            raise BenchError(f"the guest could not read from the disk ({work.name})")
        return count * work.size / (1 << 20) / (session.microseconds(ticks) / 1e6)

    samplers: dict[str, Sampler] = {
        "kvmpy": lambda: rate(machine_result(rom, VirtioMmio(Block(image), address=VIRTIO_MMIO)))
    }
    if session.has_qemu():
        disk = (
            "-global", "virtio-mmio.force-legacy=false",
            "-drive", f"if=none,id=disk,format=raw,cache=writeback,file={image}",
            "-device", "virtio-blk-device,drive=disk,bus=virtio-mmio-bus.0",
        )  # fmt: skip
        samplers["QEMU"] = lambda: rate(contenders.qemu_result(rom, *disk))
    taken = alternate(session.rounds, samplers)
    ratios = {"QEMU": Target(work.target, at_least=True)}
    return Row.of(f"virtio disk reads, {work.name}", "MiB/s", taken, ratios=ratios)
