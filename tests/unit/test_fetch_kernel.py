"""scripts/fetch-kernel with an apt of our own: what it fetches, what it leaves alone, what it says when it cannot."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch-kernel"
PROGRAMS = ("cat", "env", "find", "head", "mkdir", "mktemp", "mv", "rm", "sed", "sh", "touch")

# `apt-get ... download PACKAGE` makes PACKAGE.deb; dpkg-deb unpacks that as the files that the package has.
APT_GET = """#!/bin/sh
for package; do :; done
echo "$package" >> "$LOG"
[ -z "${OFFLINE:-}" ] || { echo "E: Failed to fetch $package" >&2; exit 100; }
echo "$package" > "$package.deb"
"""
APT_CACHE = """#!/bin/sh
[ -z "${UNKNOWN:-}" ] || exit 100
echo linux-image-cloud-amd64
echo "  Depends: linux-image-6.1.0-13-cloud-amd64"
"""
DPKG_DEB = """#!/bin/sh
package=$(cat "$2")
case $package in
    linux-*) file=boot/vmlinuz-${package#linux-image-} ;;
    busybox-static) file=bin/busybox ;;
    grub-invaders) file=${WRONG:-boot/invaders.exec} ;;
esac
mkdir -p "$3/${file%/*}"
touch "$3/$file"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH with the programs of POSIX that the script needs, and an apt that needs no network."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in PROGRAMS:
        (programs / program).symlink_to(
            next(p for p in (Path("/bin", program), Path("/usr/bin", program)) if p.exists())
        )
    for name, text in (("apt-get", APT_GET), ("apt-cache", APT_CACHE), ("dpkg-deb", DPKG_DEB)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {"PATH": str(programs), "KVMPY_CACHE": str(tmp_path / "cache"), "LOG": str(tmp_path / "log")}


def fetch(environment: dict[str, str], *what: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", SCRIPT, *what], env=environment | more, capture_output=True, text=True, timeout=60, check=False
    )


def fetched(environment: dict[str, str]) -> list[str]:
    log = Path(environment["LOG"])
    return log.read_text().split() if log.exists() else []


def test_kernel_and_busybox_are_fetched_and_their_paths_printed(environment: dict[str, str]) -> None:
    done = fetch(environment)
    cache = environment["KVMPY_CACHE"]
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{cache}/linux-image-6.1.0-13-cloud-amd64/boot/vmlinuz-6.1.0-13-cloud-amd64",
        f"{cache}/busybox-static/bin/busybox",
    ]
    assert all(Path(path).is_file() for path in done.stdout.splitlines())
    assert fetched(environment) == ["linux-image-6.1.0-13-cloud-amd64", "busybox-static"]
    assert sorted(os.listdir(cache)) == ["busybox-static", "linux-image-6.1.0-13-cloud-amd64"], "nothing is left over"


def test_what_is_there_is_not_fetched_again_and_needs_no_network(environment: dict[str, str]) -> None:
    first = fetch(environment, "invaders", "kernel")
    again = fetch(environment, "invaders", "kernel", OFFLINE="1", UNKNOWN="1")
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert len(fetched(environment)) == 2


def test_offline_it_says_what_is_needed_and_leaves_nothing_behind(environment: dict[str, str]) -> None:
    done = fetch(environment, "busybox", OFFLINE="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "E: Failed to fetch busybox-static" in done.stderr
    assert "apt-get could not download busybox-static" in done.stderr
    assert os.listdir(environment["KVMPY_CACHE"]) == []
    assert fetch(environment, "busybox").returncode == 0


def test_a_system_without_the_package_or_without_apt_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    assert "apt knows no package linux-image-cloud-amd64" in fetch(environment, UNKNOWN="1").stderr
    (tmp_path / "bin" / "apt-get").unlink()
    done = fetch(environment, "busybox")
    assert (done.returncode, "there is no apt-get here" in done.stderr) == (1, True)


def test_a_package_without_the_file_is_an_error(environment: dict[str, str]) -> None:
    done = fetch(environment, "invaders", WRONG="boot/other")
    assert (done.returncode, done.stdout) == (1, "")
    assert "grub-invaders has no grub-invaders/boot/invaders.exec in it" in done.stderr


def test_without_a_cache_folder_it_takes_the_users(environment: dict[str, str], tmp_path: Path) -> None:
    del environment["KVMPY_CACHE"]
    done = fetch(environment, "busybox", HOME=str(tmp_path / "home of user"))
    assert done.stdout == f"{tmp_path}/home of user/.cache/kvmpy/busybox-static/bin/busybox\n"


def test_a_wrong_argument_shows_the_usage(environment: dict[str, str]) -> None:
    done = fetch(environment, "windows")
    assert (done.returncode, done.stderr.startswith("usage: scripts/fetch-kernel")) == (2, True)
