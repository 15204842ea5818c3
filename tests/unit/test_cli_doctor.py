"""`kvmpy doctor` without KVM: the guests' bytes, what is read from the host's files, and the advice."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gnu_toolchain import assemble
from kvmpy.cli import probe_programs as programs
from kvmpy.cli.diagnosis import SOFTWARE_NS, guest_advice, open_advice
from kvmpy.cli.host_probe import DeviceFile, Module, Processor, device_file, module, processor
from kvmpy.x86.cpuid_features import FEATURES

PROGRAMS = {
    "exit": programs.EXIT,
    "cpuid": programs.CPUID,
    "syscall": programs.SYSCALL,
    "interrupt": programs.INTERRUPT,
    "stubs": programs.STUBS,
    **{f"count {bits}": program for bits, program in programs.COUNT.items()},
    **programs.HYPERCALLS,
    **{f"instruction {program.name}": program for program in programs.INSTRUCTIONS},
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_bytes_of_a_guest_are_its_assembly(name: str) -> None:
    program = PROGRAMS[name]
    assert program.code == assemble(program.source, address=programs.ADDRESS, bits=program.bits)


@pytest.mark.parametrize("program", [programs.EXIT, programs.CPUID], ids=["exit", "cpuid"])
def test_a_guest_for_every_mode_has_the_same_bytes_in_each(program: programs.Program) -> None:
    assert {assemble(program.source, bits=bits) for bits in (16, 32, 64)} == {program.code}


def test_the_syscall_target_is_behind_the_padding() -> None:
    at = programs.SYSCALL_TARGET - programs.ADDRESS
    assert programs.SYSCALL.code[at - 1] == 0x90
    assert programs.SYSCALL.code[at:] == bytes.fromhex("b055e6e0f4")


def test_every_stub_has_the_size_that_gates_count_with() -> None:
    size, stubs = programs.STUB_SIZE, programs.STUBS.code
    assert [stubs[at + 1] for at in range(0, len(stubs), size)] == list(range(programs.VECTOR + 1))


def test_instructions_name_features_that_exist() -> None:
    assert {program.feature for program in programs.INSTRUCTIONS} - {None} <= FEATURES.keys()


# The host's files


def modules(root: Path, **parameters: str | None) -> Path:
    """A /sys/module with these modules, each with its parameter `nested` or none."""
    for name, nested in parameters.items():
        (root / name / "parameters").mkdir(parents=True)
        if nested is not None:
            (root / name / "parameters" / "nested").write_text(f"{nested}\n")
    return root


@pytest.mark.parametrize(
    ("parameters", "vendor", "nested"),
    [
        ({}, "", None),
        ({"kvm": None}, "", None),
        ({"kvm": None, "kvm_intel": "Y"}, "kvm_intel", True),
        ({"kvm": None, "kvm_intel": "N"}, "kvm_intel", False),
        ({"kvm": None, "kvm_amd": "1"}, "kvm_amd", True),
        ({"kvm": None, "kvm_amd": "0"}, "kvm_amd", False),
        ({"kvm": None, "kvm_pvm": None}, "kvm_pvm", None),
        ({"kvm": None, "kvm_new": None}, "kvm_new", None),
    ],
)
def test_the_vendor_module_is_told(
    tmp_path: Path, parameters: dict[str, str | None], vendor: str, nested: bool | None
) -> None:
    found = module(modules(tmp_path, **parameters))
    assert (found.kvm, found.vendor, found.nested) == ("kvm" in parameters, vendor, nested)


def test_the_first_processor_is_read(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: A: B\nflags\t\t: fpu vmx hypervisor\n\n"
        "processor\t: 1\nmodel name\t: other\n"
    )
    assert processor(tmp_path / "cpuinfo") == Processor("GenuineIntel", "A: B", "VT-x", True)


@pytest.mark.parametrize(("flags", "virtualization"), [("fpu svm", "AMD-V"), ("fpu", ""), ("vmxx", "")])
def test_virtualization_is_a_flag(tmp_path: Path, flags: str, virtualization: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    assert processor(tmp_path / "cpuinfo").virtualization == virtualization


def test_files_that_are_not_there_are_no_error(tmp_path: Path) -> None:
    assert processor(tmp_path / "cpuinfo") == Processor("", "", "", False)
    assert module(tmp_path / "module") == Module(False, "", "", None)
    assert device_file(str(tmp_path / "kvm")) == DeviceFile(str(tmp_path / "kvm"), exists=False)


def test_a_device_has_an_owner_and_a_mode(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch(mode=0o640)
    (tmp_path / "kvm").chmod(0o640)
    found = device_file(str(tmp_path / "kvm"))
    assert (found.exists, found.mode, found.may_open, found.in_group) == (True, "0640", True, True)
    assert found.owner == (tmp_path / "kvm").owner()


# Advice

HERE = Module(True, "kvm_intel", "VT-x", True)
PC = Processor("GenuineIntel", "A", "VT-x", False)


@pytest.mark.parametrize(
    ("device", "module", "processor", "says"),
    [
        (DeviceFile("/dev/kvm", True, "root", "kvm", "0660"), HERE, PC, "usermod -aG kvm"),
        (DeviceFile("/dev/kvm", True, "root", "root", "0600"), HERE, PC, 'KERNEL=="kvm"'),
        (DeviceFile("/dev/kvm", True, "root", "root", "0660"), HERE, PC, 'KERNEL=="kvm"'),  # who would join root?
        (DeviceFile("/dev/kvm", True, "root", "kvm", "0600"), HERE, PC, 'KERNEL=="kvm"'),
        (DeviceFile("/dev/kvm", True, "root", "kvm", "0660", True, True), HERE, PC, "docker run --device"),
        (DeviceFile("/dev/kvm", False), HERE, PC, "docker run --device"),
        (DeviceFile("/dev/kvm", False), Module(False, "", "", None), PC, "modprobe kvm_intel"),
        (DeviceFile("/dev/kvm", False), Module(False, "", "", None), Processor("", "", "AMD-V", False), "kvm_amd"),
        (DeviceFile("/dev/kvm", False), Module(False, "", "", None), Processor("", "", "", True), "nested"),
        (DeviceFile("/dev/kvm", False), Module(False, "", "", None), Processor("", "", "", False), "firmware"),
        (DeviceFile("/dev/kvm", False), Module(True, "", "", None), PC, "dmesg"),
    ],
)
def test_a_device_that_cannot_be_opened_has_a_remedy(
    device: DeviceFile, module: Module, processor: Processor, says: str
) -> None:
    found = open_advice(device, module, processor)
    assert says in found.advice
    assert found.problem


def healthy() -> dict[str, Any]:
    """The findings of a host that has everything."""
    return {
        "costs": {"real": {"exit_us": 1.0, "instruction_ns": 0.3}, "long ring 3": None},
        "capabilities": {"USER_MEMORY": 1, "IMMEDIATE_EXIT": 1},
        "paging": {"32-bit": True, "PAE": True},
        "ring3": {"syscall": "switches to ring 0", "int n": "delivered"},
        "hypercalls": {"vmcall": "answered", "vmmcall": "#UD"},
        "cpuid": {"ring 0": {"added": [], "missing": ["arch_capabilities"]}},
        "instructions": {"popcnt": "runs"},
    }


def test_a_healthy_host_needs_no_advice() -> None:
    assert guest_advice(healthy()) == []


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("costs", "real", {"exit_us": 9.0, "instruction_ns": 2 * SOFTWARE_NS}, "in software (40 ns each) in: real"),
        ("capabilities", "IMMEDIATE_EXIT", 0, "IMMEDIATE_EXIT"),
        ("paging", "PAE", False, "PAE paging"),
        ("ring3", "syscall", "stays in ring 3", "SYSCALL in ring 3: stays"),
        ("ring3", "int n", "#UD", "INT n in ring 3: #UD"),
        ("hypercalls", "vmcall", "hangs", "hang: vmcall"),
        ("cpuid", "ring 0", {"added": ["avx", "xsave"], "missing": []}, "ring 0 sees 2"),
        ("instructions", "popcnt", "not emulated", "cannot run what this processor has: popcnt"),
        ("instructions", "lzcnt", "wrong result", "without any sign of it: lzcnt"),
    ],
)
def test_each_thing_that_is_wrong_has_its_advice(part: str, name: str, value: object, says: str) -> None:
    findings = healthy()
    findings[part][name] = value
    (found,) = guest_advice(findings)
    assert says in found.problem
    assert found.advice


# The command


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmpy", "doctor", *arguments], capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("device", ["/nowhere/kvm", "/dev/null", "/proc/version", "/"])
def test_without_kvm_it_advises_and_fails(device: str) -> None:
    done = doctor("--device", device)
    assert (done.returncode, done.stderr) == (1, "")
    assert "\nadvice\n  * " in done.stdout
    assert "guests cannot run here" in done.stdout


def test_json_without_kvm_says_that_it_is_not_usable() -> None:
    done = doctor("--json", "--device", "/nowhere/kvm")
    assert (done.returncode, done.stderr) == (1, "")
    findings = json.loads(done.stdout)
    assert findings["usable"] is False
    assert findings["device"]["exists"] is False
    assert findings["advice"][0]["advice"]
    assert {"kernel", "module", "processor", "seconds"} <= findings.keys()
