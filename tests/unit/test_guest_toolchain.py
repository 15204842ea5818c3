"""The assembler and the compiler for guests, as kvmpy.guest.toolchain and as the tests use it."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from gnu_toolchain import TOOLCHAIN, assemble, assemble_with_symbols, compile_c
from kvmpy import UsageError
from kvmpy.guest import include_folder
from kvmpy.guest.toolchain import GnuToolchain, GuestProgram, SourceError, ToolMissingError

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs GNU as for x86")


def test_sixteen_bit_code_is_what_the_manual_says() -> None:
    assert assemble("mov dx, 0x3f8\nadd al, bl\nadd al, '0'\nout dx, al\nhlt") == bytes.fromhex(
        "BAF803 00D8 0430 EE F4"
    )


@pytest.mark.parametrize(
    ("bits", "code"),
    [(16, "B8 0000"), (32, "B8 00000000"), (64, "48 C7C0 00000000")],
)
def test_operand_sizes_follow_the_mode(bits: int, code: str) -> None:
    register = {16: "ax", 32: "eax", 64: "rax"}[bits]
    assert assemble(f"mov {register}, 0", bits=bits) == bytes.fromhex(code)


def test_addresses_count_from_the_link_address() -> None:
    image, symbols = assemble_with_symbols('nop\nmov bx, offset text\nhlt\ntext: .ascii "hi"', address=0x7C00)
    assert symbols["text"] == 0x7C05
    assert image == b"\x90\xbb\x05\x7c\xf4hi"


def test_one_source_may_switch_modes() -> None:
    source = "ljmp 8:wide\n.code32\nwide: mov eax, offset wide\n.code64\nmov rax, offset wide"
    image, symbols = assemble_with_symbols(source, address=0x2000)
    wide = symbols["wide"]
    assert wide == 0x2005
    assert image.startswith(
        b"\xea" + wide.to_bytes(2, "little") + b"\x08\x00\xb8" + wide.to_bytes(4, "little") + b"\x48"
    )


def test_data_follows_the_code_at_its_address() -> None:
    image, symbols = assemble_with_symbols(
        "hlt\n.data\n.balign 8\nvalue: .quad 0x1122334455667788\n.bss\nroom: .skip 64"
    )
    offset = symbols["value"] - 0x1000
    assert image[offset : offset + 8] == bytes.fromhex("8877665544332211")
    assert len(image) == offset + 8
    assert symbols["room"] >= symbols["value"] + 8


def test_an_error_shows_the_line_of_the_source() -> None:
    with pytest.raises(SourceError, match=r"no such instruction") as caught:
        assemble("nop\nmovv ax, 1\nhlt")
    assert "\n>   2 movv ax, 1\n" in str(caught.value)
    assert "\n    1 nop\n" in str(caught.value)


def test_an_address_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(SourceError, match="relocation truncated to fit"):
        assemble("mov ax, [text]\ntext:", address=0x12_3456)


def test_the_same_source_is_translated_once() -> None:
    assert TOOLCHAIN.assemble("nop") is TOOLCHAIN.assemble("nop", address=0x1000, bits=16)
    assert assemble("nop; lea bx, [0]", address=0x1000) == assemble("nop; lea bx, [0]", address=0x2000)


@pytest.mark.parametrize("bits", [32, 64])
def test_c_starts_with_its_entry_section_and_uses_no_sse(bits: int) -> None:
    program = compile_c(
        """
        #include <stdint.h>
        static const uint32_t table[4] = {1, 2, 3, 4};
        volatile uint32_t result;
        __attribute__((noinline)) static uint32_t look_up(uint32_t index) { return table[index & 3]; }
        __attribute__((section(".text.entry"))) void _start(void) {
            result = look_up(result);
            for (;;) __asm__ volatile("hlt");
        }
        """,
        address=0x20_0000,
        bits=bits,
    )
    assert program.entry == program.symbols["_start"] == 0x20_0000
    assert program.symbols["look_up"] > program.entry
    with program.elf.open("rb") as stream:
        elf = ELFFile(stream)
        assert elf.elfclass == bits
        assert elf["e_type"] == "ET_EXEC"
    assert b"\x01\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00\x04\x00\x00\x00" in program.image
    with pytest.raises(SourceError):
        compile_c("double _start(double x) { return x * 2; }", bits=bits)


def test_c_that_does_not_link_is_an_error() -> None:
    with pytest.raises(SourceError, match="undefined reference to `missing'"):
        compile_c("void missing(void); void _start(void) { missing(); }")


def test_a_missing_tool_is_an_error_that_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(ToolMissingError, match=r"`as`.*\(Debian package binutils\)") as caught:
        GnuToolchain().assemble("nop")
    assert (caught.value.tool, caught.value.package) == ("as", "binutils")
    with pytest.raises(ToolMissingError, match=r"`gcc`.*\(Debian package gcc\)"):
        GnuToolchain().compile_c("void _start(void) {}")


def test_without_the_tools_a_test_is_skipped_or_fails_where_kvm_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.delenv("KVMPY_REQUIRE_KVM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="Debian package binutils"):
        assemble("nop # never assembled before")
    monkeypatch.setenv("KVMPY_REQUIRE_KVM", "1")
    with pytest.raises(pytest.fail.Exception, match="Debian package gcc"):
        compile_c("/* never compiled before */")


@pytest.mark.parametrize("bits", [0, 8, 24, 128])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(UsageError, match=f"not {bits}"):
        assemble("nop", bits=bits)
    with pytest.raises(UsageError, match=f"not {bits}"):
        compile_c("void _start(void) {}", bits=bits)


def test_nothing_to_compile_is_refused() -> None:
    with pytest.raises(UsageError, match="no source"):
        GnuToolchain().compile_c()


def make_project(folder: Path) -> None:
    """Two C files, a header and a file of assembly."""
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "answer.h").write_text("extern const int answer;\nint triple(int);\n")
    (folder / "answer.c").write_text('#include "answer.h"\nconst int answer = 14;\n')
    (folder / "triple.S").write_text(".globl triple\ntriple: leal (%rdi,%rdi,2), %eax\nret\n")
    (folder / "start.c").write_text(
        '#include "answer.h"\nvolatile int result;\nvoid _start(void) { result = triple(answer); }\n'
    )


def test_a_program_may_have_several_files_and_flags_relative_to_its_folder(tmp_path: Path) -> None:
    make_project(tmp_path / "project")
    names = ("start.c", Path("answer.c"), "triple.S")
    program = GnuToolchain(tmp_path / "made").compile_c(*names, flags=("-Iinclude",), folder=tmp_path / "project")
    assert {"_start", "answer", "triple", "result"} <= program.symbols.keys()
    assert (14).to_bytes(4, "little") in program.image


def test_a_file_that_the_compiler_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.c").write_text("int x = ;\n")
    with pytest.raises(SourceError, match=r"broken\.c:1:9: error") as caught:
        GnuToolchain(tmp_path / "made").compile_c("broken.c", folder=tmp_path)
    assert "error" in caught.value.said
    assert [path.name for path in (tmp_path / "made").iterdir()] == [], "nothing half-made stays behind"


def test_a_source_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.c"):
        GnuToolchain(tmp_path).compile_c("missing.c", folder=tmp_path)


def test_warnings_are_kept_with_the_program(tmp_path: Path) -> None:
    source = "void _start(void) { int unused; }"
    for toolchain in (GnuToolchain(tmp_path), GnuToolchain(tmp_path)):  # the second finds what the first has made
        assert "unused variable" in toolchain.compile_c(source).warnings
    assert GnuToolchain(tmp_path).compile_c("void _start(void) {}").warnings == ""


def test_the_content_of_a_source_decides_what_is_made(tmp_path: Path) -> None:
    toolchain = GnuToolchain(tmp_path / "made")
    source = tmp_path / "start.c"
    images = []
    for value in (1, 2, 1):
        source.write_text(f"int value = {value}; void _start(void) {{}}\n")
        images.append(toolchain.compile_c(source).image)
    assert images[0] == images[2] != images[1]
    assert toolchain.compile_c(source, flags=("-DANYTHING",)) is not toolchain.compile_c(source)
    assert toolchain.compile_c(source, address=0x20_0000).address == 0x20_0000


def test_a_linker_script_of_ones_own_decides_where_everything_lies(tmp_path: Path) -> None:
    (tmp_path / "my.ld").write_text(
        "ENTRY(_start) SECTIONS { . = 0x300000; .text : { *(.text*) } . = 0x310000; .data : { *(.data*) } "
        "/DISCARD/ : { *(*) } }"
    )
    program = GnuToolchain(tmp_path / "made").compile_c(
        "int value = 7; void _start(void) {}", linker_script="my.ld", folder=tmp_path, flags=("-g0",)
    )
    assert (program.entry, program.address) == (0x30_0000, 0x30_0000)
    assert program.symbols["value"] == 0x31_0000
    assert program.image[0x1_0000:] == (7).to_bytes(4, "little")


def test_a_program_at_two_ends_of_the_address_space_has_no_flat_image(tmp_path: Path) -> None:
    (tmp_path / "far.ld").write_text(
        "ENTRY(_start) SECTIONS { . = 0x100000; .data : { *(.data*) } . = 0xffffffff80000000; .text : { *(.text*) } "
        "/DISCARD/ : { *(*) } }"
    )
    program = GnuToolchain(tmp_path / "made").compile_c(
        "int value = 7; void _start(void) {}",
        linker_script="far.ld",
        folder=tmp_path,
        flags=("-g0", "-mcmodel=kernel"),
    )
    assert program.entry == 0xFFFF_FFFF_8000_0000
    with pytest.raises(UsageError, match="no flat image"):
        assert program.image


def test_line_numbers_are_in_the_file() -> None:
    program = TOOLCHAIN.compile_c("void _start(void) {}\n")
    with program.elf.open("rb") as stream:
        assert ELFFile(stream).has_dwarf_info()


SHARES = """
import sys
from kvmpy.guest.toolchain import GnuToolchain
sources = [f"int value_{number} = {number};" for number in range(3)]
print(GnuToolchain(sys.argv[1]).compile_c(*sources, "void _start(void) {}").elf)
"""


def test_processes_that_share_a_folder_make_a_program_once_and_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARES, str(tmp_path / "made")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {process.communicate(timeout=50)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(answers) == 1
    assert [path.name for path in (tmp_path / "made").iterdir()] == [Path(answers.pop()).parent.name]


def test_the_headers_of_the_package_are_found() -> None:
    names = {path.name for path in (include_folder() / "kvmpy").glob("*.h")}
    assert names >= {
        "exit.h", "hypercall.h", "interrupts.h", "ktap.h", "kvm_paravirt.h", "ports.h", "serial.h", "virtio.h",
    }  # fmt: skip
    for bits in (32, 64):
        includes = "".join(f"#include <kvmpy/{name}>\n" for name in sorted(names))
        text = includes + "void _start(void) { kvmpy_exit(0); }\n"
        program = TOOLCHAIN.compile_c(text, bits=bits, flags=("-Werror",))
        assert isinstance(program, GuestProgram)
