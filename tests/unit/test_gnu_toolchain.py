"""The tests' own assembler and compiler."""

import platform
import shutil

import pytest
from elftools.elf.elffile import ELFFile

import gnu_toolchain
from gnu_toolchain import AssemblerError, assemble, assemble_with_symbols, compile_c

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
    with pytest.raises(AssemblerError, match=r"no such instruction") as caught:
        assemble("nop\nmovv ax, 1\nhlt")
    assert "\n>   2 movv ax, 1\n" in str(caught.value)
    assert "\n    1 nop\n" in str(caught.value)


def test_an_address_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(AssemblerError, match="relocation truncated to fit"):
        assemble("mov ax, [text]\ntext:", address=0x12_3456)


def test_the_same_source_is_translated_once() -> None:
    assert gnu_toolchain._assembled("nop", 0x1000, 16) is gnu_toolchain._assembled("nop", 0x1000, 16)
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
    with pytest.raises(AssemblerError):
        compile_c("double _start(double x) { return x * 2; }", bits=bits)


def test_c_that_does_not_link_is_an_error() -> None:
    with pytest.raises(AssemblerError, match="undefined reference to `missing'"):
        compile_c("void missing(void); void _start(void) { missing(); }")


def test_without_the_tools_a_test_is_skipped_or_fails_where_kvm_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    monkeypatch.delenv("KVMPY_REQUIRE_KVM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="Debian package binutils"):
        assemble("nop # never assembled before")
    monkeypatch.setenv("KVMPY_REQUIRE_KVM", "1")
    with pytest.raises(pytest.fail.Exception, match="Debian package gcc"):
        compile_c("/* never compiled before */")
