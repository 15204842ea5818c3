"""The full barrier of the virtqueues is a lock of Python's: it has to be a locked instruction on this processor."""

from __future__ import annotations

import ctypes
import sys

import pytest


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="locks are no longer POSIX semaphores")
@pytest.mark.parametrize("function", ["sem_trywait", "sem_post"])
def test_taking_a_lock_is_a_locked_instruction(function: str) -> None:
    # CPython up to 3.12 takes a free lock by sem_trywait, and gives it back by sem_post (Python/thread_pthread.h).
    capstone = pytest.importorskip("capstone")
    address = ctypes.cast(getattr(ctypes.CDLL(None), function), ctypes.c_void_p).value
    assert address
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    instructions = list(disassembler.disasm(ctypes.string_at(address, 64), address))
    assert any(instruction.mnemonic.startswith("lock ") for instruction in instructions)
