"""scripts/build-kernel with an apt and a make of our own: when it builds, what it prints, what it says if it cannot."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SCRIPT, CONFIG = SCRIPTS / "build-kernel", SCRIPTS / "small-kernel.config"
PROGRAMS = (
    "cat", "cut", "dirname", "env", "grep", "head", "ls", "mkdir", "mktemp", "mv", "nice", "nproc", "rm", "sed", "sh",
    "sha256sum", "tail", "tar", "touch",
)  # fmt: skip

APT_GET = """#!/bin/sh
echo fetched >> "$LOG"
[ -z "${OFFLINE:-}" ] || { echo "E: Failed to fetch" >&2; exit 100; }
echo > linux-source-6.1.deb
"""
APT_CACHE = """#!/bin/sh
[ -z "${UNKNOWN:-}" ] || exit 100
echo "Package: linux-source-6.1"
echo "Version: ${VERSION:-6.1.5-1}"
"""
DPKG_DEB = """#!/bin/sh
mkdir -p "$3/usr/src"
tar -C "$3" -cf "$3/usr/src/linux-source-6.1.tar.xz" usr
"""
GCC = """#!/bin/sh
[ -z "${NO_LIBELF:-}" ]
"""
MAKE = """#!/bin/sh
for word; do
    case $word in
        /*) tree=$word ;;
        KCONFIG_ALLCONFIG=*) config=${word#*=} ;;
    esac
    last=$word
done
echo "make $last" >> "$LOG"
case $last in
    allnoconfig) grep -v "${LOST:-nothing}" "$config" > "$tree/.config" ;;
    *)
        [ -z "${BROKEN:-}" ] || { echo "init/main.c:1: error: no" >&2; exit 2; }
        mkdir -p "$tree/arch/x86/boot"
        touch "$tree/vmlinux" "$tree/System.map" "$tree/arch/x86/boot/bzImage"
        ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH with the programs of POSIX that the script needs, and tools that build nothing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in PROGRAMS:
        (programs / program).symlink_to(
            next(p for p in (Path("/bin", program), Path("/usr/bin", program)) if p.exists())
        )
    own = {"apt-get": APT_GET, "apt-cache": APT_CACHE, "dpkg-deb": DPKG_DEB, "gcc": GCC, "make": MAKE}
    for name in ("flex", "bison", "bc", "xz"):
        own[name] = "#!/bin/sh\n"
    for name, text in own.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {"PATH": str(programs), "KVMPY_CACHE": str(tmp_path / "cache"), "LOG": str(tmp_path / "log")}


def build(environment: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", SCRIPT, *arguments], env=environment | more, capture_output=True, text=True, timeout=60, check=False
    )


def done_so_far(environment: dict[str, str]) -> list[str]:
    log = Path(environment["LOG"])
    return log.read_text().splitlines() if log.exists() else []


def folder(environment: dict[str, str], version: str = "6.1.5-1") -> str:
    key = hashlib.sha256(CONFIG.read_bytes()).hexdigest()[:12]
    return f"{environment['KVMPY_CACHE']}/small-kernel-{version}-{key}"


def test_a_kernel_is_built_and_its_files_are_printed(environment: dict[str, str]) -> None:
    done = build(environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{folder(environment)}/{f}" for f in ("vmlinux", "bzImage", "System.map")]
    assert all(Path(path).is_file() for path in done.stdout.splitlines())
    assert done_so_far(environment) == ["fetched", "make allnoconfig", "make bzImage"]
    assert os.listdir(environment["KVMPY_CACHE"]) == [Path(folder(environment)).name], "nothing is left over"


def test_it_is_built_again_only_when_the_source_is_a_new_one(environment: dict[str, str]) -> None:
    first = build(environment)
    again = build(environment, OFFLINE="1")
    assert (again.stdout, again.stderr, len(done_so_far(environment))) == (first.stdout, "", 3)
    newer = build(environment, VERSION="6.1.6-1")
    assert newer.stdout.startswith(folder(environment, "6.1.6-1") + "/vmlinux\n")
    assert len(done_so_far(environment)) == 6


def test_without_lists_of_packages_what_is_there_serves(environment: dict[str, str]) -> None:
    assert "apt knows no package linux-source-6.1" in build(environment, UNKNOWN="1").stderr
    first = build(environment)
    assert build(environment, UNKNOWN="1").stdout == first.stdout


def test_a_line_of_the_configuration_that_is_lost_is_an_error(environment: dict[str, str]) -> None:
    done = build(environment, LOST="CONFIG_VIRTIO_BLK")
    assert (done.returncode, done.stdout) == (1, "")
    assert "CONFIG_VIRTIO_BLK=y" in done.stderr
    assert os.listdir(environment["KVMPY_CACHE"]) == []


def test_offline_or_when_the_build_fails_it_says_why_and_leaves_nothing_behind(environment: dict[str, str]) -> None:
    offline = build(environment, OFFLINE="1")
    assert (offline.returncode, "could not download linux-source-6.1" in offline.stderr) == (1, True)
    broken = build(environment, BROKEN="1")
    assert (broken.returncode, "init/main.c:1: error: no" in broken.stderr) == (1, True)
    assert os.listdir(environment["KVMPY_CACHE"]) == []


def test_missing_tools_are_named_with_their_packages(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "flex").unlink()
    done = build(environment, NO_LIBELF="1")
    assert (done.returncode, "there is missing: flex libelf.h." in done.stderr) == (1, True)
    assert "apt-get install gcc make flex bison bc libelf-dev xz-utils" in done.stderr


def test_an_argument_shows_the_usage(environment: dict[str, str]) -> None:
    assert (build(environment, "fast").returncode, build(environment, "fast").stderr) == (
        2,
        "usage: scripts/build-kernel\n",
    )
