"""From what was found out about a host to what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvmpy.cli.host_probe import DeviceFile, Module, Processor

__all__ = ["SOFTWARE_NS", "Advice", "guest_advice", "open_advice"]

SOFTWARE_NS = 20.0
"""An instruction that takes longer is emulated: a processor takes less than one nanosecond, an emulator hundreds."""


@dataclass(frozen=True, slots=True)
class Advice:
    """`problem`, and what to do about it."""

    problem: str
    advice: str


def open_advice(device: DeviceFile, module: Module, processor: Processor) -> Advice:
    """Why the device cannot be opened, when it cannot, and how to change that."""
    if device.exists:
        return _permission(device)
    if not module.kvm:
        if processor.virtualization:
            load = "kvm_intel" if processor.virtualization == "VT-x" else "kvm_amd"
            return Advice("the kernel's kvm module is not loaded", f"sudo modprobe {load}")
        if processor.hypervisor:
            return Advice(
                "this machine is a virtual machine that offers no virtualization to its own guests",
                "enable nested virtualization on its host (kvm_intel or kvm_amd: nested=1; CPU model "
                "host-passthrough), or choose a kind of machine that has it",
            )
        return Advice(
            "the processor shows neither VT-x (vmx) nor AMD-V (svm)",
            "switch it on in the firmware set-up (Virtualization Technology, SVM mode)",
        )
    if not module.vendor:
        return Advice(
            "the kvm module is loaded, but neither kvm_intel nor kvm_amd",
            "sudo modprobe kvm_intel (or kvm_amd) and look at `dmesg` for the reason when it fails: most often "
            "VT-x or AMD-V is switched off in the firmware",
        )
    return Advice(
        f"the kernel has KVM ({module.vendor}), but there is no {device.path}",
        f"in a container: pass it in (docker run --device {device.path}); "
        "elsewhere: sudo mknod /dev/kvm c 10 232, or restart udev",
    )


def _permission(device: DeviceFile) -> Advice:
    problem = (
        f"this user may not open {device.path}, which belongs to {device.owner}:{device.group} with mode {device.mode}"
    )
    group_may = int(device.mode, 8) & 0o060 == 0o060
    if device.may_open:
        return Advice(
            f"{device.path} cannot be opened although its permissions allow it",
            "in a container: its device rules forbid it (docker run --device /dev/kvm); "
            "elsewhere: another hypervisor is in use",
        )
    if group_may and not device.in_group and device.group != "root":
        return Advice(problem, f"sudo usermod -aG {device.group} $USER, then log in again")
    return Advice(
        problem,
        'a udev rule, as for CI machines: KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm" in '
        "/etc/udev/rules.d/99-kvm.rules, then sudo udevadm control --reload-rules && "
        "sudo udevadm trigger --name-match=kvm --settle",
    )


def guest_advice(findings: dict[str, Any]) -> list[Advice]:
    """What the probes of `findings` (the report of `kvmpy doctor --json`) mean for who writes guests."""
    advice = []
    costs = {mode: cost["instruction_ns"] for mode, cost in findings["costs"].items() if cost is not None}
    slow = [mode for mode, cost in costs.items() if cost > SOFTWARE_NS]
    if slow:
        worst = max(costs[mode] for mode in slow)
        advice.append(
            Advice(
                f"instructions are emulated in software ({worst:.0f} ns each) in: {', '.join(slow)}",
                "this host has no VT-x or AMD-V for you. Keep hot code in the other modes, if there are any; kernels "
                "boot slowly; tests need longer timeouts",
            )
        )
    if missing := [name for name in ("USER_MEMORY", "IMMEDIATE_EXIT") if not findings["capabilities"][name]]:
        advice.append(Advice(f"KVM lacks {', '.join(missing)}", "use a kernel from 4.12 on"))
    unusable = [mode for mode in ("32-bit", "PAE") if not findings["paging"][mode]]
    if unusable:
        advice.append(
            Advice(
                f"guests cannot use {' and '.join(unusable)} paging here",
                "protected mode without paging and long mode work; 32-bit kernels do not run on this host",
            )
        )
    ring3 = findings["ring3"]
    if ring3["syscall"] != "switches to ring 0":
        advice.append(
            Advice(
                f"SYSCALL in ring 3: {ring3['syscall']}",
                "a Machine repairs it; on a bare Vcpu enter ring 0 by a port write or by INT3 through a gate",
            )
        )
    if ring3["int n"] != "delivered":
        advice.append(
            Advice(
                f"INT n in ring 3: {ring3['int n']}",
                "a Machine repairs it; on a bare Vcpu INT3 and exceptions such as #PF and #UD lead to ring 0",
            )
        )
    hanging = [name for name, answer in findings["hypercalls"].items() if answer == "hangs"]
    if hanging:
        advice.append(
            Advice(
                f"hypercalls hang: {', '.join(hanging)}",
                "a Machine clears the KVM features in CPUID leaf 0x40000001 that lead a guest to make them; on a bare "
                "Vcpu do the same. Use ports instead",
            )
        )
    seeing = [f"{ring} sees {len(found['added'])}" for ring, found in findings["cpuid"].items() if found["added"]]
    if seeing:
        advice.append(
            Advice(
                f"CPUID cannot hide features on this host: {', '.join(seeing)} that were not asked for",
                "tell the guest otherwise (Linux: clearcpuid=), or hide leaves 7 and 0xD as a whole by --cpu plain. "
                "But a kernel without XSAVE does not keep the AVX registers of programs, which use them all the same",
            )
        )
    wrong = [name for name, answer in findings["instructions"].items() if answer == "wrong result"]
    if wrong:
        advice.append(
            Advice(
                f"ring 0 computes wrong results, without any sign of it: {', '.join(wrong)}",
                "compile kernels without -mlzcnt, -mbmi and -march=x86-64-v3 or later; from those that ask CPUID, "
                "--cpu plain hides them",
            )
        )
    refused = [name for name, answer in findings["instructions"].items() if answer not in ("runs", "wrong result")]
    if refused:
        advice.append(
            Advice(
                f"ring 0 cannot run what this processor has: {', '.join(refused)}",
                "a Machine does most in software, some 40 us each; or compile with gcc's -mgeneral-regs-only",
            )
        )
    return advice
