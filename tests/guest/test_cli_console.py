"""`kvmpy boot --console virtio` as a process: the size of the window is that of the guest's terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gnu_toolchain import assemble
from multiboot_files import LOAD, Header1
from prompt_terminal import PromptTerminal

# Whenever the configuration space of the console tells of another size, it prints columns and rows there, as the
# characters that have these numbers, between brackets: by the register for emergencies, which needs no queues.
TELLS_SIZES = """
    mov ebp, 0xd0000000
    xor ebx, ebx
next:
    mov eax, [ebp + 0x100]
    cmp eax, ebx
    je next
    mov ebx, eax
    mov dword ptr [ebp + 0x108], '['
    movzx eax, bx
    mov [ebp + 0x108], eax
    mov eax, ebx
    shr eax, 16
    mov [ebp + 0x108], eax
    mov dword ptr [ebp + 0x108], ']'
    {then}
"""
LEAVE = "xor eax, eax; out 0xf4, al; hlt"


@pytest.fixture
def kernel(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "kernel"
    header = Header1(addresses=(LOAD, LOAD, 0, 0, LOAD + 32)).to_bytes()
    then = getattr(request, "param", LEAVE)
    code = assemble(f".org 32\n{TELLS_SIZES.format(then=then)}", address=LOAD, bits=32)[32:]
    path.write_bytes(header + code)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kvmpy", "boot", *map(str, arguments), "--console", "virtio"]


@pytest.mark.parametrize("kernel", ["jmp next"], indirect=True)
def test_the_guest_knows_the_size_of_the_window_and_follows_it(kernel: Path) -> None:
    with PromptTerminal("sh", "-c", 'stty rows 33 cols 101; exec "$@"', "sh", *command(kernel)) as terminal:
        place = terminal.wait_for("[e!]")
        terminal.resize(120, 40)
        terminal.wait_for("x(]", after=place)  # it may have seen them one by one
        terminal.resize(90, 50)
        place = terminal.wait_for("Z2]", after=place)
        terminal.type("\x01x")
        assert terminal.status() == 0


def test_without_a_terminal_it_is_80_columns_by_25_rows(kernel: Path) -> None:
    done = subprocess.run(command(kernel), input=b"x", capture_output=True, timeout=40, check=False)
    assert (done.returncode, done.stdout) == (1, b"[P\x19]")
