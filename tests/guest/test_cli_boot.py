"""`kvmpy boot` as a process: small kernels in the formats of others, how they end, and the terminal before them."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gnu_toolchain import assemble
from kvmpy.cli.boot import BootPc, add_arguments
from kvmpy.machine.ring3_entry import needs_repair
from linux_images import KERNEL, BzImageFile, pack, vmlinux
from multiboot_files import LOAD, Header1
from prompt_terminal import PromptTerminal

# What a Linux finds at its 64-bit entry point: prints the command line and the first six bytes of the initrd.
LINUX = """
    mov rbx, rsi
    mov esi, [rbx + 0x228]
    call print
    mov esi, [rbx + 0x218]
    test esi, esi
    jz 1f
    mov byte ptr [rsi + 6], 0
    call print
1:  {then}
print:
    mov dx, 0x3f8
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:  mov al, 10
    out dx, al
    ret
"""
SPIN = "2: jmp 2b"
LEAVE = "xor eax, eax; out 0xf4, al; hlt"

MULTIBOOT = """
    mov esi, [ebx + 16]     # the command line
    call print
    cmp dword ptr [ebx + 20], 0
    je 1f
    mov edi, [ebx + 24]     # the first module: its string, its content
    mov esi, [edi + 8]
    call print
    mov esi, [edi]
    call print
1:  xor eax, eax; out 0xf4, al; hlt
print:
    mov dx, 0x3f8
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:  mov al, 10
    out dx, al
    ret
"""


def linux(then: str = LEAVE) -> bytes:
    return vmlinux(code=assemble(LINUX.format(then=then), address=KERNEL, bits=64))


def multiboot() -> bytes:
    header = Header1(addresses=(LOAD, LOAD, 0, 0, LOAD + 32)).to_bytes()
    return header + assemble(f".org 32\n{MULTIBOOT}", address=LOAD, bits=32)[32:]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kvmpy", "boot", *map(str, arguments)]


def boot(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), input="", capture_output=True, text=True, timeout=40, check=False)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Where a test writes its kernel."""
    return tmp_path / "kernel"


# Formats


@pytest.mark.parametrize("packed", [False, True], ids=["vmlinux", "bzImage"])
def test_a_linux_gets_its_command_line_with_a_console(image: Path, packed: bool) -> None:
    image.write_bytes(BzImageFile(payload=pack(linux())).to_bytes() if packed else linux())
    done = boot(image, "--append", "quiet root=/dev/sda")
    assert (done.returncode, done.stdout, done.stderr) == (1, "console=ttyS0 quiet root=/dev/sda\n", "")


def test_a_console_that_is_given_is_the_only_one(image: Path) -> None:
    image.write_bytes(linux())
    assert boot(image, "--append", "console=tty0 quiet").stdout == "console=tty0 quiet\n"


def test_an_initrd_comes_from_a_file_a_folder_or_a_program(image: Path, tmp_path: Path) -> None:
    image.write_bytes(linux())
    (tmp_path / "initrd").write_bytes(b"IMAGE!and more")
    assert boot(image, "--initrd", tmp_path / "initrd").stdout == "console=ttyS0\nIMAGE!\n"
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "init").write_text("#!/bin/sh\n")
    assert boot(image, "--init", tmp_path / "root").stdout == "console=ttyS0\n070701\n"
    assert boot(image, "--init", tmp_path / "root" / "init").stdout == "console=ttyS0\n070701\n"
    (tmp_path / "root" / "bin").mkdir()
    (tmp_path / "root" / "init").rename(tmp_path / "root" / "bin" / "sh")
    assert boot(image, "--init", tmp_path / "root").stdout == "console=ttyS0 rdinit=/bin/sh\n070701\n"


def test_a_multiboot_kernel_gets_its_command_line_and_modules(image: Path, tmp_path: Path) -> None:
    image.write_bytes(multiboot())
    (tmp_path / "module").write_bytes(b"content\0")
    assert boot(image, "--append", "verbose").stdout == "verbose\n"
    done = boot(image, "--module", f"{tmp_path}/module=/dev/ram x=1")
    assert (done.returncode, done.stdout) == (1, "\n/dev/ram x=1\ncontent\n")


@pytest.mark.parametrize("options", [(), ("--no-direct",)])
def test_ring_0_of_linux_is_left_to_kvm_when_asked(image: Path, options: tuple[str, ...]) -> None:
    image.write_bytes(linux())
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with BootPc(parser.parse_args([str(image), "--cpus", "2", *options])) as pc:
        assert [runner.runs_ring_0_directly for runner in pc.machine.runners] == [not options] * 2
    told = " clearcpuid=erms,fsrm,smap,popcnt" if options and needs_repair() else ""
    assert boot(image, *options).stdout == f"console=ttyS0{told}\n"
    assert boot(image, *options, "--append", "clearcpuid=smap").stdout == "console=ttyS0 clearcpuid=smap\n"


def test_what_is_booted_is_told_when_asked(image: Path) -> None:
    image.write_bytes(multiboot())
    done = boot(image, "-v")
    assert "MultibootKernel" in done.stderr
    assert "0x100000.." in done.stderr
    assert "exited with code 1" in done.stderr


# How it ends


