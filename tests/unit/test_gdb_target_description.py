"""What gdb is told of the registers, and of which processor it is."""

from __future__ import annotations

import xml.etree.ElementTree as Xml

import pytest

from kvmpy.debug.gdb.architecture import Architecture, architecture_named, fitting_architecture
from kvmpy.debug.gdb.packet import PACKET_SIZE
from kvmpy.debug.gdb.target_description import describe
from kvmpy.errors import UsageError
from kvmpy.x86.modes import long_mode, protected_mode, real_mode
from kvmpy.x86.registers import CpuState

PREDEFINED = {
    "int", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "uint128", "code_ptr", "data_ptr",
    "i387_ext", "ieee_single", "ieee_double",
}  # fmt: skip
"""Types that gdb knows (gdb manual, appendix G.3 "Predefined Target Types")."""

DESCRIPTIONS = [(architecture, avx) for architecture in Architecture for avx in (False, True)]


@pytest.mark.parametrize(("architecture", "avx"), DESCRIPTIONS)
def test_register_numbers_count_up_over_all_features(architecture: Architecture, avx: bool) -> None:
    description = describe(architecture, avx=avx)
    document = Xml.fromstring(description.xml)
    listed = document.findall("feature/reg")
    assert [int(register.attrib["regnum"]) for register in listed] == list(range(len(description.registers)))
    assert [register.attrib["name"] for register in listed] == [register.name for register in description.registers]
    assert [int(register.attrib["bitsize"]) for register in listed] == [8 * size for size in description.sizes]
    assert document.findtext("architecture") == architecture.value


@pytest.mark.parametrize(("architecture", "avx"), DESCRIPTIONS)
def test_every_type_is_defined(architecture: Architecture, avx: bool) -> None:
    for feature in Xml.fromstring(describe(architecture, avx=avx).xml).findall("feature"):
        own = {kind.attrib["id"] for name in ("flags", "vector", "union") for kind in feature.findall(name)}
        used = {element.attrib["type"] for element in feature.iter() if "type" in element.attrib}
        assert used <= own | PREDEFINED


def test_the_features_are_those_that_gdb_asks_for() -> None:
    def features(architecture: Architecture, avx: bool) -> list[str]:
        return [feature.attrib["name"] for feature in Xml.fromstring(describe(architecture, avx=avx).xml)[2:]]

    assert features(Architecture.X86_64, True) == [
        "org.gnu.gdb.i386.core", "org.gnu.gdb.i386.sse", "org.gnu.gdb.i386.avx", "org.gnu.gdb.i386.segments",
        "org.kvmpy.x86.system",
    ]  # fmt: skip
    assert features(Architecture.I386, False) == [
        "org.gnu.gdb.i386.core", "org.gnu.gdb.i386.sse", "org.kvmpy.x86.system",
    ]  # fmt: skip


@pytest.mark.parametrize("architecture", list(Architecture))
def test_all_registers_fit_a_packet(architecture: Architecture) -> None:
    assert 2 * sum(describe(architecture, avx=True).sizes) <= PACKET_SIZE


def test_names_are_those_of_the_architecture_and_sources_those_of_the_target() -> None:
    wide, narrow = describe(Architecture.X86_64), describe(Architecture.I386)
    assert [register.name for register in wide.registers[:17]] == [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
        "rip",
    ]  # fmt: skip
    assert [register.name for register in narrow.registers[:10]] == [
        "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip", "eflags",
    ]  # fmt: skip
    assert narrow.sources[:10] == ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "pc", "rflags")
    assert [wide.registers[index].source for index in wide.expedited] == ["pc", "rsp", "rbp"]
    assert [narrow.registers[index].source for index in narrow.expedited] == ["pc", "rsp", "rbp"]


@pytest.mark.parametrize(
    ("state", "architecture"),
    [
        (real_mode(0x7C00), Architecture.I8086),
        (protected_mode(0x1000, bits=16), Architecture.I8086),
        (protected_mode(0x1000), Architecture.I386),
        (long_mode(0x1000, 0x2000), Architecture.X86_64),
    ],
)
def test_the_architecture_follows_the_mode(state: CpuState, architecture: Architecture) -> None:
    assert fitting_architecture(state.sregs, state.regs.rflags) is architecture


def test_compatibility_mode_is_64_bits_and_virtual_8086_mode_16() -> None:
    compatibility = long_mode(0x1000, 0x2000).sregs
    compatibility.cs = compatibility.cs.replace(l=0, db=1)
    assert fitting_architecture(compatibility) is Architecture.X86_64
    assert fitting_architecture(protected_mode(0x1000).sregs, 0x2_0002) is Architecture.I8086


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("i8086", Architecture.I8086), ("16", Architecture.I8086), ("i386", Architecture.I386),
        ("i386:x86-64", Architecture.X86_64), ("x86-64", Architecture.X86_64), ("64", Architecture.X86_64),
    ],
)  # fmt: skip
def test_architectures_have_the_names_that_people_use(name: str, architecture: Architecture) -> None:
    assert architecture_named(name) is architecture


def test_an_unknown_architecture_is_refused_with_a_list() -> None:
    with pytest.raises(UsageError, match="there are i386:x86-64, i386, i8086"):
        architecture_named("arm")
