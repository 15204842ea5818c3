"""Hypercalls of our own, made by a C program with the guest's header."""

from __future__ import annotations

import pytest

from gnu_toolchain import compile_c
from kvmpy import End, Machine, MiB
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit, Hypercall, HypercallChannel

pytestmark = pytest.mark.kvm

CALLS = """
#include <kvmpy.h>

static const char text[] = "hello";

void _start(void)
{
    struct kvmpy_call six = { 2, { 1, 2, 3, 4, 5, 1UL << 63 }, 0 };

    if (CHECK_SIGNATURE && !kvmpy_has_hypercalls())
        kvmpy_exit(1);
    if (kvmpy_hypercall(1, (unsigned long)text, sizeof text - 1, 0) != 5)
        kvmpy_exit(2);
    if (kvmpy_call(&six) != -7)
        kvmpy_exit(3);
    if (kvmpy_hypercall(3, 0, 0, 0) != KVMPY_ENOSYS)
        kvmpy_exit(4);
    if (kvmpy_hypercall(1, 0xff000000, 1, 0) != KVMPY_EFAULT)
        kvmpy_exit(5);
    kvmpy_exit(0x55);
}
"""


@pytest.mark.parametrize("way", ["port", "register"])
def test_a_program_calls_the_host(way: str) -> None:
    flags = ["-DCHECK_SIGNATURE=1"]
    channel = HypercallChannel(address=None)
    if way == "register":
        flags = ["-DCHECK_SIGNATURE=0", "-DKVMPY_HYPERCALL_REGISTER=KVMPY_HYPERCALL_ADDRESS"]
        channel = HypercallChannel(port=None)
    said: list[bytes] = []
    arguments: list[tuple[int, ...]] = []

    def say(call: Hypercall) -> int:
        said.append(call.read(*call.arguments[:2]))
        return len(said[-1])

    def six(call: Hypercall) -> int:
        arguments.append(call.arguments)
        return -7

    with Machine(memory=4 * MiB) as machine:
        machine.add(DebugExit())
        machine.add(channel)
        channel.on(1, say)
        channel.on(2, six)
        machine.load(ElfImage(compile_c(CALLS, flags=tuple(flags)).elf))
        outcome = machine.run(timeout=20)
    assert (outcome.end, outcome.code) == (End.EXITED, 0x55 << 1 | 1)
    assert said == [b"hello"]
    assert arguments == [(1, 2, 3, 4, 5, 1 << 63)]
    assert (channel.calls, channel.counters) == ({1: 1, 2: 1}, {"unknown": 1, "bad_address": 1})
