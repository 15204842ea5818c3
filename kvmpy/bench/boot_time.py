"""From starting a process to what its guest prints: a firmware's first and last words, a kernel's first line.

Both are whole commands, `kvmpy` and `qemu-system-x86_64`, with the same image and 16 MiB; QEMU's machine is a PC with
as little in it as possible. The kernel has a Multiboot header, and both load it by themselves (QEMU by way of SeaBIOS).
"""

from __future__ import annotations

import os
from pathlib import Path

from kvmpy.bench import guests
from kvmpy.bench.contenders import milliseconds_until
from kvmpy.bench.process_start import interpreter
from kvmpy.bench.rows import Row, Sampler, Target, alternate
from kvmpy.bench.session import Session

__all__ = ["measure"]

SEABIOS = Path("/usr/share/seabios/bios.bin")
_BANNER = b"SeaBIOS (version"
_LAST_WORDS = b"No bootable device"
_SLOW_ROUNDS = 3
"""Where KVM runs guests in software, these take seconds each."""


def measure(session: Session) -> list[Row]:
    """SeaBIOS, where it is installed, and a Multiboot kernel."""
    rows = []
    if SEABIOS.exists():
        rows.append(_firmware(session, "SeaBIOS, to its first words", _BANNER, session.rounds))
        if session.scale >= 1:
            rows.append(_firmware(session, 'SeaBIOS, to "No bootable device"', _LAST_WORDS, _SLOW_ROUNDS))
    else:
        session.missing["SeaBIOS"] = f"{SEABIOS} is not there (Debian package seabios)"
    return [*rows, _kernel(session)]


def _firmware(session: Session, name: str, text: bytes, rounds: int) -> Row:
    """Its log comes from port 0x402, in both."""
    python = interpreter()
    run = (*python, "-m", "kvmpy", "run", "--firmware", str(SEABIOS), "--debug-console", "-", "--timeout", "60")
    samplers: dict[str, Sampler] = {"kvmpy": lambda: milliseconds_until(text, *run, stderr=True)}
    if session.has_qemu():
        # Without graphics, as kvmpy's machine is: then SeaBIOS prints on COM1, too.
        same = ("-bios", str(SEABIOS), "-machine", "graphics=off", "-serial", "null")
        log = ("-chardev", "file,id=log,path=/dev/stdout", "-device", "isa-debugcon,iobase=0x402,chardev=log")
        samplers["QEMU"] = lambda: session.contenders.qemu_until(text, *same, *log)
    return _row(name, samplers, min(rounds, session.rounds))


def _kernel(session: Session) -> Row:
    kernel = session.contenders.folder / "kernel"
    kernel.write_bytes(guests.MULTIBOOT)
    text = guests.MULTIBOOT_TEXT
    boot = (*interpreter(), "-m", "kvmpy", "boot", os.fspath(kernel), "--memory", "16M", "--timeout", "60")
    samplers: dict[str, Sampler] = {"kvmpy": lambda: milliseconds_until(text, *boot)}
    if session.scale >= 1 and session.has_qemu():
        samplers["QEMU"] = lambda: session.contenders.qemu_until(text, "-kernel", os.fspath(kernel), "-serial", "stdio")
    return _row("Multiboot kernel, to its first line", samplers, min(_SLOW_ROUNDS, session.rounds))


def _row(name: str, samplers: dict[str, Sampler], rounds: int) -> Row:
    taken = alternate(rounds, samplers)
    return Row.of(name, "ms", taken, ratios={"QEMU": Target(1.0)})
