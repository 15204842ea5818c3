"""A guest written in C: compiled by gcc without a libc, linked for 1 MiB, loaded as an ELF file.

You learn: `ElfImage` puts a program into memory as its headers say and starts it in 64-bit mode with page tables ready.
A serial port prints for it, and a debug-exit port ends the run with a code. Ring 0 code wants -mno-red-zone (interrupts
push onto its stack) and -mgeneral-regs-only (some hosts run ring 0 in KVM's emulator, which knows no SSE).

Output::

    Primes below 50: 2 3 5 7 11 13 17 19 23 29 31 37 41 43 47
    outcome: exited, 15 primes
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from kvmpy import Machine, MiB
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit, Uart16550

SOURCE = Path(__file__).with_suffix(".c")
FREESTANDING = (
    "-O1 -Wall -ffreestanding -nostdlib -static -no-pie -fno-pie -fcf-protection=none -fno-stack-protector "
    "-fno-asynchronous-unwind-tables -mno-red-zone -mgeneral-regs-only -Wl,-Ttext=0x100000,--build-id=none"
)

if shutil.which("gcc") is None:
    raise SystemExit("c_guest.py needs gcc to compile c_guest.c. On Debian and Ubuntu: apt-get install gcc")

with tempfile.TemporaryDirectory() as folder, Machine(memory=16 * MiB) as machine:
    elf = Path(folder, "c_guest.elf")
    subprocess.run(["gcc", *FREESTANDING.split(), "-o", elf, SOURCE], check=True)
    console = machine.add(Uart16550())  # COM1: port 0x3F8
    machine.add(DebugExit())  # port 0xF4
    machine.load(ElfImage(elf))
    outcome = machine.run(timeout=10)
    print(console.text, end="")
    print(f"outcome: {outcome.end}, {(outcome.code or 0) >> 1} primes")  # the port makes (value << 1) | 1 of it
