"""Debian's own cloud kernel, as it comes from the package and with no command line but the console, to a shell and off.

Where KVM emulates ring 0 this needs `kvmpy.machine.direct_execution`, instructions in software, and the repair of
SYSCALL; on other hosts it is an ordinary boot.
"""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from linux_session import LinuxSession, cloud_kernel

pytestmark = [pytest.mark.kvm, pytest.mark.linux, pytest.mark.slow]

BOOT_SECONDS = 480
"""Half a minute on a computer with nothing else to do; others may be at work."""
COMMAND_SECONDS = 120
VECTOR_STATE = Path(__file__).with_name("vector_state.c")
_SUM = 1.644933828


@pytest.fixture(scope="module")
def vector_state(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if shutil.which("gcc") is None:
        pytest.skip("needs `gcc` (Debian package gcc)")
    program = tmp_path_factory.mktemp("vector_state") / "vector_state"
    subprocess.run(["gcc", "-O2", "-mavx2", "-static", "-o", program, VECTOR_STATE], check=True)
    return program.read_bytes()


@pytest.mark.deadline(BOOT_SECONDS + 10 * COMMAND_SECONDS)
def test_debian_s_kernel_boots_to_a_shell_in_which_a_session_works_and_switches_off(vector_state: bytes) -> None:
    kernel = cloud_kernel()
    with LinuxSession(kernel, files={"bin/vector_state": vector_state}, say=print) as session:
        said = session.boot(BOOT_SECONDS)
        assert "Kernel command line: console=ttyS0\r\n" in said
        assert "BUG:" not in said
        assert "WARNING:" not in said

        release = kernel.name.removeprefix("vmlinuz-")
        assert session.run("uname -a", COMMAND_SECONDS).split()[:3] == ["Linux", "(none)", release]

        cpu = dict(
            re.findall(r"^(\S[^\t:]*?)\s*: ?(.*)$", session.run("cat /proc/cpuinfo", COMMAND_SECONDS), re.MULTILINE)
        )
        assert cpu["processor"] == "0"
        assert {"fpu", "sse2", "avx2", "xsave", "hypervisor"} <= set(cpu["flags"].split())

        assert session.run("(echo one; echo two three) | tr a-z A-Z | cat", COMMAND_SECONDS) == "ONE\nTWO THREE\n"

        million = hashlib.md5(bytes(1_000_000)).hexdigest()
        answer = session.run("head -c 1000000 /dev/zero | md5sum", COMMAND_SECONDS)
        assert answer.split() == [million, "-"]

        # Three at a time, which yield to each other with all vector registers full.
        together = "for seed in 1 2 3; do vector_state $seed 40 & done; wait"
        results = re.findall(
            r"^(\d) ok, (\d+) switches, sum ([\d.]+)$", session.run(together, COMMAND_SECONDS), re.MULTILINE
        )
        assert sorted(seed for seed, _, _ in results) == ["1", "2", "3"]
        assert all(int(switches) >= 10 for _, switches, _ in results)
        assert {total for _, _, total in results} == {results[0][2]}
        assert float(results[0][2]) == pytest.approx(_SUM, abs=1e-9)

        assert session.run("sleep 1; echo slept", COMMAND_SECONDS) == "slept\n"

        outcome = session.power_off(COMMAND_SECONDS)
        assert outcome.end.name == "SHUTDOWN", outcome
        assert outcome.ok
