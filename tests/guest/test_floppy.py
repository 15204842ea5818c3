"""A floppy image that SeaBIOS boots: INT 10h, 13h and 16h work, on Debian's SeaBIOS as it is."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gnu_toolchain import assemble_with_symbols
from kvmpy import Machine, MiB
from kvmpy.boot import FirmwareImage
from kvmpy.devices import I8042, Cmos, DebugConsole, DebugExit, FwCfg, PciHostBridge, PostPort, Uart16550
from kvmpy.devices.fw_cfg import FLOPPY_SIZES
from kvmpy.pytest_plugin.requirement import skip_or_fail

SEABIOS = Path("/usr/share/seabios")
TEXT = "The second sector speaks."
A_PRESSED_AND_RELEASED = b"\x1e\x9e"
SCREEN, COLUMNS, ROWS = 0xB8000, 80, 25


def seabios(name: str) -> Path:
    image = SEABIOS / name
    if not image.exists():
        skip_or_fail(f"needs {image} (Debian package seabios)")
    return image


def boot_sectors() -> tuple[bytes, dict[str, int]]:
    source = Path(__file__).with_name("floppy_boot.s").read_text("utf-8")
    return assemble_with_symbols(source, address=0x7C00)


class Pc:
    """What SeaBIOS looks at, with a floppy and a debug-exit port."""

    def __init__(self, machine: Machine, floppy: bytes, video_bios: Path | None = None) -> None:
        self.log = machine.add(DebugConsole(port=0x402))
        self.serial = machine.add(Uart16550())
        self.keyboard = machine.add(I8042())
        machine.add(Cmos(memory_below_4g=16 * MiB))
        machine.add(PciHostBridge())
        machine.add(PostPort())
        machine.add(DebugExit())
        configuration = machine.add(FwCfg(ram_size=16 * MiB, memory=machine.memory))
        configuration.add_floppy(floppy)
        if video_bios is not None:
            configuration.add_video_bios(video_bios.read_bytes())
        machine.load(FirmwareImage(seabios("bios-256k.bin"), shadow=256 * 1024))


def screen_text(machine: Machine) -> list[str]:
    characters = machine.memory.read(SCREEN, 2 * COLUMNS * ROWS)[::2].decode("cp437")
    return [characters[row * COLUMNS :][:COLUMNS].rstrip(" \0") for row in range(ROWS)]


def check_the_end(machine: Machine, pc: Pc, places: dict[str, int], tracks: int, sectors: int) -> None:
    """Type, and look at what the boot sector left in memory."""
    pc.keyboard.press(A_PRESSED_AND_RELEASED)
    outcome = machine.wait()
    assert outcome.code == ord("a") << 1 | 1, outcome
    assert machine.memory.read_u16(places["key"]) == 0x1E << 8 | ord("a")
    # AH=08h: the highest track and sector in CX, the highest side and the number of drives in DX.
    assert machine.memory.read_u16(places["geometry"]) == (tracks - 1) << 8 | sectors
    assert machine.memory.read_u16(places["geometry"] + 2) == 1 << 8 | 1
    # What was written to the third sector was read from it: the disk is in the guest's RAM.
    assert machine.memory.read(places["third"], len(TEXT)).decode() == TEXT


def test_a_boot_sector_reads_prints_and_waits_for_a_key() -> None:
    floppy, places = boot_sectors()
    with Machine(memory=16 * MiB) as machine:
        pc = Pc(machine, floppy, seabios("vgabios-isavga.bin"))
        machine.start(timeout=50)
        pc.serial.expect(TEXT.encode(), timeout=45)  # COM1 has it, and the text screen, too
        with machine.paused():
            text = screen_text(machine)
        assert text[0].startswith("SeaBIOS (version")
        assert "Booting from Floppy..." in text
        assert TEXT in text
        check_the_end(machine, pc, places, tracks=80, sectors=18)


@pytest.mark.slow
def test_without_a_video_bios_int_10h_prints_on_com1() -> None:
    floppy, places = boot_sectors()
    with Machine(memory=16 * MiB) as machine:
        pc = Pc(machine, floppy.ljust(360 * 1024, b"\0"))
        machine.start(timeout=30)
        pc.serial.expect(TEXT.encode(), timeout=25)
        check_the_end(machine, pc, places, tracks=40, sectors=9)


@pytest.mark.deadline(120)
def test_kvmpy_run_boots_a_floppy_types_what_it_reads_and_logs_to_the_debug_console(tmp_path: Path) -> None:
    floppy, _ = boot_sectors()
    (tmp_path / "boot.img").write_bytes(floppy)
    command = [sys.executable, "-m", "kvmpy", "run", "--firmware", str(seabios("bios.bin")), "--timeout", "100"]
    with subprocess.Popen(
        [*command, "--floppy", str(tmp_path / "boot.img"), "--debug-console", str(tmp_path / "log")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + 50
        said = b""
        while TEXT.encode() not in said and time.monotonic() < deadline:
            piece = os.read(process.stdout.fileno(), 0x1000)
            if not piece:
                break
            said += piece
        process.stdin.write(b"k")
        process.stdin.close()
        assert process.wait(timeout=50) == (ord("k") << 1 | 1) & 0xFF
    assert TEXT.encode() in said
    assert (tmp_path / "log").read_text("latin-1").startswith("SeaBIOS (version")


def kvmpy_run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmpy", "run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("size", [0, FLOPPY_SIZES[-1] + 1])
def test_what_is_no_floppy_is_one_line(tmp_path: Path, size: int) -> None:
    (tmp_path / "boot.img").write_bytes(bytes(size))
    (tmp_path / "rom").write_bytes(bytes(0x10000))
    done = kvmpy_run("--firmware", tmp_path / "rom", "--floppy", tmp_path / "boot.img")
    assert done.returncode == 122
    assert "a floppy image has 1 to 2949120 (2880 KiB)" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_floppy_without_a_firmware_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "boot.img").write_bytes(bytes(512))
    done = kvmpy_run(tmp_path / "boot.img", "--floppy", tmp_path / "boot.img")
    assert done.returncode == 2
    assert "--floppy goes with --firmware" in done.stderr


def test_a_boot_sector_that_calls_the_bios_learns_where_there_is_one(tmp_path: Path) -> None:
    floppy, _ = boot_sectors()
    (tmp_path / "boot.img").write_bytes(floppy[:512])
    done = kvmpy_run(tmp_path / "boot.img", "--timeout", "10")
    assert done.returncode == 126
    assert "INT 0x13 at 0x0000:0x7c1a with AX=0x0201, but there is no BIOS here" in done.stderr
    assert "--floppy IMAGE" in done.stderr
