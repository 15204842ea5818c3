"""`kvmpy trace` as a process: files of all formats, filters, and a firmware whose every port is named."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gnu_toolchain import assemble, compile_c
from headless_browser import Page, explore
from kvmpy.pytest_plugin.requirement import skip_or_fail

SEABIOS = Path("/usr/share/seabios/bios.bin")
SEABIOS_DEBUG_PORT = 0x402
FW_CFG_DATA = 0x511
HELLO = """
    mov si, offset message; mov dx, 0x3f8
1:  lodsb; test al, al; jz 2f
    out dx, al; jmp 1b
2:  in al, 0x99; mov al, 3; out 0xf4, al
message: .asciz "hello\\n"
"""
FOREVER = "mov al, '!'; mov dx, 0x3f8; out dx, al; 1: in al, 0x80; jmp 1b"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kvmpy", "trace", *map(str, arguments)]


def trace(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50, check=False
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "guest.bin"
    path.write_bytes(assemble(HELLO))
    return path


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "html"])
def test_the_format_goes_by_the_suffix(image: Path, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"trace.{suffix}"
    done = trace(image, "--output", output)
    assert (done.returncode, done.stdout) == (7, "hello\n")  # the guest's own code, and what it prints
    assert re.fullmatch(rf"kvmpy: exited with code 7.*\nkvmpy: \d+ events in {output}\n", done.stderr)
    text = output.read_text()
    assert ("0x99" if suffix != "jsonl" else f'"address":{0x99}') in text
    assert "uart16550" in text
    if suffix == "json":
        assert json.loads(text)["traceEvents"]
    elif suffix == "jsonl":
        assert all(json.loads(line)["kind"] for line in text.splitlines())
    else:
        assert text.startswith({"txt": "#      time s", "html": "<!DOCTYPE html>"}[suffix])


def test_the_format_can_be_said(image: Path, tmp_path: Path) -> None:
    output = tmp_path / "trace.log"
    assert trace(image, "-o", output, "--format", "jsonl").returncode == 7
    ports = [line for line in map(json.loads, output.read_text().splitlines()) if line["kind"] == "port"]
    assert (ports[-1]["direction"], ports[-1]["address"]) == ("write", 0xF4)


def test_filters_choose(image: Path, tmp_path: Path) -> None:
    output = tmp_path / "trace.jsonl"

    def accesses(*filters: object) -> set[tuple[str, int]]:
        assert trace(image, "-o", output, *filters).returncode == 7
        lines = map(json.loads, output.read_text().splitlines())
        return {(line["direction"], line["address"]) for line in lines}

    assert accesses("--ports", "0x3f8-0x3ff,0x99") == {("write", 0x3F8), ("read", 0x99)}
    assert accesses("--answered-by", "nobody") == {("read", 0x99)}
    assert accesses("--vcpus", "0", "--slower-than", "10s", "--addresses", "0xfee00000-0xfeefffff") == set()
    assert accesses("--kinds", "port,hlt", "--last", "1") == {("write", 0xF4)}


def test_instructions_have_the_symbols_of_an_elf_file(tmp_path: Path) -> None:
    program = compile_c(
        """
        static __attribute__((noinline)) void print(char c) {
            __asm__ volatile("outb %0, %1" : : "a"(c), "Nd"((unsigned short)0x3f8));
        }
        void _start(void) {
            for (const char *c = "ok"; *c; c++) print(*c);
            __asm__ volatile("outb %0, %1" : : "a"((char)0), "Nd"((unsigned short)0xf4));
            for (;;) __asm__ volatile("hlt");
        }
        """
    )
    output = tmp_path / "trace.jsonl"
    done = trace(program.elf, "--steps", "-o", output, "--timeout", "20")
    assert (done.returncode, done.stdout) == (1, "ok")
    steps = [json.loads(line) for line in output.read_text().splitlines() if '"kind":"step"' in line]
    assert steps[0]["address"] == program.symbols["_start"]
    assert steps[0]["text"] == "_start"
    assert sum(step.get("text") == "print" for step in steps) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("-o", "trace.xml"), 2, "name the file"), (("-o", "nowhere/trace.txt"), 118, "No such file"),
        (("-o", "t.txt", "--kinds", "port,sport"), 2, "'sport' is no kind"),
        (("-o", "t.txt", "--ports", "9-1"), 2, "ends before"),
        (("-o", "t.txt", "--slower-than", "soon"), 2, "no time"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said(image: Path, arguments: tuple[str, ...], status: int, said: str) -> None:
    done = subprocess.run(
        command(image, *arguments), cwd=image.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert said in done.stderr
    assert done.stdout == ""  # the guest did not run


def test_a_full_disk_is_said_and_the_guest_runs_to_its_end(image: Path) -> None:
    done = trace(image, "-o", "/dev/full", "--format", "text")
    assert (done.returncode, done.stdout) == (7, "hello\n")
    assert re.search(r"0 events in /dev/full of \d+: No space left on device", done.stderr)
    image.write_bytes(assemble("mov al, 'x'; out 0xe9, al; cli; hlt"))
    done = trace(image, "-o", "/dev/full", "--format", "html")
    assert (done.returncode, done.stdout) == (118, "x")


@pytest.mark.parametrize(
    ("suffix", "number"),
    [
        ("txt", signal.SIGINT), ("jsonl", signal.SIGINT), ("json", signal.SIGINT), ("html", signal.SIGINT),
        ("json", signal.SIGKILL),
    ],
)  # fmt: skip
def test_an_interrupt_leaves_a_sound_file(image: Path, tmp_path: Path, suffix: str, number: signal.Signals) -> None:
    image.write_bytes(assemble(FOREVER))
    output = tmp_path / f"trace.{suffix}"
    with subprocess.Popen(
        command(image, "-o", output), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"!"
            if number == signal.SIGKILL:
                while output.stat().st_size < 100_000:  # written while the guest runs
                    assert process.poll() is None
                    os.sched_yield()
            process.send_signal(number)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert said.decode().endswith("kvmpy: interrupted\n")
        assert f"events in {output}" in said.decode()
    text = output.read_text()
    if suffix == "json":
        try:
            events = json.loads(text)["traceEvents"]
        except json.JSONDecodeError:
            # SIGKILL ends even a write(2) in the midst: then it is the last event that is torn, and no more.
            assert number == signal.SIGKILL
            events = json.loads(text[: text.rindex("\n")].rstrip(",") + "]}")["traceEvents"]
        assert len(events) > 3
    elif suffix == "jsonl":
        assert all(json.loads(line) for line in text.splitlines())
    elif suffix == "txt":
        assert text.endswith("\n")
    else:
        assert text.endswith("</html>\n")


# The main job: Debian's SeaBIOS


def seabios(output: Path, report: Path) -> dict[str, Any]:
    """Trace its start, and answer what the run itself counted.

    For a second or two; longer where a busy host gives it too little of these.
    """
    if not SEABIOS.exists():
        skip_or_fail(f"needs {SEABIOS} (Debian package seabios)")
    for seconds in (1.5, 5, 20):
        done = trace("--firmware", SEABIOS, "--timeout", seconds, "-o", output, "--json", report)
        assert done.returncode == 124, done.stderr
        counted: dict[str, Any] = json.loads(report.read_text())["statistics"]
        if ports_of(counted).get(SEABIOS_DEBUG_PORT, 0) > 100:
            break
    return counted


def ports_of(counted: dict[str, Any]) -> dict[int, int]:
    """How often each port was touched."""
    ports: dict[int, int] = {}
    for access in counted["accesses"] + counted["unclaimed"]:
        if access["kind"] == "port":
            ports[access["address"]] = ports.get(access["address"], 0) + access["count"]
    return ports


def assert_same(traced: dict[int, int], counted: dict[int, int]) -> None:
    """The same ports, as often; of strings, which the trace tells as one event, the statistics count nothing."""
    assert traced.keys() == counted.keys()
    strings = {port for port in traced if traced[port] != counted[port]}
    assert strings <= {FW_CFG_DATA}


def test_a_perfetto_file_of_seabios_names_every_port(tmp_path: Path) -> None:
    ports = ports_of(seabios(tmp_path / "trace.json", tmp_path / "report.json"))
    assert len(ports) > 8
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = [event["name"] for event in events if event["ph"] == "X"]
    named: dict[int, int] = {}
    for name in slices:
        access = re.match(r"(?:in|out) (0x[0-9a-f]+) (\S.*)", name)
        if access:
            named[int(access[1], 16)] = named.get(int(access[1], 16), 0) + 1
    assert_same(named, ports)
    assert slices.count("guest") > 100
    assert any(re.fullmatch(r"out 0x402 nobody \(debug port of SeaBIOS and OVMF\)", name) for name in slices)


def test_a_page_of_seabios_names_every_port(tmp_path: Path) -> None:
    ports = ports_of(seabios(tmp_path / "trace.html", tmp_path / "report.json"))
    html = (tmp_path / "trace.html").read_text()
    document = explore({"seabios": Page(html, {})})["seabios", ""]
    assert "FirmwareImage" in document.text("title")
    heads, *places = document.rows("places")
    assert [head.split(" ")[0] for head in heads][:2] == ["place", "who"]
    shown = {int(row[0], 16): int(row[4].replace(",", "")) for row in places if row[0].startswith("0x")}
    assert_same(shown, ports)
    assert all(row[1] for row in places if row[0].startswith("0x"))
