"""Linux, with its own drivers, lives on virtio devices alone: a session in which a shell uses all of them.

Its root is on a disk, its address comes by DHCP, its console and the shell are on hvc0. What it reads is compared with
what is on the host, and shown. That needs root, for the network namespaces; the last test does not.
"""

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import md5
from pathlib import Path

import pytest

from kvmpy import End
from kvmpy.virtio import Block, Entropy, NetBackend, Plan9, VirtioConsole, VirtioMmio, VirtioNet
from linux_disks import check_ext2, dump_from_ext2, make_ext2, make_squashfs, sums
from linux_networks import (
    BESIDE_GATEWAY,
    GATEWAY,
    GUEST,
    HOST,
    namespace,
    passt_between,
    require_passt,
    tap_into,
    web_server,
)
from linux_session import PROMPT, LinuxSession, on_the_terminal, small_kernel, write_root
from prompt_terminal import PromptTerminal

BOOT_SECONDS = 480.0
"""Ten seconds on a computer with nothing else to do; others may be at work."""
COMMAND_SECONDS = 120.0
MAC = "52:54:00:12:34:56"
SIZE = (200, 50)
"""Of the terminal: wide enough for the shell not to break what is typed into lines."""
MOUNT_9P = "mount -t 9p -o trans=virtio,version=9p2000.L,ro tree /mnt"
TO_GATEWAY = "set -- $(route -n | grep ^0.0.0.0)"
"""Makes $2 the gateway: to guests of passt, it is the host."""
SUMS = "find . -xdev -type f | sort | xargs md5sum"


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Tells whoever watches the tests what the guest does."""
    return on_the_terminal(request.config)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is on the disk that Linux has its root on."""
    folder = tmp_path_factory.mktemp("root")
    write_root(folder, "hvc0")
    (folder / "data").mkdir()
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guest reads over 9p."""
    folder = tmp_path_factory.mktemp("tree")
    numbers = random.Random(9)
    for place in ("", "a", "a/b", "c"):
        (folder / place).mkdir(exist_ok=True)
        for length in (0, 1, 4097, 50_000):
            (folder / place / f"{length}-bytes").write_bytes(numbers.randbytes(length))
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the web server has."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "file").write_bytes(random.Random(7).randbytes(1 << 20))
    return folder


@pytest.fixture
def far() -> Iterator[str]:
    with namespace("far") as name:
        yield name


@pytest.fixture
def near() -> Iterator[str]:
    with namespace("near") as name:
        yield name


class Session(LinuxSession):
    """Linux on six virtio devices, and what a person at its console does with each."""

    def __init__(
        self, root_image: Path, data_image: Path, tree: Path, backend: NetBackend, say: Callable[[str], None],
        *, acpi: bool,
    ) -> None:  # fmt: skip
        self.tell = say
        self.given = bytearray()
        """The random numbers that the guest was given."""
        self.disks = [Block(root_image, read_only=True, serial="root"), Block(data_image, serial="data")]
        self.card = VirtioNet(backend, mac=MAC)
        self.terminal = VirtioConsole(size=SIZE)
        self.devices = [*self.disks, self.card, self.terminal, Entropy(self._random), Plan9(tree, "tree")]
        super().__init__(
            small_kernel(), cmdline="console=hvc0 root=/dev/vda ro ip=dhcp", disk_root=True, terminal=self.terminal,
            transports=[VirtioMmio(device) for device in self.devices], acpi=acpi, say=say,
        )  # fmt: skip

    def _random(self, length: int) -> bytes:
        self.given += (given := os.urandom(length))
        return given

    def type_in(self, command: str) -> str:
        return self.run(command, COMMAND_SECONDS)

    def boots(self, file_system: str, address: str) -> None:
        """Up to the shell on hvc0, with that root file system and that address from the DHCP server."""
        told = self.boot(BOOT_SECONDS)
        self.terminal.connect_sink(None)  # from here on it is told what was found out
        self.tell(f"{self.seconds_to_init:.1f} s to the first program; {address} by DHCP")
        assert f"VFS: Mounted root ({file_system} filesystem) readonly" in told
        leased = re.search(r"IP-Config: Got DHCP answer from ([\d.]+), my address is ([\d.]+)", told)
        assert leased, told
        assert leased[2] == address
        assert "BUG:" not in told
        assert "WARNING:" not in told
        assert self.type_in("cut -d ' ' -f 1 /proc/consoles") == "hvc0\n"  # and no other
        assert self.type_in("dmesg | grep -o 'console .hvc0. enabled'") == "console [hvc0] enabled\n"
        assert self.type_in("tty") == "/dev/hvc0\n"
        assert self.type_in("until stty size 2>/dev/null; do sleep 1; done") == f"{SIZE[1]} {SIZE[0]}\n"
        card = self.type_in("ifconfig eth0")
        assert f"HWaddr {MAC.upper()}" in card
        assert f"inet addr:{address}" in card

    def same_sums(self, what: str, folder: str, expected: str) -> None:
        """All files in a folder of the guest are those of the host."""
        found = self.type_in(f"cd {folder} && {SUMS}; cd /")
        assert found == expected
        self.tell(f"md5 of {what}, the same in the guest and on the host:")
        for line in found.splitlines():
            self.tell(f"  {line}")

    def takes_random_numbers(self) -> None:
        """The entropy device feeds hwrng."""
        assert re.fullmatch(r"virtio_rng\.\d+\n", self.type_in("cat /sys/class/misc/hw_random/rng_current"))
        numbers = self.type_in("head -c 32 /dev/hwrng | od -An -v -t x1").replace("\n", " ").strip()
        assert len(bytes.fromhex(numbers)) == 32
        assert bytes.fromhex(numbers) in self.given
        self.tell(f"from /dev/hwrng, as the host has given it: {numbers.replace('  ', ' ')}")

    def writes_files(self) -> str:
        """Copied files and random ones go to the second disk, and are there after it was mounted anew."""
        assert self.type_in("mount -t ext2 /dev/vdb /data && cp -r /files /data/written; echo $?").endswith("0\n")
        assert self.type_in("dd if=/dev/urandom of=/data/written/random bs=4k count=64 2>/dev/null; echo $?") == "0\n"
        before = self.type_in(f"cd /data/written && {SUMS}; cd /")
        assert self.type_in("umount /data && echo 3 > /proc/sys/vm/drop_caches; echo $?") == "0\n"
        assert self.type_in("mount -t ext2 -o ro /dev/vdb /data; echo $?").endswith("0\n")
        self.same_sums("what the guest has written", "/data/written", before)
        assert self.type_in("umount /data; echo $?") == "0\n"
        return before

    def pings(self, address: str) -> None:
        answer = self.type_in(f"ping -c 3 {address}")
        assert " 0% packet loss" in answer, answer
        for line in answer.splitlines()[-2:]:
            self.tell(f"{address}: {line}")

    def fetches(self, url: str, content: bytes) -> None:
        """A file from a web server."""
        found = self.type_in(f"wget -q -O - {url} | md5sum").split()[0]
        assert found == md5(content).hexdigest()
        self.tell(f"md5 of {url}, the same in the guest and on the host: {found}")

    def reads_a_tree(self, tree: Path) -> None:
        """A folder of the host, over 9p."""
        assert self.type_in(f"{MOUNT_9P}; echo $?") == "0\n"
        self.same_sums("what is read over 9p", "/mnt", sums(tree))
        assert self.type_in("umount /mnt; echo $?") == "0\n"


def use_all(session: Session, root: Path, tree: Path, url: str, ping: str, content: bytes) -> str:
    """What is done in each of the sessions; answers the checksums of what was written to the second disk."""
    session.same_sums("what is on the root file system", "/", sums(root))
    session.takes_random_numbers()
    written = session.writes_files()
    assert sums(root / "files") == "".join(line for line in written.splitlines(True) if "./random" not in line)
    session.pings(ping)
    session.fetches(url, content)
    session.reads_a_tree(tree)
    assert session.machine.host_errors == []
    assert [device.counters for device in session.devices if device is not session.card] == [{}] * 5
    assert set(session.card.counters) <= {"no_driver"}  # what came before Linux did
    return written


def check_disks(root_image: Path, before: bytes, data_image: Path, written: str, scratch: Path) -> None:
    """What the guest has written is on the host's disk, and its root was left alone."""
    assert root_image.read_bytes() == before
    check_ext2(data_image)
    dump_from_ext2(data_image, "/written", scratch)
    assert sums(scratch / "written") == written


