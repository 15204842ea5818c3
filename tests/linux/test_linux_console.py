"""Linux's own driver uses the console device: hvc0, its size, and named ports; `kvmpy boot --console virtio`."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from hashlib import md5
from pathlib import Path

import pytest

from kvmpy import End
from kvmpy.boot.initramfs import File
from kvmpy.virtio import VirtioConsole, VirtioMmio
from linux_session import LinuxSession, busybox, small_kernel
from prompt_terminal import PromptTerminal

BOOT_SECONDS = 480.0
"""Ten seconds on a computer with nothing else to do; others may be at work."""
COMMAND_SECONDS = 120.0
# The shell starts background jobs without standard input; it is the terminal here.
FOLLOW = b"#!/bin/sh\ntrap 'stty size' WINCH\necho follows\nwhile sleep 1; do :; done\n"
# What comes to a port is sent back, until that many bytes have come.
ECHO = b"#!/bin/sh\nexec 3<>/dev/$1\nhead -c $2 <&3 >/copy\ncat /copy >&3\nexec 3>&-\nmd5sum </copy\n"
FILES = {"bin/follow": File(FOLLOW, 0o755), "bin/give_back": File(ECHO, 0o755)}


class ConsoleSession(LinuxSession):
    """Linux with its console on hvc0."""

    def __init__(self, console: VirtioConsole, *, legacy: bool = False, events: bool = True) -> None:
        self.terminal = console
        transport = VirtioMmio(console, legacy=legacy, ioeventfd=events, irqfd=events)
        super().__init__(small_kernel(), transports=[transport], terminal=console, files=FILES)

    def type_in(self, command: str) -> str:
        return self.run(command, COMMAND_SECONDS)

    def follows_the_window(self) -> None:
        """Programs are told of another size, and see it. (A shell that is told of it prints its prompt again.)"""
        self.terminal.send("follow\n")
        self._expect(re.compile(r"^follows\r$", re.MULTILINE), COMMAND_SECONDS)
        for columns, rows in ((120, 40), (91, 17)):
            self.terminal.resize(columns, rows)
            self._expect(re.compile(rf"^{rows} {columns}\r$", re.MULTILINE), COMMAND_SECONDS)
        self.terminal.send(b"\x03")
        self.answer(COMMAND_SECONDS)
        assert self.type_in("stty size") == "17 91\n"


@pytest.mark.deadline(BOOT_SECONDS + 8 * COMMAND_SECONDS)
@pytest.mark.parametrize(
    ("legacy", "events"),
    [(False, True), (True, False)],
    ids=["ioeventfd and irqfd", "legacy, exits and lines"],
)
def test_linux_has_its_console_on_hvc0(legacy: bool, events: bool) -> None:
    console = VirtioConsole(size=(100, 30))
    with ConsoleSession(console, legacy=legacy, events=events) as session:
        told = session.boot(BOOT_SECONDS)
        assert "Run /init as init process" in told
        assert session.type_in("tty; until stty size 2>/dev/null; do sleep 1; done") == "/dev/hvc0\n30 100\n"
        assert session.type_in("cut -d ' ' -f 1 /proc/consoles") == "hvc0\n"
        session.follows_the_window()
        # A long answer, and a long line.
        numbers = "".join(f"{number}\n" for number in range(1, 301))
        assert session.type_in("seq 300") == numbers
        text = "".join(random.Random(3).choices("abcdefghij ", k=900))
        assert session.type_in(f"echo '{text}' | md5sum").split()[-2] == md5(f"{text}\n".encode()).hexdigest()
        # Keys have their meaning.
        console.send("echo sleeps; sleep 1000\n")
        session._expect(re.compile(r"^sleeps\r$", re.MULTILINE), COMMAND_SECONDS)
        console.send(b"\x03")
        session.answer(COMMAND_SECONDS)
        assert session.type_in("echo $?") == "130\n"
        assert session.machine.host_errors == []
        assert console.counters == {}


@pytest.mark.deadline(BOOT_SECONDS + 8 * COMMAND_SECONDS)
def test_programs_reach_the_host_by_named_ports() -> None:
    console = VirtioConsole(size=(100, 30), channels=("org.example.agent", "org.example.log"))
    agent, log = console.channel("org.example.agent"), console.channel("org.example.log")
    opened: list[bool] = []
    agent.on_open = opened.append
    with ConsoleSession(console) as session:
        session.boot(BOOT_SECONDS)
        assert session.type_in("tty; until stty size 2>/dev/null; do sleep 1; done") == "/dev/hvc0\n30 100\n"
        session.follows_the_window()
        names = session.type_in("cd /sys/class/virtio-ports; grep . */name; cd /").splitlines()
        assert names == [f"vport0p{number}/name:{port.name}" for number, port in ((1, agent), (2, log))]
        assert session.type_in("ls /dev/vport*").split() == ["/dev/vport0p0", "/dev/vport0p1", "/dev/vport0p2"]
        # What the guest writes.
        session.type_in("dmesg > /dev/vport0p2; echo the end > /dev/vport0p2")
        log.expect("the end\n", COMMAND_SECONDS)
        assert "Linux version 6.1." in log.text
        assert agent.output == b""
        # Both ways, with more than all buffers hold. What is sent before a program opens the port waits for it.
        content = random.Random(4).randbytes(600_000)
        received = bytearray()
        agent.connect_sink(received.extend)
        agent.send(content)
        assert not agent.guest_open
        assert session.type_in(f"give_back vport0p1 {len(content)}").split()[0] == md5(content).hexdigest()
        assert received == content
        assert opened == [True, False]
        assert agent.unread == 0
        assert session.machine.host_errors == []
        assert console.counters == {}


# kvmpy boot


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with busybox, whose init is to be written."""
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "busybox").write_bytes(busybox().read_bytes())
    (root / "bin" / "busybox").chmod(0o755)
    for name in ("grep", "poweroff", "sh", "sleep", "stty"):
        (root / "bin" / name).symlink_to("busybox")
    return root


