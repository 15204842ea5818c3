"""CPUID tables: lookups, features by name and by bit, vendor and brand."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import RegisterValueError, UsageError
from kvmpy.x86.cpuid import SIGNIFICANT_INDEX, CpuidEntry, CpuidTable
from kvmpy.x86.cpuid_features import FEATURES, Feature, feature, feature_name

u32 = st.integers(0, (1 << 32) - 1)


def table() -> CpuidTable:
    return CpuidTable(
        [
            CpuidEntry(0, eax=0xD, ebx=0x756E_6547, ecx=0x6C65_746E, edx=0x4965_6E69),
            CpuidEntry(1, ecx=1 << 21, edx=1),
            CpuidEntry(0xD, 0, eax=7, flags=SIGNIFICANT_INDEX),
            CpuidEntry(0xD, 1, eax=1, flags=SIGNIFICANT_INDEX),
            CpuidEntry(0x8000_0000, eax=0x8000_0001),
            CpuidEntry(0x8000_0001, edx=1 << 20),
        ]
    )


@pytest.mark.parametrize(
    ("name", "place"),
    [
        # SDM vol. 2, tables 3-10 and 3-11 and the leaf lists; APM vol. 3, appendix E; kvm/cpuid.rst.
        ("fpu", Feature(1, 0, "edx", 0)),
        ("pbe", Feature(1, 0, "edx", 31)),
        ("sse2", Feature(1, 0, "edx", 26)),
        ("x2apic", Feature(1, 0, "ecx", 21)),
        ("tsc_deadline_timer", Feature(1, 0, "ecx", 24)),
        ("xsave", Feature(1, 0, "ecx", 26)),
        ("hypervisor", Feature(1, 0, "ecx", 31)),
        ("fsgsbase", Feature(7, 0, "ebx", 0)),
        ("smap", Feature(7, 0, "ebx", 20)),
        ("avx512vl", Feature(7, 0, "ebx", 31)),
        ("la57", Feature(7, 0, "ecx", 16)),
        ("rdpid", Feature(7, 0, "ecx", 22)),
        ("pks", Feature(7, 0, "ecx", 31)),
        ("arch_capabilities", Feature(7, 0, "edx", 29)),
        ("avx_vnni", Feature(7, 1, "eax", 4)),
        ("lam", Feature(7, 1, "eax", 26)),
        ("apx_f", Feature(7, 1, "edx", 21)),
        ("xsaves", Feature(0xD, 1, "eax", 3)),
        ("svm", Feature(0x8000_0001, 0, "ecx", 2)),
        ("mwaitx", Feature(0x8000_0001, 0, "ecx", 29)),
        ("syscall", Feature(0x8000_0001, 0, "edx", 11)),
        ("nx", Feature(0x8000_0001, 0, "edx", 20)),
        ("pdpe1gb", Feature(0x8000_0001, 0, "edx", 26)),
        ("lm", Feature(0x8000_0001, 0, "edx", 29)),
        ("virt_ssbd", Feature(0x8000_0008, 0, "ebx", 25)),
        ("kvmclock", Feature(0x4000_0001, 0, "eax", 0)),
        ("kvm_pv_unhalt", Feature(0x4000_0001, 0, "eax", 7)),
        ("kvmclock_stable", Feature(0x4000_0001, 0, "eax", 24)),
    ],
)
def test_features_are_at_the_bits_of_the_manuals(name: str, place: Feature) -> None:
    assert feature(name) == place
    assert feature_name(place) == name


def test_no_bit_has_two_names() -> None:
    assert len(set(FEATURES.values())) == len(FEATURES)


_GCC_LEAVES = {
    "%eax=1": (1, 0),
    "%eax=7": (7, 0),
    "%eax=7,%ecx=1": (7, 1),
    "%eax=0xd,%ecx=1": (0xD, 1),
    "%eax=0x80000001": (0x8000_0001, 0),
}
_OUR_NAMES = {"cmpxchg8b": "cx8", "cmpxchg16b": "cx16", "fxsave": "fxsr", "pclmul": "pclmulqdq", "rdrnd": "rdrand"}


def test_names_agree_with_the_compilers_header() -> None:
    """gcc's cpuid.h as an independent list: bits that both know by one name must be the same bit."""
    compiler = shutil.which("gcc")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs gcc on x86-64 for its cpuid.h")
    include = subprocess.run([compiler, "-print-file-name=include/cpuid.h"], capture_output=True, text=True, check=True)
    header = Path(include.stdout.strip())
    if not header.is_file():
        pytest.skip(f"gcc has no {header}")
    agreed = 0
    leaf: tuple[int, int] | None = None
    register = ""
    for line in header.read_text().splitlines():
        if heading := re.match(r"/\* .*?\((%eax.*?)\)", line):
            leaf = _GCC_LEAVES.get(heading[1].replace(" ", "").replace("==", "="))
            register = "eax"  # leaves that have one register only do not name it
        elif heading := re.match(r"/\* %(e[abcd]x)", line):
            register = heading[1]
        elif (bit := re.match(r"#define bit_(\w+)\s+\(1u? << (\d+)\)", line)) and leaf:
            name = bit[1].lower()
            name = _OUR_NAMES.get(name, name)
            if name in FEATURES and FEATURES[name].function == leaf[0]:
                place = FEATURES[name]
                assert (place.function, place.index, place.register, place.bit) == (*leaf, register, int(bit[2])), name
                agreed += 1
    assert agreed > 40