@pytest.mark.deadline(2 * BOOT_SECONDS + 10 * COMMAND_SECONDS)
def test_linux_lives_on_ext2_behind_passt(
    root: Path, tree: Path, served: Path, near: str, far: str, tmp_path: Path, say: Callable[[str], None]
) -> None:
    """With devices that it finds by ACPI, through which it switches itself off."""
    root_image, data_image = tmp_path / "root.img", tmp_path / "data.img"
    make_ext2(root_image, root)
    make_ext2(data_image)
    before = root_image.read_bytes()
    with ExitStack() as stack:
        passt = stack.enter_context(passt_between(near, far, served, tmp_path))
        session = stack.enter_context(Session(root_image, data_image, tree, passt, say, acpi=True))
        session.boots("ext2", BESIDE_GATEWAY)
        content = (served / "file").read_bytes()
        written = use_all(session, root, tree, f"http://{GATEWAY}/file", GATEWAY, content)
        outcome = session.power_off(COMMAND_SECONDS)
        assert outcome.end is End.SHUTDOWN, outcome
    check_disks(root_image, before, data_image, written, tmp_path)


@pytest.mark.deadline(2 * BOOT_SECONDS + 10 * COMMAND_SECONDS)
def test_linux_lives_on_squashfs_at_a_tap_interface(
    root: Path, tree: Path, served: Path, far: str, tmp_path: Path, say: Callable[[str], None]
) -> None:
    """With devices that it is told of on its command line."""
    root_image, data_image = tmp_path / "root.img", tmp_path / "data.img"
    make_squashfs(root_image, root)
    make_ext2(data_image)
    before = root_image.read_bytes()
    with ExitStack() as stack:
        tap = stack.enter_context(tap_into(far, served, tmp_path))
        session = stack.enter_context(Session(root_image, data_image, tree, tap, say, acpi=False))
        session.boots("squashfs", GUEST)
        assert MAC in (tmp_path / "leases").read_text()
        written = use_all(session, root, tree, f"http://{HOST}/file", HOST, (served / "file").read_bytes())
        session.terminal.send("reboot -f\n")
        outcome = session.machine.wait(timeout=COMMAND_SECONDS)
        assert outcome.end is End.RESET, outcome
    check_disks(root_image, before, data_image, written, tmp_path)


