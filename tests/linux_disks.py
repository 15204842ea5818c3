"""Disk images for Linux guests, made and looked into by Debian's tools, and the checksums of what is in them.

The functions skip the test, saying why, where a tool is missing.
"""

import shutil
import subprocess
from hashlib import md5
from pathlib import Path

import pytest

__all__ = ["SIZE", "check_ext2", "dump_from_ext2", "make_ext2", "make_squashfs", "sums"]

SIZE = 16 << 20
"""Bytes of an ext2 image."""


def _run(name: str, package: str, *arguments: object) -> None:
    path = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        pytest.skip(f"{name} is not installed (Debian package {package})")
    command = [path, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def make_ext2(image: Path, tree: Path | None = None) -> None:
    """An ext2 file system of `SIZE` bytes, with what is in `tree`, or empty."""
    _run("mke2fs", "e2fsprogs", "-q", "-t", "ext2", *(("-d", tree) if tree else ()), image, f"{SIZE >> 20}M")


def make_squashfs(image: Path, tree: Path) -> None:
    """A squashfs with what is in `tree`, packed by zlib and owned by root."""
    _run("mksquashfs", "squashfs-tools", tree, image, "-comp", "gzip", "-all-root", "-noappend", "-quiet")


def check_ext2(image: Path) -> None:
    """Fail unless e2fsck finds nothing wrong."""
    _run("e2fsck", "e2fsprogs", "-fn", image)


def dump_from_ext2(image: Path, path: str, into: Path) -> None:
    """Copy a folder out of an ext2 image, into the folder `into`, by debugfs."""
    _run("debugfs", "e2fsprogs", "-R", f"rdump {path} {into}", image)


def sums(tree: Path) -> str:
    """What `find -type f | sort | xargs md5sum` prints in that folder."""
    paths = sorted(str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    return "".join(f"{md5((tree / path).read_bytes()).hexdigest()}  ./{path}\n" for path in paths)