def test_find_minds_the_index_only_where_it_counts() -> None:
    cpuid = table()
    found = cpuid.find(0xD, 1)
    assert found is not None
    assert found.eax == 1
    assert cpuid.find(0xD, 2) is None
    assert cpuid.find(1, 5) == cpuid.find(1)
    assert cpuid.find(0x1234) is None


def test_has_set_and_clear_change_exactly_one_bit() -> None:
    cpuid = table()
    assert cpuid.has("x2apic")
    assert not cpuid.has("xsave")
    cpuid.set("xsave")
    assert cpuid.find(1) == CpuidEntry(1, ecx=1 << 21 | 1 << 26, edx=1)
    cpuid.clear("x2apic", (1, 0, "edx", 0))
    assert cpuid.find(1) == CpuidEntry(1, ecx=1 << 26)


@given(st.sampled_from(sorted(FEATURES)), u32, u32)
def test_setting_and_clearing_any_feature_leaves_the_other_bits(name: str, first: int, second: int) -> None:
    place = FEATURES[name]
    flags = SIGNIFICANT_INDEX if place.function in (7, 0xD) else 0
    entry = CpuidEntry(place.function, place.index, first, second, first ^ second, first & second, flags)
    cpuid = CpuidTable([entry])
    cpuid.set(name)
    assert cpuid.has(name)
    cpuid.clear(name)
    assert not cpuid.has(name)
    after = cpuid[0]
    for register in ("eax", "ebx", "ecx", "edx"):
        mask = ~(1 << place.bit) if register == place.register else -1
        assert getattr(after, register) & mask == getattr(entry, register) & mask


def test_setting_a_feature_makes_its_leaf_visible() -> None:
    cpuid = CpuidTable([CpuidEntry(0, eax=1), CpuidEntry(0x8000_0000, eax=0x8000_0001)])
    cpuid.set("smep")
    cpuid.set("avx_vnni")
    cpuid.set("clzero")
    assert cpuid.find(0) == CpuidEntry(0, eax=7)
    assert cpuid.find(7, 0) == CpuidEntry(7, 0, eax=1, ebx=1 << 7, flags=SIGNIFICANT_INDEX)
    assert cpuid.find(7, 1) == CpuidEntry(7, 1, eax=1 << 4, flags=SIGNIFICANT_INDEX)
    assert cpuid.find(0x8000_0000) == CpuidEntry(0x8000_0000, eax=0x8000_0008)


def test_clearing_a_missing_leaf_adds_nothing() -> None:
    cpuid = CpuidTable()
    cpuid.clear("smep")
    assert len(cpuid) == 0


