"""Requests to a shared folder (virtio-9p), about a file in the host's page cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from kvmpy.bench.contenders import BenchError
from kvmpy.bench.exit_cost import machine_result
from kvmpy.bench.rom_programs import VIRTIO_MMIO, rom_program
from kvmpy.bench.rows import Row, Sampler, alternate
from kvmpy.bench.session import Session
from kvmpy.virtio import Plan9, VirtioMmio

__all__ = ["measure"]

FILE_SIZE = 16 << 20


class Work(NamedTuple):
    """Reads of `size` bytes, `depth` of them under way; with size 0 questions for the file's attributes."""

    name: str
    size: int
    depth: int
    requests: int


WORKS = (
    Work("attributes, one at a time", 0, 1, 1000),
    Work("64 KiB read, one at a time", 0x1_0000, 1, 300),
    Work("64 KiB read, 8 under way", 0x1_0000, 8, 600),
)


def measure(session: Session) -> list[Row]:
    """Against QEMU's virtio-9p on virtio-mmio, with the same guest and the same folder."""
    if not session.has_c():
        return []
    folder = session.contenders.folder / "shared"
    folder.mkdir()
    (folder / "file").write_bytes(os.urandom(1 << 20) * (FILE_SIZE >> 20))
    return [_row(session, work, folder) for work in WORKS]


def _row(session: Session, work: Work, folder: Path) -> Row:
    count = session.count(work.requests)
    contenders = session.contenders
    rom = rom_program(
        contenders, "shared_folder",
        BYTES=work.size, DEPTH=work.depth, REQUESTS=count, FILE_BYTES=FILE_SIZE, FOLDER=VIRTIO_MMIO,
    )  # fmt: skip

    def figure(ticks: int) -> float:
        """MiB per second, or microseconds of a request."""
        if not ticks:
            raise BenchError(f"the guest's request failed ({work.name})")
        microseconds = session.microseconds(ticks)
        return count * work.size / (1 << 20) / (microseconds / 1e6) if work.size else microseconds / count

    samplers: dict[str, Sampler] = {
        "kvmpy": lambda: figure(machine_result(rom, VirtioMmio(Plan9(folder, read_only=True), address=VIRTIO_MMIO)))
    }
    if session.has_qemu():
        shared = (
            "-global", "virtio-mmio.force-legacy=false",
            "-fsdev", f"local,id=shared,path={folder},security_model=none,readonly=on",
            "-device", "virtio-9p-device,fsdev=shared,mount_tag=host,bus=virtio-mmio-bus.0",
        )  # fmt: skip
        samplers["QEMU"] = lambda: figure(contenders.qemu_result(rom, *shared))
    taken = alternate(session.rounds, samplers)
    return Row.of(f"virtio shared folder, {work.name}", "MiB/s" if work.size else "us", taken)