@pytest.mark.parametrize(
    ("then", "status", "says"),
    [
        ("mov al, 3; out 0xf4, al; hlt", 7, "exited with code 7"),
        ("mov al, 0xfe; out 0x64, al; hlt", 0, ""),  # the keyboard controller's reset
        ("mov dx, 0x604; mov ax, 0x3400; out dx, ax; hlt", 0, ""),  # ACPI: sleep type 5, soft off
        ("mov dx, 0x505; mov al, 4; out dx, al; hlt", 0, ""),  # pvpanic: switched off
        ("mov dx, 0x505; mov al, 1; out dx, al; hlt", 126, "panic: the guest reported a panic"),
        ("cli; hlt", 0, ""),
        ("push 0; push 0; lidt [rsp]; ud2", 126, "triple fault"),
        (SPIN, 124, "timeout: the guest did not end within 1 seconds"),
    ],
)
def test_the_status_says_how_the_kernel_ended(image: Path, then: str, status: int, says: str) -> None:
    image.write_bytes(linux(then))
    done = boot(image, "--timeout", "1" if then == SPIN else "20")
    assert (done.returncode, done.stdout) == (status, "console=ttyS0\n")
    assert says in done.stderr
    assert bool(says) == bool(done.stderr)


PANIC = """
    mov esi, offset 3f
    call print
    2: jmp 2b
    3: .ascii "VFS: Cannot open root device\\r\\n"
    .ascii "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\\r\\n"
    .asciz "Call Trace:\\r\\n---[ end Kernel panic - not syncing: VFS: Unable to mount root fs ]---\\r\\n"
"""


def test_a_kernel_panic_ends_the_run_with_the_last_lines(image: Path) -> None:
    image.write_bytes(linux(PANIC))
    done = boot(image, "--timeout", "20")
    assert done.returncode == 126
    lines = done.stderr.splitlines()
    message = "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)"
    assert lines[0] == f"kvmpy: panic: {message}; --init FOLDER or --initrd FILE gives it one"
    assert lines[1:] == done.stdout.rstrip().splitlines()
    assert lines[-1].startswith("---[ end Kernel panic")


def test_a_panic_is_in_the_json_report(image: Path) -> None:
    image.write_bytes(linux(PANIC))
    done = boot(image, "--timeout", "20", "--json")
    report = json.loads(done.stderr)
    assert report["status"] == done.returncode == 126
    assert report["outcome"]["end"] == "panic"
    assert report["outcome"]["message"].startswith("Kernel panic - not syncing")
    assert "Call Trace:" in report["outcome"]["console"]


# What cannot be


def refused(done: subprocess.CompletedProcess[str], status: int, says: str) -> None:
    """One clear line on standard error, nothing else."""
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert done.stderr.startswith("kvmpy: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_what_does_not_fit_into_memory_is_one_line(image: Path, tmp_path: Path) -> None:
    image.write_bytes(linux())
    refused(boot(image, "--memory", "1M"), 122, "not all in RAM")
    with open(tmp_path / "initrd", "wb") as file:
        file.truncate(64 << 20)
    refused(boot(image, "--memory", "32M", "--initrd", tmp_path / "initrd"), 122, "")


# The terminal


def test_control_a_x_ends_a_kernel_that_spins(image: Path) -> None:
    image.write_bytes(linux(SPIN))
    with PromptTerminal(*command(image)) as terminal:
        terminal.wait_for("Ctrl-A x ends the run")
        terminal.wait_for("console=ttyS0")
        terminal.type("\x03\x01x")  # Ctrl-C is the guest's
        assert terminal.status() == 0


def test_control_a_x_ends_a_kernel_that_spins_before_it_says_a_word(image: Path) -> None:
    image.write_bytes(vmlinux(code=assemble("1: jmp 1b", address=KERNEL, bits=64)))
    with PromptTerminal(*command(image, "--cpus", "2")) as terminal:
        terminal.wait_for("the kernel has said nothing yet, 1 s")
        terminal.type("\x01x")
        assert terminal.status() == 0
        terminal.wait_for("\r\x1b[K", after=terminal.shown.rfind("nothing yet"))


def test_an_interrupt_ends_a_kernel_that_spins(image: Path) -> None:
    image.write_bytes(linux(SPIN))
    with subprocess.Popen(
        command(image, "--cpus", "2"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"console=ttyS0\n"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, said) == (130, b"kvmpy: interrupted\n")


def test_init_is_told_the_size_of_the_window_and_the_kind_of_terminal(image: Path) -> None:
    image.write_bytes(linux())
    with PromptTerminal("sh", "-c", 'stty rows 33 cols 101; exec "$@"', "sh", *command(image, "--append", "LINES=9 x"),
                        term="vt220") as terminal:  # fmt: skip
        terminal.wait_for("console=ttyS0 COLUMNS=101 TERM=vt220 LINES=9 x")
        assert terminal.status() == 1


def test_the_first_word_of_the_kernel_takes_the_place_of_the_progress(image: Path) -> None:
    wait = "mov al, 0; out 0x70, al; in al, 0x71; mov bl, al; 4: in al, 0x71; cmp al, bl; je 4b;"
    image.write_bytes(vmlinux(code=assemble(f"{wait * 2} {LINUX.format(then=LEAVE)}", address=KERNEL, bits=64)))
    with PromptTerminal(*command(image)) as terminal:
        terminal.wait_for("the kernel has said nothing yet")
        place = terminal.wait_for("console=ttyS0")
        assert terminal.status() == 1
    assert terminal.shown[:place].endswith(" s\r\x1b[Kconsole=ttyS0")


def test_without_a_terminal_there_is_no_progress(image: Path) -> None:
    image.write_bytes(vmlinux(code=assemble("1: jmp 1b", address=KERNEL, bits=64)))
    begin = time.monotonic()
    done = boot(image, "--timeout", "1.2")
    assert time.monotonic() - begin > 1.2
    assert done.stderr.startswith("kvmpy: timeout")
    assert done.stderr.count("\n") == 1


def test_dev_null_is_no_terminal(image: Path) -> None:
    image.write_bytes(linux())
    done = subprocess.run(
        command(image), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False,
        env={**os.environ, "LINES": "1", "COLUMNS": "1"},
    )  # fmt: skip
    assert done.stdout == "console=ttyS0\n"
