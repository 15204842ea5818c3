"""`kvmpy shell` as a process, on real guests: on a terminal, on a pipe, and with statements on the command line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from code_blocks import blocks
from gnu_toolchain import TOOLCHAIN, assemble
from prompt_terminal import PromptTerminal

PAGE = Path(__file__).parents[2] / "docs" / "shell.md"
PROMPT = ">>> "

COUNTING = """
_start: mov ecx, 3
again:  call work
        dec ecx
        jnz again
        mov al, 0
        out 0xf4, al
        hlt
work:   add ebx, ecx
        ret
"""

TALKING = """
_start: mov edx, 0x3f8
again:  mov al, '.'
        out dx, al
        mov al, 10
        out dx, al
        mov ecx, 20000
1:      dec ecx
        jnz 1b
        inc rbx
        jmp again
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kvmpy", "shell", *map(str, arguments)]


def shell(*arguments: object, statements: str = "") -> subprocess.CompletedProcess[str]:
    """Run with `statements` through a pipe."""
    return subprocess.run(
        command(*arguments), input=statements, capture_output=True, text=True, timeout=30, check=False
    )  # fmt: skip


def elf(source: str) -> Path:
    """An ELF file with symbols."""
    assemble(source, bits=64)  # skips where the tools are missing
    return TOOLCHAIN.assemble(source, bits=64).elf


@pytest.fixture
def counting() -> Path:
    return elf(COUNTING)


@pytest.fixture
def talking() -> Path:
    return elf(TALKING)


def flat(tmp_path: Path, source: str, bits: int = 16) -> Path:
    image = tmp_path / "guest.bin"
    image.write_bytes(assemble(source, bits=bits))
    return image


# Statements on the command line


def test_a_statement_is_executed_and_its_value_shown_in_hex(counting: Path) -> None:
    done = shell(counting, "-c", "regs.rip, [255, True], memory.read(0x1000, 1)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "(0x1000, [0xff, True], b'\\xb9')\n", "")


def test_several_statements_are_executed_in_order_up_to_the_first_that_fails(counting: Path) -> None:
    done = shell(counting, "-c", "a = 1; a", "-c", "for i in range(2):\n  a + i\n\nnowhere", "-c", "3")
    assert (done.returncode, done.stdout) == (1, "0x1\n0x1\n0x2\n")
    assert "NameError: name 'nowhere' is not defined" in done.stderr


def test_the_exit_status_can_be_chosen(counting: Path) -> None:
    assert shell(counting, "-c", "exit(3)").returncode == 3
    assert shell(counting, "-c", "exit(not run(5).outcome.ok)").returncode == 0


def test_what_kvmpy_refuses_is_one_line(counting: Path) -> None:
    done = shell(counting, "-c", "step(0)")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "UsageError: a step is one instruction or more, not 0\n"
    assert "guest_prompt.py" in shell(counting, "-c", "step(0)", "--debug").stderr


def test_a_statement_that_is_none_is_a_failure(counting: Path) -> None:
    done = shell(counting, "-c", "a =")
    assert done.returncode == 1
    assert "SyntaxError" in done.stderr


def test_images_and_hosts_that_do_not_do_have_the_statuses_of_run(tmp_path: Path, counting: Path) -> None:
    assert shell(tmp_path / "none", "-c", "1").returncode == 122
    (tmp_path / "bad").write_bytes(b"\x7fELF")
    done = shell(tmp_path / "bad", "-c", "1")
    assert (done.returncode, done.stdout) == (122, "")
    assert done.stderr.startswith("kvmpy: ")
    assert shell(counting, "--device", "/dev/null", "-c", "1").returncode == 120
    assert shell(counting, "--cpus", "1000", "-c", "1").returncode == 2
    assert shell(counting, "--fly").returncode == 2


def test_the_options_of_run_make_the_machine(tmp_path: Path) -> None:
    image = flat(tmp_path, "nop", bits=32)
    options = ("--mode", "protected", "--memory", "2M", "--cpus", "2", "--address", "0x8000")
    done = shell(image, *options, "-c", "regs.rip, len(machine.vcpus), memory.regions, sregs.cs.db")
    assert done.stdout == "(0x8000, 0x2, (RAM 0x0..0x1fffff,), 0x1)\n"


def test_firmware_stands_at_the_reset_vector(tmp_path: Path) -> None:
    (tmp_path / "rom").write_bytes(b"\x90" * 0x10000)
    done = shell(tmp_path / "rom", "--firmware", "-c", "step()")
    assert done.stdout == "0xfffffff1 (f000:fff1)\n=> nop\n"


def test_a_boot_sector_that_calls_the_bios_is_told_that_there_is_none(tmp_path: Path) -> None:
    image = flat(tmp_path, "mov sp, 0x7c00; mov ax, 0x0e48; int 0x10; 1: hlt; jmp 1b")
    assert "but there is no BIOS here" in shell(image, "-c", "run(5)").stdout


# Statements on a pipe


def test_on_a_pipe_there_are_no_prompts_and_errors_do_not_end_the_session(counting: Path) -> None:
    done = shell(counting, statements="step()\n1/0\nfor i in range(2):\n    i\n\n'done'\n")
    assert done.returncode == 0
    assert done.stdout == "0x1005 <again>\n=> call 0x1013 <work>\n   rcx     0x0 -> 0x3\n0x0\n0x1\n'done'\n"
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_bytes_that_are_no_text_are_an_error_like_others(counting: Path) -> None:
    done = subprocess.run(
        command(counting), input=b"a\xff\xfe = 1\n1+1\n\x00\n2+2\n", capture_output=True, timeout=30, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"0x2\n0x4\n")
    assert done.stderr.count(b"SyntaxError") == 2


def test_the_end_of_the_input_may_come_at_once(counting: Path) -> None:
    done = shell(counting)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command(counting)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, "", "")


