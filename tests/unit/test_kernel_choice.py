"""Which kernel `kvmpy boot` takes, and what it is given."""

import argparse
import os
import sys
from pathlib import Path

import pytest

from kvmpy.boot import LinuxKernel, MultibootKernel
from kvmpy.cli import main
from kvmpy.cli.kernel_choice import (
    add_kernel_arguments,
    initramfs_of,
    linux_command_line,
    newest_kernel,
    open_kernel,
)
from kvmpy.cli.run_report import IMAGE_REFUSED
from kvmpy.errors import ImageError, UsageError
from linux_images import BzImageFile, pack, vmlinux
from multiboot_files import Header1, Header2, elf_kernel


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_kernel_arguments(parser)
    return parser.parse_args(words)


def opened(tmp_path: Path, content: bytes, *options: str) -> LinuxKernel | MultibootKernel:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    return open_kernel(str(path), parsed("kernel", *options), {})


# Without KERNEL


def kernels(folder: Path, *names: str) -> None:
    """Files of these names, each a day newer than the one before."""
    for day, name in enumerate(names):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (86_400 * day, 86_400 * day))


def test_the_kernel_that_was_built_last_is_taken(tmp_path: Path) -> None:
    kernels(tmp_path, "vmlinuz-6.1.0-9", "vmlinuz-6.1.0-10", "initrd.img-6.1.0-10", "System.map-6.1.0-10", "config")
    assert newest_kernel(str(tmp_path)) == f"{tmp_path}/vmlinuz-6.1.0-10"


def test_links_folders_and_rescue_kernels_are_none(tmp_path: Path) -> None:
    kernels(tmp_path, "vmlinuz-1", "vmlinuz-0-rescue-abc")
    (tmp_path / "vmlinuz").symlink_to("vmlinuz-0-rescue-abc")
    (tmp_path / "kernel").mkdir()
    (tmp_path / "vmlinuz-gone").symlink_to("nowhere")
    assert newest_kernel(str(tmp_path)) == f"{tmp_path}/vmlinuz-1"


def test_where_there_is_none_it_is_said_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no kernel in .*scripts/fetch-kernel"):
        newest_kernel(str(tmp_path))
    with pytest.raises(UsageError, match="there is no kernel in"):
        newest_kernel(f"{tmp_path}/nowhere")


def test_a_kernel_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels(tmp_path, "vmlinuz-1", "vmlinuz-2")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path).endswith("-1"))
    assert newest_kernel(str(tmp_path)) == f"{tmp_path}/vmlinuz-1"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match=r"vmlinuz-2 may not be read by you"):
        newest_kernel(str(tmp_path))


def test_the_command_without_a_kernel_takes_it_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvmpy.cli.boot.newest_kernel", lambda: newest_kernel(str(tmp_path)))
    assert main(["boot"]) == 2
    assert "there is no kernel in" in capsys.readouterr().err
    (tmp_path / "vmlinuz-7").write_bytes(b"no kernel")
    assert main(["boot"]) == IMAGE_REFUSED
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"kvmpy: boots {tmp_path}/vmlinuz-7, the newest kernel there"
    assert "is no kernel" in said[1]


# Formats


def test_the_header_tells_the_format(tmp_path: Path) -> None:
    packed = BzImageFile(payload=pack(vmlinux())).to_bytes()
    linux = opened(tmp_path, packed)
    assert isinstance(linux, LinuxKernel)
    assert linux.elf is not None
    assert isinstance(opened(tmp_path, vmlinux()), LinuxKernel)
    for header, version in ((Header1().to_bytes(), 1), (Header2().to_bytes(), 2)):
        multiboot = opened(tmp_path, elf_kernel(header))
        assert isinstance(multiboot, MultibootKernel)
        assert multiboot.version == version


def test_a_file_that_is_no_kernel_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\xf4" * 512, b"MZ" + bytes(0x1000)):
        with pytest.raises(ImageError, match=r"is no kernel: .*`kvmpy run` runs other programs"):
            opened(tmp_path, content)


def test_options_reach_the_loader(tmp_path: Path) -> None:
    packed = BzImageFile(payload=pack(vmlinux())).to_bytes()
    kernel = opened(tmp_path, packed, "--no-unpack")
    assert isinstance(kernel, LinuxKernel)
    assert kernel.elf is None
    kernel = opened(tmp_path, packed, "--entry", "32")
    assert isinstance(kernel, LinuxKernel)
    assert kernel.protocol == "32"


