"""The ABI tables against the C compiler and the kernel headers that are installed here.

One C program prints every number, size and offset that kvmpy has and the header knows. What the compiler refuses, the
header lacks: that is right only for names that `kvmpy.abi.newer` lists with their source.

KVMPY_KVM_HEADERS=<directory> compares with the linux/kvm.h and asm/kvm.h of another kernel instead.
"""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from abi_expected import Expected, expected, walk
from kvmpy.abi import run_layout, structs, withdrawn
from kvmpy.abi.newer import NEWER_THAN_HEADERS
from kvmpy.abi.withdrawn import WITHDRAWN_IOCTLS

PINNED = (6, 1)  # for this release, names of the header that kvmpy lacks are a failure

# What <linux/kvm.h> names and kvmpy leaves out on purpose. Exact names, or patterns that end in "*".
LEFT_OUT = (
    # s390
    "KVM_S390_*",
    "kvm_s390_*",
    "KVM_VM_S390_UCONTROL",
    "KVM_PV_*",
    "kvm_pv_cmd",
    "pv_cmd_*",
    "KVM_REG_S390",
    # PowerPC
    "KVM_PPC_*",
    "kvm_ppc_*",
    "KVM_VM_PPC_*",
    "KVM_REG_PPC",
    "KVM_CREATE_SPAPR_TCE",
    "KVM_CREATE_SPAPR_TCE_64",
    "KVM_ALLOCATE_RMA",
    "KVM_DIRTY_TLB",
    "kvm_dirty_tlb",
    "kvm_config_tlb",
    "KVM_MMU_FSL_BOOKE_*",
    # arm and arm64
    "KVM_ARM_*",
    "kvm_arm_*",
    "KVM_VM_TYPE_ARM_*",
    "KVM_REG_ARM",
    "KVM_REG_ARM64",
    # MIPS, RISC-V, LoongArch, Itanium
    "KVM_VM_MIPS_*",
    "KVM_REG_MIPS",
    "KVM_REG_RISCV",
    "KVM_REG_LOONGARCH",
    "KVM_REG_IA64",
    # not an interface: include guards, feature switches of the header itself, names for the encoding of ioctls
    "__LINUX_KVM_H",
    "_ASM_X86_KVM_H",
    "__KVM_HAVE_*",
    "__KVM_DEPRECATED_*",
    "KVMIO",  # in kvmpy.abi.ioctls
    # one more than the last: moves with every release
    "KVM_SEV_NR_MAX",
    "KVM_TDX_CMD_NR_MAX",
    "KVM_DEV_TYPE_MAX",
    "kvm_ioeventfd_flag_nr_*",  # bit numbers behind KVM_IOEVENTFD_FLAG_*
    # names of enums, and macros that need an argument or the kernel's PAGE_SIZE
    "kvm_device_type",
    "sev_cmd_id",
    "kvm_tdx_cmd_id",
    "KVM_COALESCED_MMIO_MAX",
    "KVM_PMU_ENCODE_MASKED_ENTRY",
    "KVM_REG_SIZE",
    "KVM_X86_KVM_REG_SIZE",
    "KVM_X86_REG_TYPE_SIZE",
    "KVM_X86_REG_ID",
    "KVM_X86_REG_MSR",
    "KVM_X86_REG_KVM",
)


def unavailable(reason: str) -> None:
    if os.environ.get("KVMPY_REQUIRE_KVM") == "1":
        pytest.fail(f"{reason}, and KVMPY_REQUIRE_KVM=1 demands the comparison")
    pytest.skip(reason)


def gcc(*arguments: str, source: str = "") -> subprocess.CompletedProcess[str]:
    include = os.environ.get("KVMPY_KVM_HEADERS")  # another tree of headers, linux/kvm.h and asm/kvm.h
    return subprocess.run(
        ["gcc", *(["-isystem", include] if include else []), *arguments],
        input=source,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
        timeout=120,
        check=False,
    )


