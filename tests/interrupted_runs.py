"""A guest whose runs are interrupted by Ctrl-C again and again, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

from gnu_toolchain import assemble

_PROGRAM = """
import json, random, signal, sys, threading, time
from kvmpy import Machine
from kvmpy.boot import FlatImage

count, timeout = json.loads(sys.argv[2])
seen = []
interrupts = 0
finished = False
go = threading.Event()
main = threading.main_thread().ident

def send():
    global finished
    sent = 0
    go.wait()
    while interrupts < count or len(seen) < count:
        while interrupts < sent:  # one at a time: the second during a run raises at once, wherever that is
            time.sleep(0.0001)
        time.sleep(random.random() * 0.001)
        signal.pthread_kill(main, signal.SIGINT)
        sent += 1
    while interrupts < sent:
        time.sleep(0.0001)
    finished = True
    signal.pthread_kill(main, signal.SIGINT)

with Machine(memory=0x10000) as machine:
    machine.load(FlatImage(bytes.fromhex(sys.argv[1])))
    machine.map_ports(0x10, 1, write=lambda offset, size, value: seen.append(value))
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    while not finished:
        # One that falls between two runs is the program's and not the machine's: the outer except has it.
        try:
            go.set()
            while not finished:
                try:
                    machine.run(timeout=timeout)
                except KeyboardInterrupt:
                    interrupts += 1
        except KeyboardInterrupt:
            interrupts += 1
    try:
        sender.join()
    except KeyboardInterrupt:
        sender.join()

print([index for index in range(len(seen)) if seen[index] != (index + 1) & 0xFF])
"""


def values_lost_or_doubled(interrupts: int, timeout: float | None) -> str:
    """Where a guest's writes of 1, 2, 3 and so on went wrong in runs that so many SIGINTs ended; "[]" when nowhere.

    The guest makes at least as many writes as there are interrupts. `timeout` is that of each run.
    """
    code = assemble("1: inc al; out 0x10, al; jmp 1b")
    command = [sys.executable, "-c", _PROGRAM, code.hex(), json.dumps([interrupts, timeout])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