@pytest.mark.deadline(2 * BOOT_SECONDS + 10 * COMMAND_SECONDS)
def test_linux_of_the_command_line_has_such_devices(root: Path, tree: Path, served: Path, tmp_path: Path) -> None:
    """As a person at a terminal has it, without root: the network is the host's own."""
    require_passt()
    image = tmp_path / "root.img"
    make_ext2(image, root)
    command = (
        sys.executable, "-m", "kvmpy", "boot", small_kernel("bzImage"), "--memory", "128M",
        "--append", "root=/dev/vda ip=dhcp", "--console", "virtio", "--net", "passt",
        "--disk", f"{image},ro", "--share", f"{tree},ro,tag=tree",
    )  # fmt: skip
    with web_server(served) as port, PromptTerminal(*map(str, command), term="vt220") as terminal:
        place = terminal.wait_for("IP-Config: Got DHCP answer from ", patience=BOOT_SECONDS)
        place = terminal.wait_for(PROMPT, after=place, patience=BOOT_SECONDS)
        for line, answer in (
            ("md5sum /files/deep/er/file-5", root / "files/deep/er/file-5"),
            (f"{MOUNT_9P} && md5sum /mnt/a/b/50000-bytes", tree / "a/b/50000-bytes"),
            (f"{TO_GATEWAY}; wget -q -O - http://$2:{port}/file | md5sum", served / "file"),
        ):
            terminal.type(f"{line}\r")
            place = terminal.wait_for(md5(answer.read_bytes()).hexdigest(), after=place, patience=COMMAND_SECONDS)
            place = terminal.wait_for(PROMPT, after=place, patience=COMMAND_SECONDS)
        terminal.type("poweroff\r")
        assert terminal.process.wait(COMMAND_SECONDS) == 0
