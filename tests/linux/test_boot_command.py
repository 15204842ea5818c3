"""`kvmpy boot` with a Linux, as a person at a terminal has it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from linux_session import busybox, cloud_kernel, small_kernel
from prompt_terminal import PromptTerminal

pytestmark = [pytest.mark.kvm, pytest.mark.linux, pytest.mark.slow]

BOOT_SECONDS = 240
"""Most of it for hosts that run ring 0 in software while others use them, too."""


def command(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "kvmpy", "boot", *map(str, arguments))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with busybox, whose init is to be written."""
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "busybox").write_bytes(busybox().read_bytes())
    (root / "bin" / "busybox").chmod(0o755)
    for name in ("sh", "uname", "poweroff", "resize"):
        (root / "bin" / name).symlink_to("busybox")
    return root


def write_init(root: Path, script: str) -> None:
    (root / "init").write_text(f"#!/bin/sh\n{script}\n")
    (root / "init").chmod(0o755)


@pytest.mark.deadline(2 * BOOT_SECONDS)
def test_a_person_uses_a_shell_in_a_window_of_that_size_and_switches_off(root: Path) -> None:
    write_init(root, 'PS1="guest> " exec sh')
    boot = command(small_kernel("bzImage"), "--init", root, "--append", "quiet", "--memory", "128M")
    with PromptTerminal("sh", "-c", 'stty rows 33 cols 101; exec "$@"', "sh", *boot, term="vt220") as terminal:
        place = terminal.wait_for("guest> ", patience=BOOT_SECONDS)
        terminal.type('echo "$LINES x $COLUMNS, $TERM"; uname\r')
        place = terminal.wait_for("33 x 101, vt220", after=place)
        terminal.wait_for("Linux", after=place)
        terminal.type("poweroff -f\r")
        assert terminal.process.wait(BOOT_SECONDS) == 0


@pytest.mark.deadline(2 * BOOT_SECONDS)
def test_init_that_ends_is_a_kernel_panic(root: Path) -> None:
    write_init(root, "echo init ends; exit 3")
    boot = command(small_kernel(), "--init", root, "--append", "quiet panic=60", "--memory", "128M")
    done = subprocess.run(
        boot, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BOOT_SECONDS, check=False
    )
    assert done.returncode == 126, done.stderr
    said = done.stderr.splitlines()
    assert said[0] == "kvmpy: panic: Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300"
    assert "init ends" in said
    assert any("Call Trace" in line for line in said)


@pytest.mark.deadline(2 * BOOT_SECONDS)
def test_control_a_x_ends_a_kernel_while_it_boots() -> None:
    with PromptTerminal(*command(small_kernel(), "--cpus", "2", "--memory", "128M")) as terminal:
        terminal.wait_for("Linux version", patience=BOOT_SECONDS)
        terminal.type("\x01x")
        assert terminal.status() == 0


@pytest.mark.deadline(4 * BOOT_SECONDS)
def test_debian_s_own_kernel_tells_of_its_panic_by_pvpanic(root: Path) -> None:
    kernel = cloud_kernel()
    modules = kernel.parents[1].glob("lib/modules/*/kernel/drivers/misc/pvpanic/*.ko")
    for module in modules:
        (root / module.name).write_bytes(module.read_bytes())
    (root / "proc").mkdir()
    write_init(
        root,
        "busybox mount -t proc proc /proc; busybox insmod pvpanic.ko; busybox insmod pvpanic-mmio.ko\n"
        "echo c > /proc/sysrq-trigger",
    )
    report = root.parent / "report.json"
    boot = command(kernel, "--init", root, "--append", "quiet", "--json", report)
    done = subprocess.run(
        boot, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=3 * BOOT_SECONDS, check=False
    )
    assert done.returncode == 126, done.stderr
    data = json.loads(report.read_text())
    assert data["outcome"]["end"] == "panic"
    assert data["outcome"]["message"] == "Kernel panic - not syncing: sysrq triggered crash"
    assert "---[ end Kernel panic" not in done.stdout  # it was told before that was printed
    writes = {access["address"] for access in data["statistics"]["accesses"] if access["direction"] == "write"}
    assert 0x505 in writes
