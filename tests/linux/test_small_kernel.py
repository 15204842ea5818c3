"""The kernel of scripts/build-kernel: a session at its console, with one processor and with more; gdb; a profile.

What a host without VT-x or AMD-V has to be helped with on the way: instructions that KVM's emulator does not know,
SYSCALL, and vector registers over context switches.
"""

import hashlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gdb_remote import gdb_command
from kvmpy import End
from kvmpy.debug.gdb.server import GdbServer
from kvmpy.debug.symbols import SymbolTable
from linux_session import LinuxSession, on_the_terminal, small_kernel

pytestmark = [pytest.mark.kvm, pytest.mark.linux, pytest.mark.slow]

BOOT_SECONDS = 480
"""Twenty seconds on a computer with nothing else to do; others may be at work."""
COMMAND_SECONDS = 120
EMULATED = "console=ttyS0 clearcpuid=erms,fsrm,smap,popcnt"
"""The command line of `kvmpy boot --no-direct` where KVM executes ring 0 in software: without what is slow there."""
VECTOR_STATE = Path(__file__).with_name("vector_state.c")
STREAM = random.Random(4).randbytes(300_000)
ROUNDS = 60
SUM = "1.644933828429693"
"""What vector_state prints on any processor: IEEE 754 leaves no choice."""


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Tells whoever watches the tests how far the guest is."""
    return on_the_terminal(request.config)


@pytest.fixture(scope="module")
def vector_state(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """tests/linux/vector_state.c as a static program."""
    if shutil.which("gcc") is None:
        pytest.skip("needs `gcc` (Debian package gcc)")
    program = tmp_path_factory.mktemp("vector_state") / "vector_state"
    subprocess.run(["gcc", "-O2", "-mavx", "-static", "-Wall", "-Werror", "-o", program, VECTOR_STATE], check=True)
    return program.read_bytes()


@pytest.mark.deadline(BOOT_SECONDS + 8 * COMMAND_SECONDS)
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_session_at_the_console_works_and_ends_with_the_power_off(
    vcpus: int, vector_state: bytes, say: Callable[[str], None]
) -> None:
    files = {"bin/vector_state": vector_state, "stream": STREAM}
    cmdline = EMULATED if vcpus > 1 else None
    with LinuxSession(small_kernel(), vcpus=vcpus, cmdline=cmdline, files=files, say=say) as session:
        said = session.boot(BOOT_SECONDS)
        say(f"{session.seconds_to_init:.1f} s to the first program, {vcpus} vCPUs")
        assert "Linux version 6.1." in said
        assert "BUG:" not in said
        assert "WARNING:" not in said

        def type_in(command: str) -> str:
            return session.run(command, COMMAND_SECONDS)

        assert re.match(r"Linux \(none\) 6\.1\.\d+ #\d+ SMP .* x86_64 GNU/Linux\n$", type_in("uname -a"))

        cpuinfo = type_in("cat /proc/cpuinfo")
        assert re.findall(r"^processor\s*: (\d+)$", cpuinfo, re.MULTILINE) == [str(n) for n in range(vcpus)]
        for flags in re.findall(r"^flags\s*: (.*)$", cpuinfo, re.MULTILINE):
            assert {"fpu", "sse2", "avx", "xsave", "hypervisor"} <= set(flags.split())

        assert type_in("(echo one; seq 2 200) | grep 7 | sort -n | tail -n 1") == "197\n"

        assert type_in("cat /stream | md5sum") == f"{hashlib.md5(STREAM).hexdigest()}  -\n"

        # Two at once on one processor, which yield to each other with all vector registers full.
        answer = type_in(f"taskset 1 vector_state 1 {ROUNDS} & taskset 1 vector_state 2 {ROUNDS}; wait")
        results = re.findall(r"^(\d) ok, (\d+) switches, sum ([\d.]+)$", answer, re.MULTILINE)
        assert sorted((seed, total) for seed, _, total in results) == [("1", SUM), ("2", SUM)], answer
        assert all(int(switches) >= ROUNDS // 6 for _, switches, _ in results)  # one may end before the other begins

        outcome = session.power_off(COMMAND_SECONDS)
        assert outcome.end is End.SHUTDOWN, outcome
        assert outcome.ok


@pytest.mark.deadline(BOOT_SECONDS)
def test_four_processors_come_up(say: Callable[[str], None]) -> None:
    with LinuxSession(small_kernel("bzImage"), vcpus=4, cmdline=EMULATED, say=say) as session:
        session.load()
        session.machine.start()
        session._expect("smp: Brought up 1 node, 4 CPUs", BOOT_SECONDS)
        session._expect("Total of 4 processors activated", BOOT_SECONDS)
        session.machine.stop()


@pytest.mark.deadline(BOOT_SECONDS)
def test_gdb_breaks_in_start_kernel_steps_prints_and_goes_on(say: Callable[[str], None]) -> None:
    vmlinux = small_kernel()
    with LinuxSession(vmlinux, say=say) as session:
        session.load()
        with GdbServer(session.machine, wait=True) as server:
            session.machine.start()
            command = gdb_command(
                server.address, "hbreak start_kernel", "continue", "info registers rip", "backtrace 1",
                "print command_line", "next", "next", "print init_task.comm", "print/x init_task.pid",
                "stepi", "ptype struct list_head", "delete", "hbreak rest_init", "continue", "print saved_command_line",
                "print nr_cpu_ids", "delete", "detach", program=vmlinux,
            )  # fmt: skip
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=BOOT_SECONDS, check=False,
            )  # fmt: skip
            said = done.stdout
            assert re.search(
                r"^(Hardware assisted b|B)reakpoint 1, start_kernel \(\) at .*init/main\.c:\d+$", said, re.M
            ), said
            assert "#0  start_kernel ()" in said
            assert '$2 = "swapper' in said
            assert "$3 = 0x0\n" in said
            assert "struct list_head *next;" in said
            assert re.search(r"reakpoint 2, (0x[0-9a-f]+ in )?rest_init \(", said), said
            assert re.search(r'^\$4 = 0x[0-9a-f]+ ".*console=ttyS0"$', said, re.MULTILINE), said
            assert "$5 = 1\n" in said
            session._expect("userspace reached", BOOT_SECONDS)  # it goes on without gdb
        session.machine.stop()


@pytest.mark.deadline(BOOT_SECONDS)
@pytest.mark.parametrize("directly", [True, False], ids=["direct", "emulated"])
def test_a_profile_shows_where_the_time_goes_and_how_much_of_it_is_ours(
    directly: bool, say: Callable[[str], None]
) -> None:
    """The two figures of each way to run ring 0; where KVM has VT-x or AMD-V below it, both ways are the same."""
    with LinuxSession(small_kernel("bzImage"), cmdline=None if directly else EMULATED, say=say) as session:
        session.load()
        if not directly:
            for runner in session.machine.runners:
                runner.runs_ring_0_directly = False
        symbols = SymbolTable.from_system_map(small_kernel("System.map"))
        began = os.times()
        with session.machine.profile(symbols=symbols) as profile:
            session.machine.start()
            session._expect("Run /init as init process", BOOT_SECONDS)
            ended = os.times()
            session.machine.stop()
        statistics = session.machine.statistics()
    for line in (*str(statistics).splitlines(), *profile.text(12).splitlines()):
        say(line)
    say(
        f"{'direct' if directly else 'emulated'}: {profile.times()[0].wall:.1f} s to /init, of that"
        f" {sum(ended[:2]) - sum(began[:2]):.1f} s of processor time; the library's share is {profile.python_share:.1%}"
    )
    kernel = [each for each in profile.functions() if not each.name.startswith("(")]
    assert sum(each.share for each in kernel) > 0.5
    assert all(each.name in symbols for each in kernel[:10])
    assert 0 < profile.python_share < 1
    assert statistics.count("port", 0x3F8, "write") > 1000  # the messages