def test_refusals_of_the_loader_name_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4", None)  # as if it were not installed
    with pytest.raises(ImageError, match=r"`pip install lz4`; or let the kernel unpack itself, with --no-unpack$"):
        opened(tmp_path, BzImageFile(payload=b"\x02\x21\x4c\x18" + (0x1000).to_bytes(4, "little")).to_bytes())
    with pytest.raises(UsageError, match=r"^--entry pvh is a way .*; --no-unpack leaves it packed$"):
        opened(tmp_path, BzImageFile(payload=pack(vmlinux())).to_bytes(), "--entry", "pvh", "--no-unpack")


@pytest.mark.parametrize("options", [("--initrd", "x"), ("--init", "x"), ("--entry", "64"), ("--no-unpack",)])
def test_what_is_linux_s_does_not_go_with_multiboot(tmp_path: Path, options: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=f"{options[0]} is for Linux kernels"):
        opened(tmp_path, elf_kernel(Header1().to_bytes()), *options)


def test_modules_do_not_go_with_linux(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--module is for Multiboot kernels"):
        opened(tmp_path, vmlinux(), "--module", "x")


def test_initrd_and_init_exclude_each_other() -> None:
    with pytest.raises(SystemExit):
        parsed("kernel", "--initrd", "a", "--init", "b")


# The command line


@pytest.mark.parametrize(
    ("text", "environment", "words", "line"),
    [
        ("", {}, (), "console=ttyS0"),
        ("quiet", {}, (), "console=ttyS0 quiet"),
        ("quiet console=ttyS1,115200", {}, (), "quiet console=ttyS1,115200"),
        ("quiet", {"LINES": "24", "TERM": "vt100"}, ("rdinit=/bin/sh",),
         "console=ttyS0 LINES=24 TERM=vt100 rdinit=/bin/sh quiet"),
        ("TERM=linux -- arg", {"LINES": "24", "TERM": "vt100"}, (), "console=ttyS0 LINES=24 TERM=linux -- arg"),
    ],
)  # fmt: skip
def test_the_command_line_is_what_was_given_and_what_is_missing(
    text: str, environment: dict[str, str], words: tuple[str, ...], line: str
) -> None:
    assert linux_command_line(text, environment, words) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("quiet", "earlyprintk=ttyS0 console=hvc0 quiet"),
        ("earlyprintk=vga", "console=hvc0 earlyprintk=vga"),
        ("console=ttyS0 console=hvc0", "console=ttyS0 console=hvc0"),
    ],
)
def test_a_virtio_console_gets_what_linux_says_when_it_has_found_it_and_the_serial_port_what_comes_before(
    text: str, line: str
) -> None:
    assert linux_command_line(text, {}, virtio_console=True) == line


# An initramfs


def test_a_folder_becomes_an_initramfs_with_a_console(tmp_path: Path) -> None:
    (tmp_path / "init").write_text("#!/bin/sh\n")
    (tmp_path / "etc").mkdir()
    archive, words = initramfs_of(str(tmp_path), "")
    assert all(name in archive for name in ("init", "etc", "dev", "dev/console"))
    assert words == ()


def test_a_folder_without_init_has_linux_told_what_to_start(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    with pytest.raises(UsageError, match="has no init, and no sbin/init or bin/init or bin/sh"):
        initramfs_of(str(tmp_path), "")
    assert initramfs_of(str(tmp_path), "rdinit=/bin/program")[1] == ()
    (tmp_path / "bin" / "sh").write_text("")
    assert initramfs_of(str(tmp_path), "")[1] == ("rdinit=/bin/sh",)
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin" / "init").symlink_to("../bin/sh")
    assert initramfs_of(str(tmp_path), "")[1] == ("rdinit=/sbin/init",)


def test_a_program_becomes_init(tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"\x7fELF, say")
    archive, words = initramfs_of(str(tmp_path / "hello"), "")
    assert "init" in archive
    assert b"\x7fELF, say" in archive.to_bytes()
    assert words == ()


def test_a_folder_or_program_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        initramfs_of(str(tmp_path / "nowhere"), "")