def test_a_reader_that_goes_away_ends_the_session(counting: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as nobody_reads:
        done = subprocess.run(
            command(counting), input="regs\n" * 5, stdout=nobody_reads, stderr=subprocess.PIPE, text=True, timeout=30,
            check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_a_guest_that_ended_badly_points_to_the_report(tmp_path: Path) -> None:
    image = flat(tmp_path, "ud2", 32)
    done = shell(image, "--mode", "protected", statements="run(5)\nreport()\n")
    assert done.stdout.startswith("triple fault: ")
    assert "\nreport() explains it\n" in done.stdout
    assert done.stderr == ""
    assert "ud2" in done.stdout.partition("report() explains it")[2]


def test_a_handler_that_raises_shows_where_in_the_user_s_code_and_can_be_replaced(tmp_path: Path) -> None:
    image = flat(tmp_path, "out 0x10, al; hlt")
    statements = """
def answer(offset, size, value):
    raise KeyError("mine")

device = machine.map_ports(0x10, 1, write=answer)
run(5)
handle(device, write=lambda offset, size, value: print("handled", value))
run(5)
"""
    done = shell(image, statements=statements)
    assert done.stderr.splitlines() == [
        "Traceback (most recent call last):",
        '  File "<console>", line 1, in <module>',
        '  File "<console>", line 2, in answer',
        "KeyError: 'mine'",
    ]
    assert done.stdout.count("handled 0\n") == 1


def test_the_vcpu_that_stopped_is_the_one_that_is_shown(tmp_path: Path) -> None:
    image = flat(tmp_path, "again: inc bx; jmp again; other: inc cx; nop; stop: jmp stop")
    statements = """
machine.vcpus[1].set_real_mode(0x1003)
br(0x1004)
run(5)
vcpu.id, regs.rcx, machine.vcpus[1].regs.rip
cpu(0)
vcpu.id, sregs.cs.base
step()
regs = "mine"
cpu(1)
regs
"""
    done = shell(image, "--cpus", "2", statements=statements)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert "breakpoint: 0x1004, vCPU 1 at 0x1004" in lines
    assert "vCPU 1 at 0x1004" in lines
    assert "(0x1, 0x1, 0x1004)" in lines
    assert "(0x0, 0x0)" in lines
    assert lines[-1] == "'mine'"


def test_a_guest_in_the_background_on_a_pipe_runs_beside_the_statements(talking: Path) -> None:
    statements = """
start()
machine.running
console.expect(b".\\n.\\n", 10) is not None
regs.rip
dump("rsp")
dump(0x1000, 2, physical=True)
pause()
regs.rbx > 0
start(0.01)
import time
while machine.running: time.sleep(0.01)

'next'
"""
    done = shell(talking, statements=statements)
    lines = [line for line in done.stdout.splitlines() if line not in (".", "")]
    assert lines[:2] == ["True", "True"]
    assert lines[2].startswith("0x1000  ba f8")
    assert "stopped" in lines
    assert lines.count("True") == 3
    assert any(line.startswith("in the background: timeout: ") for line in lines)
    assert lines[-1] == "'next'"
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["VcpuBusyError", "UsageError"]


def test_an_interrupt_of_a_statement_on_the_command_line_is_status_130(tmp_path: Path) -> None:
    image = flat(tmp_path, "mov al, '!'; out 0xe9, al; again: jmp again")
    with subprocess.Popen(
        command(image, "-c", "run()"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"!"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            if process.poll() is None:
                process.kill()
    assert (process.returncode, said) == (130, b"kvmpy: interrupted\n")


# On a terminal


@pytest.fixture
def terminal(counting: Path) -> Iterator[PromptTerminal]:
    with PromptTerminal(*command(counting)) as terminal:
        terminal.wait_for(PROMPT)
        yield terminal


def test_the_prompt_says_what_it_is_and_control_d_leaves(terminal: PromptTerminal) -> None:
    assert terminal.shown == (
        "program.elf stands in 64-bit mode, ring 0. `commands` lists what there is, Ctrl-D leaves.\n"
        f"0x1000 <_start>\n=> mov ecx, 3\n{PROMPT}"
    )
    terminal.type("\x04")
    assert terminal.status() == 0


def test_commands_are_listed_and_one_without_parentheses_is_explained(terminal: PromptTerminal) -> None:
    terminal.type("commands\n")
    at = terminal.wait_for(PROMPT, after=len(terminal.shown))
    listed = terminal.shown
    for name in ("step", "run", "cont", "until", "br", "watch", "walk", "dump", "dis", "stack", "exits", "report"):
        assert re.search(rf"^{name}\(", listed, re.MULTILINE), name
    terminal.type("step\n")
    terminal.wait_for("step(n=1, timeout=10.0)         Execute n instructions", after=at)


def test_tab_completes_names_registers_and_symbols(terminal: PromptTerminal) -> None:
    terminal.type("mach\t.vcp\t[0].regs.rs\t")
    terminal.wait_for("machine.vcpus[0].regs.rs")
    terminal.type("p\n")
    at = terminal.wait_for("0xff6000\n")
    terminal.type("until('wo\t)\n")
    terminal.wait_for("until('work')\n0x1013 <work>\n", after=at)


def test_control_c_stops_a_guest_and_cancels_a_line(talking: Path) -> None:
    with PromptTerminal(*command(talking)) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("run()\n")
        terminal.wait_for(".\n.\n")
        at = len(terminal.shown)
        terminal.type("\x03")
        at = terminal.wait_for("interrupted\n", after=at)
        assert re.search(r"rbx     0x0 -> 0x\w+\n", terminal.shown[: terminal.wait_for(PROMPT, after=at)])
        at = len(terminal.shown)
        terminal.type("no such thing")
        at = terminal.wait_for("thing", after=at)
        terminal.type("\x03")
        at = terminal.wait_for("KeyboardInterrupt", after=at)
        at = terminal.wait_for(PROMPT, after=at)
        terminal.type("import time; time.sleep(100)\n")
        at = terminal.wait_for("\n", after=at)
        terminal.type("\x03")
        at = terminal.wait_for("KeyboardInterrupt", after=at)
        assert "interrupted" not in terminal.shown[at:]
        at = terminal.wait_for(PROMPT, after=at)
        terminal.type("run()\n")
        at = terminal.wait_for(".\n", after=at)
        terminal.type("\x03")
        terminal.wait_for("interrupted\n", after=at)
        terminal.type("exit(4)\n")
        assert terminal.status() == 4


def test_what_a_guest_in_the_background_writes_leaves_the_line_as_it_is(talking: Path) -> None:
    with PromptTerminal(*command(talking)) as terminal:
        at = terminal.wait_for(PROMPT)
        terminal.type("start()\n")
        at = terminal.wait_for(".\n" + PROMPT, after=at)
        terminal.type("40 + ")
        at = terminal.wait_for("40 + ", after=at)
        at = terminal.wait_for(f".\n{PROMPT}40 + ", after=at)  # drawn again, as it was typed
        terminal.type("2\n")
        at = terminal.wait_for("0x2a\n", after=at)
        terminal.type("pause()\n")
        at = terminal.wait_for("stopped\n0x10", after=at)
        at = terminal.wait_for(PROMPT, after=at)
        terminal.type("'quiet'\n")
        at = terminal.wait_for("'quiet'\n" + PROMPT, after=at)
        assert "." not in terminal.shown[terminal.shown.index("'quiet'\n'quiet'") :]


@pytest.mark.parametrize("without", ["", "prompt_line._readline_library = lambda: None"])
def test_the_line_is_erased_where_the_terminal_can_do_that(talking: Path, without: str) -> None:
    program = f"""
import sys
from kvmpy.cli import main, prompt_line
{without}
sys.exit(main(["shell", {str(talking)!r}]))
"""
    with PromptTerminal(sys.executable, "-c", program, term="xterm") as terminal:
        at = terminal.wait_for(PROMPT)
        terminal.type("start()\n")
        terminal.wait_for(f"{PROMPT}\r\x1b[K", after=at)
        terminal.type("40 + ")
        at = terminal.wait_for("40 + ", after=at)
        at = terminal.wait_for(f".\n{PROMPT}40 + ", after=at)
        terminal.type("2\n")
        terminal.wait_for("0x2a\n", after=at)


def test_it_works_with_a_python_without_readline(talking: Path) -> None:
    program = f"""
import sys
sys.modules["readline"] = None
from kvmpy.cli import main
sys.exit(main(["shell", {str(talking)!r}]))
"""
    with PromptTerminal(sys.executable, "-c", program) as terminal:
        at = terminal.wait_for(PROMPT)
        terminal.type("start()\n")
        at = terminal.wait_for(".\n.\n", after=at)
        terminal.type("pause()\n")
        at = terminal.wait_for("stopped\n", after=at)
        terminal.wait_for(PROMPT, after=at)
        terminal.type("\x04")
        assert terminal.status() == 0


def test_the_end_of_a_run_in_the_background_is_told_while_one_types(tmp_path: Path) -> None:
    image = flat(tmp_path, "mov cx, 0xffff; 1: loop 1b; mov al, '$'; out 0xe9, al; cli; hlt")
    with PromptTerminal(*command(image)) as terminal:
        at = terminal.wait_for(PROMPT)
        terminal.type("start()\n")
        at = terminal.wait_for("$\n", after=at)
        at = terminal.wait_for("in the background: halted", after=at)
        terminal.wait_for(PROMPT, after=at)
        terminal.type("regs.rcx\n")
        terminal.wait_for("0x0\n", after=at)


def test_what_a_handler_prints_and_raises_in_the_background_is_shown(tmp_path: Path) -> None:
    image = flat(tmp_path, "mov al, 5; out 0x10, al; out 0x11, al; hlt")
    with PromptTerminal(*command(image)) as terminal:
        at = terminal.wait_for(PROMPT)
        terminal.type("d = machine.map_ports(0x10, 1, write=lambda *a: print('written', a))\n")
        at = terminal.wait_for(PROMPT, after=at)
        terminal.type("e = machine.map_ports(0x11, 1, write=lambda *a: 1 / 0)\n")
        at = terminal.wait_for(PROMPT, after=at)
        terminal.type("start()\n")
        terminal.wait_for("written (0, 1, 5)\n", after=at)
        at = terminal.wait_for("ZeroDivisionError: division by zero\n", after=at)
        terminal.type("handle(e, write=d.write)\n")
        at = terminal.wait_for("ports (port 0x11..0x11)\n", after=at)
        terminal.type("run(5)\n")
        terminal.wait_for("written (0, 1, 5)\n", after=at)


# The page about it


def test_the_session_of_the_page_is_what_the_terminal_shows(tmp_path: Path) -> None:
    assemble("nop")  # skips where the tools are missing
    if shell_has_no_disassembler():
        pytest.skip("the page shows a session with capstone, which is not installed")
    page = blocks(PAGE)
    (source,) = (block.text for block in page if block.language == "gas")
    (tmp_path / "counter.s").write_text(source)
    (typed,) = (block.text for block in page if block.language == "console")
    *building, _ = (line.removeprefix("$ ").split() for line in typed.splitlines())
    for words in building:
        subprocess.run(words, cwd=tmp_path, check=True, timeout=30)
    expected = "".join(block.text for block in page if block.language == "pycon")
    with PromptTerminal(*command("counter.elf"), cwd=str(tmp_path)) as terminal:
        at = terminal.wait_for(PROMPT)
        for line in re.findall(r"^(?:>>>|\.\.\.) (.*)$", expected, re.MULTILINE):
            terminal.type(f"{line}\n")
            at = terminal.wait_for("\n", after=at)
            waiting = "... " if line.startswith(("def ", "    ")) else PROMPT
            at = terminal.wait_for(waiting, after=at)
        assert terminal.shown == expected + PROMPT


def shell_has_no_disassembler() -> bool:
    from kvmpy.debug.disassembly import Disassembler

    return not Disassembler().available
