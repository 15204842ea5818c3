"""Guests in C for the benchmarks, as ROMs that every contender can run: see guest_programs/ring3_rom.h."""

from __future__ import annotations

from pathlib import Path

from kvmpy.bench import guests
from kvmpy.bench.contenders import C_SOURCES, BenchError, Contenders

__all__ = ["VIRTIO_MMIO", "rom_program"]

VIRTIO_MMIO = 0xFEB0_0000
"""Where QEMU's microvm has its first virtio-mmio device."""

_LOAD_ADDRESS = 0x2_0000
_LARGEST = 0x4000
"""Bytes that the program copies into RAM."""

_FLAGS = (
    "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie", "-fno-stack-protector", "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables", "-mno-red-zone", "-mgeneral-regs-only",
    f"-I{C_SOURCES.parent / 'guest' / 'include'}",
    f"-DRESULT_PORT={guests.RESULT_PORT:#x}", f"-DEXIT_PORT={guests.EXIT_PORT:#x}",
    f"-Wl,--section-start=.entry={_LOAD_ADDRESS:#x},-Ttext={_LOAD_ADDRESS + 0x200:#x},-Tbss=0x100000",
    f"-Wl,-e,{_LOAD_ADDRESS:#x},--build-id=none,--oformat=binary",
)  # fmt: skip


def rom_program(contenders: Contenders, name: str, **numbers: int) -> Path:
    """A file with the ROM of guest_programs/`name`.c, compiled with these macros. Needs gcc.

    Raises BenchError when it does not compile, or is too large.
    """
    program = f"guest_programs/{name}"
    (contenders.folder / program).parent.mkdir(exist_ok=True)
    code = contenders.build(program, *_FLAGS, *(f"-D{macro}={value:#x}" for macro, value in numbers.items()))
    content = code.read_bytes()
    if len(content) > _LARGEST:
        raise BenchError(f"{name}.c makes {len(content)} bytes, more than it copies")
    path = contenders.folder / f"{'-'.join((name, *map(str, numbers.values())))}.rom"
    path.write_bytes(guests.rom_of(content))
    return path