def test_unknown_features_are_refused_with_likely_names() -> None:
    cpuid = table()
    with pytest.raises(UsageError, match="x2apic"):
        cpuid.has("x2apc")
    with pytest.raises(UsageError):
        cpuid.clear("x2apic", "nonsense")
    assert cpuid.has("x2apic")
    for place in ((1, 0, "efx", 0), (1, 0, "eax", 32)):
        with pytest.raises(UsageError):
            cpuid.set(place)  # type: ignore[arg-type]


def test_vendor_reads_ebx_edx_ecx() -> None:
    assert table().vendor == "GenuineIntel"
    assert CpuidTable().vendor == ""


def test_setting_the_vendor_updates_amds_copy_only_where_there_is_one() -> None:
    cpuid = table()
    cpuid.vendor = "AuthenticAMD"
    assert cpuid.vendor == "AuthenticAMD"
    extended = cpuid.find(0x8000_0000)
    assert extended is not None
    assert extended.ebx == 0
    cpuid.put(CpuidEntry(0x8000_0000, eax=0x8000_0001, ebx=1))
    cpuid.vendor = "KVMKVMKVM\0\0\0"
    first, extended = cpuid.find(0), cpuid.find(0x8000_0000)
    assert first is not None
    assert extended is not None
    assert (extended.ebx, extended.ecx, extended.edx) == (first.ebx, first.ecx, first.edx)
    assert cpuid.vendor == "KVMKVMKVM"
    with pytest.raises(UsageError):
        cpuid.vendor = "too short"


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=47))
def test_brand_strings_round_trip(brand: str) -> None:
    cpuid = table()
    cpuid.brand = brand
    assert cpuid.brand == brand
    highest = cpuid.find(0x8000_0000)
    assert highest is not None
    assert highest.eax == 0x8000_0004


def test_brand_is_in_eax_ebx_ecx_edx_order() -> None:
    cpuid = CpuidTable()
    cpuid.brand = "ABCDEFGHIJKLMNOPQ"
    entry = cpuid.find(0x8000_0002)
    assert entry is not None
    assert entry.eax.to_bytes(4, "little") == b"ABCD"
    assert entry.edx.to_bytes(4, "little") == b"MNOP"
    for name in ("x" * 48, "é"):
        with pytest.raises(UsageError):
            cpuid.brand = name


def test_tables_compare_by_content_in_any_order_and_copies_are_separate() -> None:
    cpuid = table()
    other = CpuidTable(reversed(list(cpuid)))
    assert cpuid == other
    copy = cpuid.copy()
    copy.clear("nx")
    assert cpuid.has("nx")
    assert copy != cpuid
    assert copy.differences(cpuid) == [(CpuidEntry(0x8000_0001), CpuidEntry(0x8000_0001, edx=1 << 20))]


def test_differences_name_leaves_that_one_side_lacks() -> None:
    here, there = table(), table()
    here.remove(0xD, 1)
    assert here.differences(there) == [(None, CpuidEntry(0xD, 1, eax=1, flags=SIGNIFICANT_INDEX))]


def test_put_replaces_remove_drops_and_filter_selects() -> None:
    cpuid = table()
    cpuid.put(CpuidEntry(0xD, 1, eax=9, flags=SIGNIFICANT_INDEX))
    assert len(cpuid) == 6
    cpuid.put(CpuidEntry(0xD, 2, flags=SIGNIFICANT_INDEX))
    assert len(cpuid) == 7
    basic = cpuid.filter(lambda entry: entry.function < 0x8000_0000)
    assert [entry.function for entry in basic] == [0, 1, 0xD, 0xD, 0xD]
    cpuid.remove(0xD)
    assert cpuid.find(0xD, 1) is None
    cpuid.remove(0x1234)


def test_values_over_32_bits_are_refused() -> None:
    with pytest.raises(RegisterValueError):
        CpuidEntry(1, eax=1 << 32)


def test_the_text_shows_registers_and_feature_names() -> None:
    text = str(table())
    assert "0000000d.1  eax=00000001 ebx=00000000 ecx=00000000 edx=00000000\n  xsaveopt" in text
    assert "00000001    eax=00000000 ebx=00000000 ecx=00200000 edx=00000001\n  x2apic fpu" in text
    assert table().features() == {"x2apic", "fpu", "xsaveopt", "nx"}
