"""A machine in 150 lines for tests of the gdb server: memory, two threads, four instructions. It knows no KVM.

It executes NOP, JMP rel8, INC (of rax, as FF C0 with any REX prefix), HLT (ends the run); anything else stops with
SIGILL. Each thread that runs does so in a thread of its own, as vCPUs do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from kvmpy.debug.gdb.architecture import Architecture
from kvmpy.debug.gdb.target import Point, Reason, Report, RunEnded, Signal, TargetError, ThreadStopped

__all__ = ["CODE", "ToyTarget"]

CODE = 0x1000


class ToyTarget:
    """64 KiB of memory from 0, pc at CODE. `log` notes what the server asked for."""

    def __init__(self, code: bytes = b"\x90\xeb\xfd", *, threads: int = 2) -> None:
        self.memory = bytearray(0x10000)
        self.memory[CODE : CODE + len(code)] = code
        self.registers: dict[int, dict[str, int]] = {
            thread: {"pc": CODE, "rsp": 0x8000, "rflags": 2} for thread in range(1, threads + 1)
        }
        self.mode = Architecture.X86_64
        self.points: set[tuple[Point, int]] = set()
        self.log: list[str] = []
        self.outcome = RunEnded(0)
        self._report: Callable[[Report], None] | None = None
        self._interrupted = threading.Event()
        self._worker: threading.Thread | None = None

    # What the server asks for

    def connect(self, report: Callable[[Report], None]) -> ThreadStopped:
        self.log.append("connect")
        self._report = report
        return ThreadStopped(1)

    def disconnect(self) -> None:
        self.log.append("disconnect")
        self._halt()
        self._report = None
        self.points.clear()

    def kill(self) -> None:
        self.log.append("kill")
        self._halt()

    def wait_until_standing(self) -> None:
        pass

    def threads(self) -> Sequence[int]:
        return tuple(self.registers)

    def thread_name(self, thread: int) -> str:
        return f"toy {thread}"

    def thread_state(self, thread: int) -> str:
        return "standing"

    def architecture(self) -> Architecture:
        return self.mode

    def has_avx(self) -> bool:
        return False

    def read_registers(self, thread: int, names: Sequence[str]) -> Sequence[int | None]:
        registers = self.registers[thread]
        return [None if name == "k_gs_base" else registers.get(name, 0) for name in names]

    def write_registers(self, thread: int, values: Mapping[str, int]) -> None:
        if "cr0" in values:
            raise TargetError("cr0 is carved in stone")
        self.registers[thread].update(values)

    def read_memory(self, thread: int, address: int, length: int) -> bytes:
        if address >= len(self.memory):
            raise TargetError(f"nothing at {address:#x}")
        return bytes(self.memory[address : address + length])

    def write_memory(self, thread: int, address: int, data: bytes) -> None:
        if address + len(data) > len(self.memory):
            raise TargetError(f"nothing at {address:#x}")
        self.memory[address : address + len(data)] = data

    def insert(self, point: Point, address: int, length: int) -> None:
        if point is Point.READ:
            raise TargetError("no read watchpoints")
        self.points.add((point, address))

    def remove(self, point: Point, address: int, length: int) -> None:
        self.points.discard((point, address))

    def has_breakpoint(self, address: int) -> bool:
        return (Point.SOFTWARE, address) in self.points or (Point.HARDWARE, address) in self.points

    def monitor(self, thread: int, command: str) -> str:
        return f"{command} of thread {thread}" if command != "long" else "x" * 100_000

    def resume(self, running: Sequence[int], stepping: int | None) -> None:
        self.log.append(f"resume {list(running)} step {stepping}")
        self._interrupted.clear()
        thread = running[0] if stepping is None else stepping
        self._worker = threading.Thread(target=self._run, args=(thread, stepping is not None))
        self._worker.start()

    def interrupt(self) -> None:
        self._interrupted.set()

    # What it does then

    def _halt(self) -> None:
        self._interrupted.set()
        if self._worker is not None:
            self._worker.join()

    def _run(self, thread: int, once: bool) -> None:
        report = self._report
        assert report is not None
        registers = self.registers[thread]
        first = True
        while True:
            pc = registers["pc"]
            if not first:
                for point, reason in (
                    (Point.SOFTWARE, Reason.SOFTWARE_BREAKPOINT),
                    (Point.HARDWARE, Reason.HARDWARE_BREAKPOINT),
                ):
                    if (point, pc) in self.points:
                        return report(ThreadStopped(thread, reason=reason))
                if once:
                    return report(ThreadStopped(thread))
                if self._interrupted.is_set():
                    return report(ThreadStopped(thread, Signal.INT))
                time.sleep(0.0001)
            first = False
            ended = self._execute(registers)
            if ended is not None:
                return report(ended if isinstance(ended, RunEnded) else ThreadStopped(thread, ended))

    def _execute(self, registers: dict[str, int]) -> RunEnded | Signal | None:
        pc = registers["pc"]
        code = bytes(self.memory[pc : pc + 3])
        if code[:1] == b"\x90":
            registers["pc"] = pc + 1
        elif code[:1] == b"\xeb":
            registers["pc"] = pc + 2 + int.from_bytes(code[1:2], "little", signed=True)
        elif code[1:3] == b"\xff\xc0":
            registers["rax"] = registers.get("rax", 0) + 1
            registers["pc"] = pc + 3
        elif code[:1] == b"\xf4":
            return self.outcome
        else:
            return Signal.ILL
        return None
