"""What a command has loaded by the time its guest starts: each module more is a part of a millisecond of waiting."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The command, up to the point where the guest would begin to run.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from kvmpy.cli import main, small_pc

def end(self, timeout):
    print(*sys.modules)
    raise SystemExit(0)

small_pc.SmallPc.run = end
main(sys.argv[1:])
"""

DEAR = {
    "asyncio", "dataclasses", "elftools", "importlib.metadata", "inspect", "json", "logging", "math", "pathlib",
    "shutil", "signal", "socket", "subprocess", "tempfile", "termios", "typing",
}  # fmt: skip
"""Of the standard library, what takes long and nothing before the first instruction needs."""

WHEN_ASKED_FOR = (
    "kvmpy.abi.flags", "kvmpy.abi.structs.interrupts", "kvmpy.abi.structs.memory", "kvmpy.abi.structs.registers",
    "kvmpy.abi.structs.vcpu", "kvmpy.boot.acpi", "kvmpy.boot.mp_table", "kvmpy.boot.smbios", "kvmpy.debug",
    "kvmpy.machine.direct_execution", "kvmpy.machine.platform_tables", "kvmpy.virtio", "kvmpy.x86.emulator",
)  # fmt: skip
"""Of kvmpy, what is for guests and users that ask for it. Packages stand for all that is in them."""


def loaded_at_the_start(*arguments: str) -> list[str]:
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("firmware", [True, False], ids=["firmware", "boot sector"])
def test_a_guest_starts_without_what_nobody_has_asked_for(firmware: bool, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"\xf4" * (0x1_0000 if firmware else 510) + (b"" if firmware else b"\x55\xaa"))
    options = ("--firmware", "--debug-console", "-") if firmware else ()
    loaded = loaded_at_the_start("run", *options, str(image))
    assert "kvmpy.machine.pc" in loaded
    assert not DEAR & set(loaded)
    assert not [name for name in loaded if any(f"{name}.".startswith(f"{part}.") for part in WHEN_ASKED_FOR)]
