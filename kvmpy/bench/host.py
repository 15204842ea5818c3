"""The machine that was measured on, in the words that a table needs."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

__all__ = ["describe_host"]

_VENDOR_MODULES = ("kvm_intel", "kvm_amd", "kvm_pvm")


def describe_host() -> dict[str, str]:
    """CPU, kernel, KVM module and Python, by name."""
    return {
        "CPU": f"{_cpu()}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "KVM": _kvm_module(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}",
        "load": f"{os.getloadavg()[0]:.2f}",
    }


def _cpu() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _kvm_module() -> str:
    loaded = [name for name in _VENDOR_MODULES if Path("/sys/module", name).exists()]
    return " ".join(loaded) or "no module that is known"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