def program(items: Mapping[str, tuple[str, str]]) -> str:
    """One function per name, under a #line of its own, so that errors tell which names are unknown."""
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <string.h>"]
    lines += ["#include <linux/const.h>", "#include <linux/kvm.h>"]
    # Linux 6.4 to 6.8 use these macros of the kernel in a header for user space.
    lines += ["#ifndef BIT", "#define BIT(n) (1UL << (n))", "#define BIT_ULL(n) (1ULL << (n))"]
    lines += ["#define GENMASK_ULL(h, l) ((~0ULL << (l)) & (~0ULL >> (63 - (h))))", "#endif"]
    for index, (statement, _) in enumerate(items.values()):
        lines += [f'#line 1 "item{index}"', f'static void item{index}(void) {{ {statement}; printf("\\n"); }}']
    lines += ['#line 1 "main"', "int main(void) {"]
    lines += [f'printf("%s\\t", "{name}"); item{index}();' for index, name in enumerate(items)]
    return "\n".join([*lines, "return 0; }", ""])


def measure(items: Expected, directory: Path) -> tuple[dict[str, str], set[str]]:
    """What the compiler says of each name, and the names it does not know."""
    names = list(items)
    refused = gcc("-fsyntax-only", "-fmax-errors=0", "-w", "-x", "c", "-", source=program(items)).stderr
    unknown = {names[int(index)] for index in re.findall(r"^item(\d+):\d+:\d+: error:", refused, re.M)}
    known = {name: item for name, item in items.items() if name not in unknown}
    binary = directory / "abi"
    built = gcc("-w", "-x", "c", "-", "-o", str(binary), source=program(known))
    assert built.returncode == 0, built.stderr[-2000:]
    output = subprocess.run([binary], capture_output=True, text=True, check=True, timeout=60).stdout
    return dict(line.split("\t") for line in output.splitlines()), unknown


def differences(items: Expected, measured: Mapping[str, str]) -> dict[str, str]:
    return {
        name: f"kvmpy {items[name][1]}, header {value}" for name, value in measured.items() if items[name][1] != value
    }


def explained(name: str, header: tuple[int, int]) -> bool:
    """Is this name, or a struct or field that it belongs to, listed as newer than this header?"""
    parts = name.replace("[0]", "").split(".")
    for length in range(1, len(parts) + 1):
        source = NEWER_THAN_HEADERS.get(".".join(parts[:length]))
        if source is not None:
            major, minor = source.split()[-1].split(".")
            return (int(major), int(minor)) > header
    return False


def was_withdrawn(name: str) -> bool:
    struct_name = name.split(".")[0]
    return name in WITHDRAWN_IOCTLS or name in vars(withdrawn) or struct_name in structs.MODULES["withdrawn"]


def left_out(name: str) -> bool:
    return any(name.startswith(rule[:-1]) if rule.endswith("*") else name == rule for rule in LEFT_OUT)


@pytest.fixture(scope="module")
def header_version() -> tuple[int, int]:
    if shutil.which("gcc") is None:
        unavailable("gcc is not installed")
    found = gcc("-E", "-x", "c", "-", source="#include <linux/kvm.h>\n#include <linux/version.h>\nLINUX_VERSION_CODE\n")
    if found.returncode:
        unavailable("<linux/kvm.h> or <linux/version.h> is not installed")
    code = int(found.stdout.split()[-1])
    return code >> 16, code >> 8 & 0xFF


@pytest.fixture(scope="module")
def comparison(
    header_version: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], set[str]]:
    return measure(expected(), tmp_path_factory.mktemp("abi"))


def test_every_number_size_and_offset_is_what_the_compiler_says(comparison: tuple[dict[str, str], set[str]]) -> None:
    measured, _ = comparison
    assert len(measured) > 1200  # the header was really read
    assert differences(expected(), measured) == {}


def test_a_name_that_the_header_lacks_has_its_source_written_down(
    comparison: tuple[dict[str, str], set[str]], header_version: tuple[int, int]
) -> None:
    _, unknown = comparison
    unexplained = {name for name in unknown if not explained(name, header_version)}
    if header_version > PINNED or os.environ.get("KVMPY_KVM_HEADERS"):
        unexplained = {name for name in unexplained if not was_withdrawn(name)}
    assert unexplained == set()


