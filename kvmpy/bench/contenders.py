"""What kvmpy is compared with: C programs compiled on the spot, and QEMU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from kvmpy.bench import guests
from kvmpy.errors import KvmpyError

__all__ = ["C_SOURCES", "BenchError", "CProgram", "Contenders", "milliseconds_until"]

C_SOURCES = Path(__file__).parent
"""Where the C programs are."""

_CFLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
_SECONDS = 60.0
"""The longest that one program may take."""

_MICROVM = "microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,x-option-roms=off,isa-serial="
_QEMU_DEVICES = (
    "-chardev", "file,id=result,path=/dev/stdout",
    "-device", f"isa-debugcon,iobase={guests.RESULT_PORT:#x},chardev=result",
    "-device", "pc-testdev",
)  # fmt: skip


# Not -cpu host: QEMU 7.2 aborts with it where an MSR cannot be set. qemu64's sse3 is missing in some KVMs.
_QEMU_LEAST = (
    "-cpu", "qemu64,-sse3", "-m", "16", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
)  # fmt: skip


class BenchError(KvmpyError):
    """A contender could not be built, or did not do what it should."""


def milliseconds_until(text: bytes, *command: str, stderr: bool = False) -> float:
    """From starting a process until it has written `text` to its standard output, or error. It is ended then.

    Raises BenchError when it ends by itself before.
    """
    begin = time.perf_counter_ns()
    stream, other = ("stderr", "stdout") if stderr else ("stdout", "stderr")
    streams = {stream: subprocess.PIPE, other: subprocess.DEVNULL}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, bufsize=0, **streams) as process:  # type: ignore[call-overload]
        said = b""
        try:
            while text not in said:
                more = getattr(process, stream).read(0x1000)
                if not more:
                    raise BenchError(f"{' '.join(command)}\nended without a word of {text!r}: {said[-1000:]!r}")
                said += more
            return (time.perf_counter_ns() - begin) / 1e6
        finally:
            process.kill()


class CProgram:
    """A running program of C_SOURCES: it reads a line, does what that says, and prints a line."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line: str | int) -> str:
        """Give it a line and wait for its answer. Raises BenchError when it ends instead."""
        questions, answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        with suppress(BrokenPipeError):  # it has ended: the answer will be missing
            questions.write(f"{line}\n")
            questions.flush()
        answer = answers.readline()
        if not answer:
            raise BenchError(f"the C program {self._name} failed with status {self._process.wait(_SECONDS)}")
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        with suppress(BrokenPipeError):  # a question that nobody has read
            self._process.__exit__(None, None, None)


class Contenders:
    """Builds C programs in a folder that goes with `close`, and runs QEMU where it is installed.

    `no_c` and `no_qemu` say why there is none, or are empty.
    """

    def __init__(self, *, qemu: bool = True) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvmpy-bench-"))
        self._gcc = shutil.which("gcc")
        self._qemu = shutil.which("qemu-system-x86_64")
        self._programs: dict[str, CProgram] = {}
        self.no_c = "" if self._gcc else "gcc is not installed (Debian package gcc)"
        self.no_qemu = "" if self._qemu else "qemu-system-x86_64 is not installed (Debian package qemu-system-x86)"
        if not qemu:
            self.no_qemu = "not asked for"

    def close(self) -> None:
        """End the programs and delete them."""
        for program in self._programs.values():
            program.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Contenders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # C

    def program(self, name: str) -> CProgram:
        """The C program `name`, built and started at its first use."""
        if name not in self._programs:
            self._programs[name] = CProgram(self.build(name))
        return self._programs[name]

    def library(self, name: str) -> ctypes.CDLL:
        """A C source as a library, loaded the way `kvmpy.kvm.descriptor` loads the C library."""
        return ctypes.CDLL(str(self.build(name, "-shared", "-fPIC")), use_errno=True)

    def build(self, name: str, *flags: str) -> Path:
        """Compile one source of C_SOURCES. Raises BenchError with what the compiler said."""
        if self._gcc is None:
            raise BenchError(self.no_c)
        path = self.folder / name
        command = [self._gcc, *_CFLAGS, *flags, "-o", str(path), str(C_SOURCES / f"{name}.c")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise BenchError(f"{' '.join(command)}\n{done.stderr}")
        return path

    # QEMU

    def qemu_version(self) -> str:
        """What QEMU calls itself."""
        if self._qemu is None:
            return ""
        done = subprocess.run([self._qemu, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False)
        return done.stdout.partition("\n")[0]

    def qemu_start(self, rom: Path) -> float:
        """Milliseconds from starting QEMU with the firmware `rom`, and nothing else, to its end."""
        start = time.perf_counter_ns()
        with self._run_qemu(rom):
            pass
        return (time.perf_counter_ns() - start) / 1e6

    def qemu_until(self, text: bytes, *arguments: str) -> float:
        """Milliseconds from starting QEMU's PC with these arguments until it writes `text` to its standard output."""
        if self._qemu is None:
            raise BenchError(self.no_qemu)
        return milliseconds_until(text, self._qemu, "-machine", "pc,accel=kvm", *_QEMU_LEAST, *arguments)

    def qemu_result(self, rom: Path, *devices: str, serial: Path | None = None) -> int:
        """What the firmware's guest wrote to its result port; `serial` is where the 16550 writes to."""
        with self._run_qemu(rom, *_QEMU_DEVICES, *devices, serial=serial) as process:
            result = cast(IO[bytes], process.stdout).read()
        if len(result) != 4:
            raise BenchError(f"QEMU's guest wrote {len(result)} bytes, not 4")
        return int.from_bytes(result, "little")

    @contextmanager
    def _run_qemu(self, rom: Path, *devices: str, serial: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """QEMU's quickest machine, with as little in it as possible, until its guest has ended it."""
        if self._qemu is None:
            raise BenchError(self.no_qemu)
        command = [
            self._qemu, "-machine", _MICROVM + ("on" if serial else "off"), *_QEMU_LEAST, "-bios", str(rom),
            "-device", f"isa-debug-exit,iobase={guests.EXIT_PORT:#x},iosize=4", *devices,
        ]  # fmt: skip
        if serial is not None:
            command += ["-serial", f"file:{serial}"]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                yield process
                said = process.communicate(timeout=_SECONDS)[1]
            finally:
                process.kill()
        if process.returncode != 1:  # isa-debug-exit: (0 << 1) | 1
            raise BenchError(f"{' '.join(command)}\nstatus {process.returncode}\n{said.decode(errors='replace')}")
