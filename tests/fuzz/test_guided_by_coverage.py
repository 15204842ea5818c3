"""The targets of scripts/fuzz-virtio, by libFuzzer: 60 seconds in all. By hand it takes as long as one likes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kvmpy.pytest_plugin.requirement import is_required

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "scripts" / "fuzz-virtio")
FILES = sorted(Path(__file__).parent.glob("test_fuzz_*.py"))
TARGETS = [path.stem.removeprefix("test_fuzz_").removeprefix("virtio_") for path in FILES]
SECONDS = -(-60 // len(TARGETS))
UNAVAILABLE = 69

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def atheris(pytestconfig: pytest.Config) -> None:
    """Fetched if it is not there yet. Where all tests must run, it is an error that it cannot be had."""
    done = subprocess.run([SCRIPT, "--install"], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == UNAVAILABLE and not is_required(pytestconfig):
        pytest.skip(f"atheris cannot be had: {done.stderr}")
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("atheris")
@pytest.mark.parametrize("target", TARGETS)
def test_it_keeps_its_promises(target: str, tmp_path: Path) -> None:
    command = [SCRIPT, target, f"-max_total_time={SECONDS}", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, check=False)
    found = "".join(f"{path.name}: bytes.fromhex({path.read_bytes().hex()!r})\n" for path in tmp_path.iterdir())
    assert done.returncode == 0, f"{found}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert not found
    assert "Done " in done.stderr