def boot(root: Path, init: str, *options: str) -> list[str]:
    """The command, with that script as init."""
    (root / "init").write_text(f"#!/bin/sh\n{init}\n")
    (root / "init").chmod(0o755)
    kernel = str(small_kernel("bzImage"))
    command = [sys.executable, "-m", "kvmpy", "boot", kernel, "--init", str(root), "--memory", "128M"]
    return [*command, "--console", "virtio", *options]


@pytest.mark.deadline(2 * BOOT_SECONDS)
def test_a_person_uses_a_shell_on_hvc0_in_a_window_that_changes_its_size(root: Path) -> None:
    command = boot(root, 'export PS1="guest> "; exec sh', "--append", "quiet")
    with PromptTerminal("sh", "-c", 'stty rows 33 cols 101; exec "$@"', "sh", *command, term="vt220") as terminal:
        place = terminal.wait_for("guest> ", patience=BOOT_SECONDS)
        # What it had at the start Linux learns in the first pauses of its output: a person is slower than this test.
        terminal.type('until stty size 2>/dev/null; do sleep 1; done; echo "$TERM $COLUMNS."\r')
        place = terminal.wait_for("\n33 101\r\nvt220 .\r\n", after=place, patience=COMMAND_SECONDS)
        terminal.resize(120, 40)
        terminal.type("until stty size | grep '^40 120'; do sleep 1; done\r")
        place = terminal.wait_for("\n40 120\r", after=place, patience=COMMAND_SECONDS)
        terminal.type("poweroff -f\r")
        assert terminal.process.wait(BOOT_SECONDS) == 0


@pytest.mark.deadline(2 * BOOT_SECONDS)
def test_all_that_linux_says_is_shown_once_and_a_panic_ends_the_run(root: Path) -> None:
    done = subprocess.run(
        boot(root, "echo init ends; exit 3"), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=BOOT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 126, done.stderr
    assert done.stderr.startswith(
        f"kvmpy: {End.PANIC}: Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300\n"
    )
    for line in ("Linux version 6.1.", "Kernel command line: ", "Run /init as init process", "init ends"):
        assert done.stdout.count(line) == 1, (line, done.stdout)