def test_the_comparison_notices_what_is_wrong(header_version: tuple[int, int], tmp_path: Path) -> None:
    items = expected()
    chosen = {
        name: items[name] for name in ("KVM_RUN", "kvm_regs", "kvm_run.mmio.len", "KVM_CAP_IRQFD", "KVM_EXIT_HLT")
    }
    assert differences(chosen, measure(chosen, tmp_path)[0]) == {}
    wrong = dict(chosen)
    wrong["KVM_RUN"] = (chosen["KVM_RUN"][0], "0xae81")
    wrong["kvm_regs"] = (chosen["kvm_regs"][0], "152")
    wrong["kvm_run.mmio.len"] = (chosen["kvm_run.mmio.len"][0], "52 4")
    wrong["KVM_NO_SUCH_NAME"] = ('printf("%#llx", (unsigned long long)(KVM_NO_SUCH_NAME))', "0x1")
    wrong["kvm_regs.no_such_field"] = ('printf("%zu", offsetof(struct kvm_regs, no_such_field))', "0")
    measured, unknown = measure(wrong, tmp_path)
    assert set(differences(wrong, measured)) == {"KVM_RUN", "kvm_regs", "kvm_run.mmio.len"}
    assert unknown == {"KVM_NO_SUCH_NAME", "kvm_regs.no_such_field"}
    assert not any(explained(name, header_version) for name in unknown)


def test_a_name_that_the_header_should_have_is_not_explained_by_being_newer() -> None:
    assert explained("kvm_run.memory_fault.gpa", (6, 1))
    assert not explained("kvm_run.memory_fault.gpa", (6, 8))


def header_names() -> set[str]:
    """All macros, enumerators, structs and enums that the two KVM headers define."""
    preprocessed = gcc("-E", "-dD", "-x", "c", "-", source="#include <linux/kvm.h>\n").stdout
    inside, body = False, []
    for line in preprocessed.splitlines():
        marker = re.match(r'# \d+ "([^"]*)"', line)
        if marker:
            inside = marker[1].endswith(("/linux/kvm.h", "/asm/kvm.h"))
        elif inside:
            body.append(line)
    text = "\n".join(body)
    found = set(re.findall(r"^\s*#define (\w+)", text, re.M))
    text = re.sub(r"^\s*#.*$", "", text, flags=re.M)
    found |= set(re.findall(r"\b(?:struct|enum)\s+(\w+)\s*\{", text))
    for enumerators in re.findall(r"\benum\s*\w*\s*\{([^}]*)\}", text):
        found |= {entry.split("=")[0].strip() for entry in enumerators.split(",")} - {""}
    return found


def test_kvmpy_has_every_name_of_the_header_but_other_architectures(header_version: tuple[int, int]) -> None:
    names = header_names()
    assert len(names) > 500
    ours = set(expected())
    lacking = {name for name in names - ours if not left_out(name)}
    if lacking and header_version != PINNED:
        pytest.skip(f"Linux {header_version[0]}.{header_version[1]} has names that kvmpy lacks: {sorted(lacking)}")
    assert lacking == set()


def test_what_is_left_out_is_not_there() -> None:
    assert {name for name in expected() if left_out(name)} == set()


def test_run_layout_agrees_with_struct_kvm_run() -> None:
    by_name = {
        path.removeprefix("kvm_run.").replace(".", "_").upper(): offset
        for path, offset, _ in walk(structs.struct("kvm_run"), "kvm_run", 0)
    }
    layout = {name: value for name, value in vars(run_layout).items() if name.isupper()}
    assert layout.pop("SIZE") == ctypes.sizeof(structs.struct("kvm_run"))
    assert layout.pop("EXIT_SIZE") == 256
    assert layout.pop("EXIT") == by_name["HW"]
    assert {name: by_name[name] for name in layout} == layout
