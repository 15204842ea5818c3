"""CPU templates: what they make of a host's CPUID, what is refused, and their way to files and back."""

from __future__ import annotations

import json
import pickle
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import UsageError
from kvmpy.x86.cpu_templates import HOST, PLAIN, PORTABLE, TEMPLATES, CpuTemplate, cpu_template, load, save, to_dict
from kvmpy.x86.cpu_templates.dependencies import dependents, needs
from kvmpy.x86.cpuid import SIGNIFICANT_INDEX, CpuidEntry, CpuidTable
from kvmpy.x86.cpuid_features import FEATURES

ALL = 0xFFFF_FFFF
V2 = {"cx16", "lahf_lm", "popcnt", "sse3", "ssse3", "sse4_1", "sse4_2"}
V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}


def host(vendor: str = "GenuineIntel") -> CpuidTable:
    """A host that has every feature bit there is."""
    table = CpuidTable([CpuidEntry(0, eax=0x20), CpuidEntry(0x8000_0000, eax=0x8000_0022)])
    table.put(CpuidEntry(1, eax=0x50657, ebx=0x0105_0800, ecx=ALL, edx=ALL))
    table.put(CpuidEntry(0xA, eax=0x0730_0805))
    for index in range(2):
        table.put(CpuidEntry(0x7, index, eax=ALL if index else 1, ebx=ALL, ecx=ALL, edx=ALL, flags=SIGNIFICANT_INDEX))
    table.put(CpuidEntry(0xD, 0, eax=0x6_02FF, ebx=0x2B00, ecx=0x2B00, flags=SIGNIFICANT_INDEX))
    table.put(CpuidEntry(0xD, 1, eax=0x1F, ebx=0x2B00, ecx=0x1800, flags=SIGNIFICANT_INDEX))
    for component, size, offset in ((2, 0x100, 0x240), (5, 0x40, 0x440), (6, 0x200, 0x480), (7, 0x400, 0x680)):
        table.put(CpuidEntry(0xD, component, eax=size, ebx=offset, flags=SIGNIFICANT_INDEX))
    table.put(CpuidEntry(0xD, 9, eax=8, ebx=0xA80, flags=SIGNIFICANT_INDEX))
    table.put(CpuidEntry(0x14, 0, eax=1, ebx=1, flags=SIGNIFICANT_INDEX))
    table.put(CpuidEntry(0x4000_0000, eax=0x4000_0001, ebx=0x4B4D_564B, ecx=0x564B_4D56, edx=0x4D))
    table.put(CpuidEntry(0x4000_0001, eax=0x0100_7EFB))
    table.put(CpuidEntry(0x8000_0001, ecx=ALL, edx=ALL))
    table.put(CpuidEntry(0x8000_0008, eax=0x302E, ebx=ALL))
    table.put(CpuidEntry(0x8000_000A, eax=1, ebx=8, edx=ALL))
    table.vendor = vendor
    return table


def test_host_changes_nothing_but_the_topology() -> None:
    before, after = host(), HOST.table(host())
    topology = {0x1, 0xB, 0x1F, 0x8000_0008}
    assert [e for e in after if e.function not in topology] == [e for e in before if e.function not in topology]
    assert before.features() - after.features() == {"ht"}


def test_portable_has_x86_64_v2_and_nothing_beyond() -> None:
    table = PORTABLE.table(host())
    assert table.features() >= V2
    assert not V3 & table.features()
    assert not {"smap", "avx512f", "rdtscp", "svm", "vmx", "la57", "pdpe1gb"} & table.features()
    assert table.features() >= {"nx", "syscall", "lm", "apic", "x2apic", "pat", "mtrr", "hypervisor", "kvmclock"}
    assert table.features() >= {"spec_ctrl", "arch_capabilities", "md_clear"}  # the host's protections stay


