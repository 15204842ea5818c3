"""The C programs and the guests that kvmpy is measured with."""

import shutil
import subprocess
from pathlib import Path

import pytest

import gnu_toolchain
from kvmpy.bench import guests
from kvmpy.bench.contenders import C_SOURCES, BenchError, Contenders, milliseconds_until

SOURCES = sorted(C_SOURCES.glob("*.c"))

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs `gcc` (Debian package gcc)")


@needs_gcc
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_c_program_compiles_without_warnings(path: Path, tmp_path: Path) -> None:
    kind = ["-shared", "-fPIC"] if path.stem.endswith("_stub") else []
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", *kind, "-o", str(tmp_path / "out"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_there_are_c_programs() -> None:
    assert {path.stem for path in SOURCES} == {"exit_loop", "idle_vms", "kick_loop", "kvm_run_stub", "vm_lifecycle"}


@pytest.mark.parametrize("name", list(guests.SOURCES))
def test_the_machine_code_is_what_the_source_says(name: str) -> None:
    code, symbols = gnu_toolchain.assemble_with_symbols(guests.SOURCES[name], address=guests.ROM_START)
    assert guests.PROGRAMS[name] == code
    if "count" in symbols:
        rom = guests.firmware(name, 0x1234_5678)
        at = symbols["count"] - guests.ROM_START
        assert rom[at : at + 4] == bytes.fromhex("78563412")


def test_every_program_has_its_source() -> None:
    assert guests.PROGRAMS.keys() == guests.SOURCES.keys()


@pytest.mark.parametrize("name", list(guests.PROGRAMS))
def test_a_firmware_jumps_from_the_reset_vector_to_its_program(name: str) -> None:
    rom = guests.firmware(name)
    assert len(rom) == 0x1_0000
    assert rom.startswith(guests.PROGRAMS[name])
    vector = gnu_toolchain.assemble(".org 0xfff0\njmp near ptr start - 0xffff0000\nstart = 0xffff0000", address=0)
    assert rom[0xFFF0:0xFFF3] == vector[0xFFF0:0xFFF3]


def test_a_compiler_error_says_what_the_compiler_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs `gcc` (Debian package gcc)")
    (tmp_path / "broken.c").write_text("int main(void) { return nothing_like_this; }\n")
    monkeypatch.setattr("kvmpy.bench.contenders.C_SOURCES", tmp_path)
    with Contenders() as contenders, pytest.raises(BenchError, match="nothing_like_this"):
        contenders.build("broken")


@needs_gcc
def test_a_program_that_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaves.c").write_text("int main(void) { return 3; }\n")
    monkeypatch.setattr("kvmpy.bench.contenders.C_SOURCES", tmp_path)
    with Contenders() as contenders, pytest.raises(BenchError, match="leaves failed with status 3"):
        contenders.program("leaves").ask(1)


def test_without_the_tools_it_says_which_packages_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with Contenders() as contenders:
        assert "package gcc" in contenders.no_c
        assert "package qemu-system-x86" in contenders.no_qemu
        with pytest.raises(BenchError, match="gcc"):
            contenders.build("exit_loop")


def test_nothing_is_left_behind() -> None:
    with Contenders() as contenders:
        folder = contenders.folder
        assert folder.is_dir()
    assert not folder.exists()


def test_the_multiboot_kernel_is_its_source() -> None:
    code, _ = gnu_toolchain.assemble_with_symbols(guests.MULTIBOOT_SOURCE, address=guests.MULTIBOOT_START)
    assert code == guests.MULTIBOOT
    assert guests.MULTIBOOT_TEXT in code


def test_the_time_until_a_word_is_over_with_the_word() -> None:
    assert milliseconds_until(b"two", "sh", "-c", "echo one; sleep 0.01; printf 'tw'; printf 'o'; sleep 60") > 0
    assert milliseconds_until(b"two", "sh", "-c", "echo one; echo two >&2; sleep 60", stderr=True) > 0


def test_a_process_that_never_says_the_word_is_an_error() -> None:
    with pytest.raises(BenchError, match="ended without a word of b'two'"):
        milliseconds_until(b"two", "echo", "one")
