"""The package gives out its classes by name, and imports only what is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvmpy.devices


@pytest.mark.parametrize("name", kvmpy.devices.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(kvmpy.devices, name).__name__ == name
    assert name in dir(kvmpy.devices)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Uart8250"):
        kvmpy.devices.Uart8250  # noqa: B018


def test_one_device_does_not_import_the_others() -> None:
    program = "import sys; from kvmpy.devices import PostPort; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    ours = sorted(module for module in loaded if module.startswith("kvmpy.devices."))
    assert ours == ["kvmpy.devices.device", "kvmpy.devices.post_port"]