def test_portable_is_what_a_compiler_takes_for_x86_64_v2() -> None:
    """gcc as an independent list: the instructions that it uses for the level are those of the template."""
    compiler = shutil.which("gcc")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs gcc for x86-64")

    def macros(level: str) -> set[str]:
        command = [compiler, f"-march={level}", "-dM", "-E", "-x", "c", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        if done.returncode:
            pytest.skip(f"this gcc has no -march={level}")
        return {line.split()[1].strip("_") for line in done.stdout.splitlines()}

    names = {
        "SSE3": "sse3", "SSSE3": "ssse3", "SSE4_1": "sse4_1", "SSE4_2": "sse4_2", "POPCNT": "popcnt",
        "LAHF_SAHF": "lahf_lm", "GCC_HAVE_SYNC_COMPARE_AND_SWAP_16": "cx16", "AVX": "avx", "AVX2": "avx2",
        "BMI": "bmi1", "BMI2": "bmi2", "F16C": "f16c", "FMA": "fma", "LZCNT": "abm", "MOVBE": "movbe", "XSAVE": "xsave",
        "MMX": "mmx", "SSE": "sse", "SSE2": "sse2", "FXSR": "fxsr", "AVX512F": "avx512f",
    }  # fmt: skip
    for template, level in ((PLAIN, "x86-64"), (PORTABLE, "x86-64-v2")):
        assert template.only is not None
        wanted = {names[macro] for macro in macros(level) & names.keys()}
        announced = template.only & set(names.values())
        # The psABI has LAHF and SAHF in v2 only, but a kernel may use them on every processor that has long mode.
        assert announced - {"lahf_lm"} == wanted - {"lahf_lm"}


def test_plain_has_nothing_that_kvms_emulator_lacks() -> None:
    table = PLAIN.table(host())
    lacking = {
        "xsave", "avx", "popcnt", "smap", "cx16", "abm", "bmi1", "bmi2", "movbe", "rdtscp", "rdpid", "fsgsbase",
        "invpcid", "erms", "fsrm", "md_clear", "sse4_2", "aes", "monitor",
    }  # fmt: skip
    assert not lacking & table.features()
    assert table.features() >= {"sse2", "fxsr", "cx8", "cmov", "lm", "kvmclock"}
    assert table.find(0xA) is None
    assert table.find(0x14, 0) is None
    assert table.find(0x8000_000A) is None


def test_without_xsave_its_leaf_is_one_empty_answer_above_the_highest() -> None:
    for template in (PLAIN, PORTABLE):
        table = template.table(host())
        assert [entry for entry in table if entry.function == 0xD] == [CpuidEntry(0xD)]
        first = table.find(0)
        assert first is not None
        assert first.eax == 0xC


def test_an_empty_leaf_7_is_left_out() -> None:
    # On AMD's processors no protection against speculation is announced there.
    assert PLAIN.table(host("AuthenticAMD")).find(7, 0) is not None  # spec_ctrl, which this host has for all that
    table = host("AuthenticAMD")
    for name, place in FEATURES.items():
        if place.function == 7 and name in (PLAIN.only or ()) and name != "arch_capabilities":
            table.clear(name)
    assert PLAIN.table(table).find(7, 0) is None


@pytest.mark.parametrize(
    ("off", "components", "size"),
    [
        (("avx512dq",), 0x6_02FF, 0xA88),
        (("pku",), 0x6_00FF, 0xA80),
        (("avx512f",), 0x6_021F, 0xA88),
        (("avx512f", "pku"), 0x6_001F, 0x340),
        (("avx", "pku", "mpx"), 0x6_0003, 0x240),
        (("amx_tile",), 0x02FF, 0xA88),
    ],
)
def test_state_components_go_with_their_features(off: tuple[str, ...], components: int, size: int) -> None:
    table = cpu_template({"features": dict.fromkeys(off, False)}).table(host())
    main = table.find(0xD, 0)
    assert main is not None
    assert main.eax == components
    assert main.ecx == size  # of an area with all of them; AMX has no subleaves in this host


def test_what_needs_a_feature_goes_with_it() -> None:
    table = cpu_template({"features": {"avx": False}}).table(host())
    gone = HOST.table(host()).features() - table.features()
    assert gone >= {"avx", "avx2", "fma", "f16c", "avx512f", "avx512vl", "vaes", "avx_vnni"}
    assert not gone & {"sse4_2", "aes", "xsave", "bmi1", "smap"}


@given(st.sampled_from(sorted(FEATURES)))
def test_dependencies_have_no_circle(name: str) -> None:
    assert name not in dependents(name)
    assert all(name in dependents(other) for other in needs(name))
    assert all(name in needs(other) for other in dependents(name))


@given(st.dictionaries(st.sampled_from(sorted(FEATURES)), st.booleans(), max_size=6))
def test_features_are_as_the_dict_says(features: dict[str, bool]) -> None:
    try:
        template = cpu_template({"base": "portable", "features": features})
    except UsageError:
        on = {name for name, wanted in features.items() if wanted}
        assert PORTABLE.only is not None
        assert any(not features.get(needed, needed in PORTABLE.only) for name in on for needed in needs(name))
        return
    table = template.table(host())
    by_machine = {"ht", "cmp_legacy"}
    found = table.features()
    assert {name: name in found for name in features if name not in by_machine} == {
        name: wanted for name, wanted in features.items() if name not in by_machine
    }
    assert cpu_template(json.loads(json.dumps(to_dict(template)))) == template


def test_a_feature_that_is_on_is_announced_though_the_host_lacks_it() -> None:
    table = host()
    table.clear("rdrand")
    table.remove(7)
    wanted = cpu_template({"features": {"RDRAND": True, "avx_vnni": True}}).table(table)
    assert wanted.has("rdrand")
    assert wanted.has("avx_vnni")
    assert not wanted.has("smap")


def test_vendor_and_brand_are_changed_where_processors_have_them() -> None:
    table = cpu_template({"vendor": "AuthenticAMD", "brand": "My processor"}).table(host())
    assert (table.vendor, table.brand) == ("AuthenticAMD", "My processor")
    extended = table.find(0x8000_0000)
    assert extended is not None
    assert (extended.ebx, extended.edx, extended.ecx) == (0x6874_7541, 0x6974_6E65, 0x444D_4163)
    table = cpu_template({"vendor": "GenuineIntel"}).table(host("AuthenticAMD"))
    extended = table.find(0x8000_0000)
    assert table.vendor == "GenuineIntel"
    assert extended is not None
    assert (extended.ebx, extended.ecx, extended.edx) == (0, 0, 0)


def test_amds_copy_of_leaf_1_follows_it() -> None:
    table = cpu_template({"features": {"mmx": False}}).table(host("AuthenticAMD"))
    extended = table.find(0x8000_0001)
    assert extended is not None
    assert not extended.edx >> 23 & 1
    assert extended.edx & 1


def test_leaves_replace_those_of_the_base() -> None:
    leaves = [{"function": "0x80000005", "eax": "0xff48ff40"}, {"function": 7, "index": 1, "eax": 16}]
    table = cpu_template({"leaves": leaves}).table(host())
    assert table.find(0x8000_0005) == CpuidEntry(0x8000_0005, eax=0xFF48_FF40)
    assert table.find(7, 1) == CpuidEntry(7, 1, eax=16, flags=SIGNIFICANT_INDEX)
    assert table.find(7, 0) == host().find(7, 0)


def test_a_table_becomes_a_template_that_needs_no_host() -> None:
    table = PORTABLE.table(host())
    template = CpuTemplate.of_table("kept", table, {0x1A0: 1})
    assert template.table(CpuidTable()) == table
    assert template.table(host("AuthenticAMD")) == table
    assert cpu_template(to_dict(template)) == template


# Values


def test_templates_compare_hash_pickle_and_do_not_change() -> None:
    one = cpu_template({"base": "plain", "features": {"rdrand": True}, "msrs": {"MISC_ENABLE": 1}})
    two = cpu_template({"msrs": {"0x1a0": "0x1"}, "features": {"RDRAND": True}, "base": "plain", "name": "custom"})
    assert one == two
    assert hash(one) == hash(two)
    assert pickle.loads(pickle.dumps(one)) == one
    assert one != PLAIN
    assert cpu_template(one) is one
    with pytest.raises(AttributeError):
        one.name = "other"  # type: ignore[misc]


def test_a_template_prints_its_parts() -> None:
    text = str(
        cpu_template(
            {
                "name": "mine",
                "features": {"rdrand": True, "smap": False},
                "brand": "My processor",
                "leaves": [{"function": 5}],
                "msrs": {"MISC_ENABLE": 1},
            }
        )
    )
    assert text.splitlines() == [
        "CPU template mine",
        "  from   all that the host supports",
        "  on     rdrand",
        "  off    smap",
        "  brand  My processor",
        "  leaf   00000005    eax=00000000 ebx=00000000 ecx=00000000 edx=00000000",
        "  MSR    MISC_ENABLE = 0x1",
    ]
    assert "sse4_2" in str(PORTABLE)


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_come_back_from_their_data(name: str) -> None:
    assert cpu_template(to_dict(TEMPLATES[name])) == TEMPLATES[name] == cpu_template(name)
    assert TEMPLATES[name].name == name


def test_a_file_holds_a_template(tmp_path: Path) -> None:
    template = cpu_template({"base": "portable", "vendor": "GenuineIntel", "msrs": {0x8B: 1 << 32}})
    save(template, tmp_path / "cpu.json")
    assert load(tmp_path / "cpu.json") == template
    assert json.loads((tmp_path / "cpu.json").read_text())["msrs"] == {"0x8b": "0x100000000"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe{}", b'{"base": 1}', b"[" * 100_000])
def test_a_file_that_is_no_template_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cpu.json").write_bytes(content)
    with pytest.raises(UsageError, match="CPU template"):
        load(tmp_path / "cpu.json")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hosst", "no CPU template is named 'hosst'; there are host, portable, plain"),
        (3, "a CPU template is a name, a dict or a CpuTemplate, not 3"),
        ({"feature": {}}, "has no 'feature'"),
        ({"features": {"avx9": True}}, "no CPUID feature is named 'avx9'"),
        ({"features": {"avx": 1}}, "true or false"),
        ({"features": ["avx"]}, "the features of a CPU template cannot be"),
        ({"only": "fpu"}, "the only of a CPU template cannot be"),
        ({"only": [1]}, "has a name, not 1"),
        ({"features": {"avx": False, "avx2": True}}, "cannot have avx2 on and avx off"),
        ({"base": "plain", "features": {"avx": True}}, "cannot have avx on and sse3 off"),
        ({"features": {"avx": False, "AVX": True}}, "cannot have avx on and avx off"),
        ({"base": "guest"}, "no CPU template is named 'guest'"),
        ({"vendor": "AMD"}, "12 ASCII characters"),
        ({"brand": "x" * 48}, "at most 47"),
        ({"brand": 3}, "the brand of a CPU template cannot be 3"),
        ({"leaves": [{"eax": 1}]}, "has a function"),
        ({"leaves": [{"function": 1, "rax": 1}]}, "has no 'rax'"),
        ({"leaves": [{"function": 1, "eax": "one"}]}, "CPUID eax: 'one' is no number"),
        ({"leaves": [{"function": 1, "eax": 1 << 32}]}, "32 bits"),
        ({"leaves": [{"function": 1}, {"function": 1}]}, "one value for each leaf"),
        ({"msrs": {"MISC": 1}}, "MSR: 'MISC' is no number"),
        ({"msrs": {"0x1a0": 1, "MISC_ENABLE": 1}}, "one value for each MSR"),
        ({"msrs": {"0x1a0": -1}}, "64 bits"),
        ({"msrs": {"0x1a0": True}}, "is no number"),
    ],
)
def test_what_is_no_template_is_refused(source: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        cpu_template(source)
    assert says in str(caught.value)


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["avx", "0x1", "host"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["name", "base", "only", "features", "vendor", "brand", "leaves", "msrs"])
leaf_keys = st.sampled_from(["function", "index", "eax", "ebx", "ecx", "edx"])
likely = {
    "features": st.dictionaries(st.sampled_from(sorted(FEATURES)), st.booleans() | plain_values, max_size=3),
    "leaves": st.lists(st.dictionaries(leaf_keys, st.integers(-1, 1 << 33) | plain_values), max_size=3),
    "msrs": st.dictionaries(st.integers(-1, 1 << 33), st.integers(-1, 1 << 65), max_size=3),
}
dicts = (
    st.dictionaries(keys, plain_values)
    | st.fixed_dictionaries({}, optional=likely)
    | st.dictionaries(st.text(), plain_values)
)


@given(dicts)
def test_any_dict_is_a_template_or_refused(data: dict[str, Any]) -> None:
    try:
        template = cpu_template(data)
    except UsageError:
        return
    again = cpu_template(json.loads(json.dumps(to_dict(template))))
    assert again == template
    assert again.table(host()) == template.table(host())
    assert str(template)
