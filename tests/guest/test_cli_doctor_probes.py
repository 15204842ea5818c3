"""`kvmpy doctor` on the real device, and its guests one by one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kvmpy.cli import guest_probe, host_probe, probe_programs
from kvmpy.kvm import Kvm
from kvmpy.x86.cpuid import CpuidTable
from kvmpy.x86.cpuid_features import FEATURES


@pytest.fixture(scope="module")
def findings() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "kvmpy", "doctor", "--json"], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    with Kvm() as kvm:
        yield kvm


@pytest.fixture
def cpuid(kvm: Kvm) -> CpuidTable:
    return kvm.supported_cpuid()


def test_the_text_covers_everything() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvmpy", "doctor"], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("host", "KVM API", "cost of a port write", "what a guest can do", "capabilities", "advi"):
        assert part in done.stdout
    assert "guests can run here" in done.stdout
    assert all(capability.name in done.stdout for capability in host_probe.CAPABILITIES)
    assert [line for line in done.stdout.splitlines() if len(line) > 120] == []


def test_the_report_has_every_key(findings: dict[str, Any]) -> None:
    assert findings.keys() == {
        "usable", "kernel", "device", "module", "processor", "api_version", "limits", "capabilities", "costs", "paging",
        "ring3", "hypercalls", "left_out", "template", "cpuid", "instructions", "advice", "seconds",
    }  # fmt: skip
    assert findings["usable"] is True
    assert findings["api_version"] == 12
    assert findings["device"]["may_open"] is True
    assert findings["costs"].keys() == guest_probe.MODES.keys()
    assert findings["capabilities"].keys() == {capability.name for capability in host_probe.CAPABILITIES}
    assert findings["capabilities"]["USER_MEMORY"] > 0
    assert findings["paging"].keys() == {"32-bit", "PAE", "4-level", "1 GiB pages", "5-level"}
    assert findings["paging"]["4-level"] is True
    assert findings["hypercalls"].keys() == probe_programs.HYPERCALLS.keys()
    assert findings["cpuid"].keys() == {"ring 0", "ring 3"}
    assert findings["limits"]["vcpus"] >= findings["limits"]["recommended_vcpus"] >= 1
    assert findings["limits"]["memory_slots"] > 1


def test_costs_are_positive_times(findings: dict[str, Any]) -> None:
    for cost in findings["costs"].values():
        assert cost["exit_us"] > 0
        assert cost["instruction_ns"] > 0


def test_advice_goes_with_the_findings(findings: dict[str, Any]) -> None:
    problems = " ".join(item["problem"] for item in findings["advice"])
    assert ("hypercalls hang" in problems) == ("hangs" in findings["hypercalls"].values())
    assert ("in software" in problems) == any(cost["instruction_ns"] > 20 for cost in findings["costs"].values())
    assert ("SYSCALL" in problems) == (findings["ring3"]["syscall"] != "switches to ring 0")
    answers = set(findings["instructions"].values())
    assert ("ring 0 computes wrong results" in problems) == ("wrong result" in answers)
    assert ("ring 0 cannot run" in problems) == bool(answers - {"runs", "wrong result"})


def test_the_smallest_guest_runs(kvm: Kvm) -> None:
    assert guest_probe.runs_a_guest(kvm)


def test_two_answers_about_ring_0_agree(kvm: Kvm, cpuid: CpuidTable) -> None:
    # fxsave is in every table of features and in KVM's emulator too: the probe must see at least one that runs.
    answers = guest_probe.instructions(kvm, cpuid, FEATURES)
    assert answers.keys() == {program.name for program in probe_programs.INSTRUCTIONS}
    assert answers["fxsave"] == "runs"
    known = {"runs", "wrong result", "not emulated", "refused", "hangs", "triple fault"}
    assert {answer for answer in answers.values() if not answer.startswith(("#", "interrupt"))} <= known


def test_instructions_without_their_feature_are_not_tried(kvm: Kvm, cpuid: CpuidTable) -> None:
    assert guest_probe.instructions(kvm, cpuid, ()).keys() == {"int3", "int n", "lar"}


def test_a_feature_that_is_taken_away_is_missed_nowhere(kvm: Kvm, cpuid: CpuidTable) -> None:
    table = cpuid.copy()
    table.clear("cmov")
    difference, present = guest_probe.cpuid_difference(kvm, "long ring 0", table)
    assert "cmov" not in difference.missing
    assert ("cmov" in difference.added) == ("cmov" in present)


def test_a_feature_that_a_guest_does_not_see_is_named(kvm: Kvm, cpuid: CpuidTable) -> None:
    full, present = guest_probe.cpuid_difference(kvm, "long ring 0", cpuid)
    assert set(full.added) <= present
    assert not set(full.missing) & present
    assert {"fpu", "lm", "syscall"} <= present


def test_features_whose_hypercalls_do_not_come_back_are_named(kvm: Kvm, cpuid: CpuidTable) -> None:
    hang = guest_probe.hypercall_features(cpuid, {"vmcall": "hangs", "vmmcall": "hangs"})
    assert set(hang) == {"kvm_pv_unhalt", "kvm_pv_send_ipi", "kvm_pv_sched_yield"} & cpuid.features()
    assert guest_probe.hypercall_features(cpuid, {"vmcall": "answered", "vmmcall": "answered"}) == []


def test_a_template_is_what_guests_are_examined_with() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvmpy", "doctor", "--json", "--cpu", "plain"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["template"] == "plain"
    # Leaves 7 and 0x80000001 are empty and honoured everywhere; leaf 1 some hosts fill up.
    assert not {"smap", "bmi1", "abm", "erms"} & set(report["cpuid"]["ring 0"]["added"])


def test_nothing_is_left_open(kvm: Kvm, cpuid: CpuidTable) -> None:
    guest_probe.paging(kvm, cpuid)  # from the second VM on, the Kvm keeps an idle one
    before = len(os.listdir("/proc/self/fd"))
    guest_probe.paging(kvm, cpuid)
    guest_probe.syscall_in_ring_3(kvm, cpuid)
    guest_probe.interrupt_in_ring_3(kvm, cpuid)
    guest_probe.hypercalls(kvm, cpuid)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_user_without_permission_is_told_whose_the_device_is() -> None:
    if os.geteuid() != 0 or os.stat("/dev/kvm").st_mode & 0o006:
        pytest.skip("only root can become a user who may not open /dev/kvm")
    # What is needed is imported before: the other user may not be able to read this folder.
    program = (
        "import os, sys, json, kvmpy.cli.doctor as doctor, kvmpy.kvm.advice\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "json.dump(doctor.examine(), sys.stdout)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    assert findings["usable"] is False
    assert findings["device"]["may_open"] is False
    (item,) = findings["advice"]
    assert f"{findings['device']['owner']}:{findings['device']['group']}" in item["problem"]
    assert "udev" in item["advice"] or "usermod" in item["advice"]
