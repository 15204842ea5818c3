"""A C program that computes with doubles, floats and long doubles, in ring 0: the results are those of the host.

Compilers for x86-64 take SSE2 for floating point unless they are told otherwise, so it is what kernels that somebody
writes for himself have in them.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from gnu_toolchain import compile_c
from instruction_comparison import xcr0
from kvmpy import Machine, MiB
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit
from kvmpy.x86.flags import Cr0, Cr4

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs `gcc` (Debian package gcc)"),
]

SOURCE = Path(__file__).with_name("floating_point.c")
RESULTS, COUNT = 0x30_0000, 20
BOTH = ("-ffp-contract=fast", "-fno-math-errno", "-Wno-pedantic")
REGISTERS = ("-m80387", "-mmmx")  # the tool chain takes only general registers unless it is told otherwise
FLAGS = {
    "SSE2": ("-O1", "-msse2"),
    "SSE2, vectors": ("-O3", "-msse2"),
    "AVX2 and FMA": ("-O3", "-mavx2", "-mfma"),
    "AVX-512": ("-O3", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
}
AVX, AVX_512 = 0x4, 0xE0


def on_the_host(flags: tuple[str, ...], folder: Path) -> list[int]:
    program = folder / "program"
    subprocess.run(["gcc", "-DHOST", *flags, *BOTH, "-o", str(program), str(SOURCE)], check=True, timeout=60)
    said = subprocess.run([str(program)], check=True, timeout=10, capture_output=True, text=True).stdout
    return [int(line, 16) for line in said.split()]


@pytest.mark.parametrize("name", FLAGS)
def test_a_program_computes_what_it_computes_on_the_host(name: str, tmp_path: Path) -> None:
    flags = FLAGS[name]
    wanted = AVX_512 | AVX if name == "AVX-512" else AVX if "AVX" in name else 0
    if wanted & ~xcr0():
        pytest.skip(f"this processor has no {name}")
    guest = compile_c(SOURCE.read_text("utf-8"), flags=(*flags, *REGISTERS, *BOTH))
    with Machine(memory=8 * MiB, irqchip=False) as machine:
        machine.add(DebugExit())
        machine.load(ElfImage(guest.elf))
        vcpu = machine.vcpus[0]
        vcpu.sregs.cr0 = vcpu.sregs.cr0 & ~(Cr0.EM | Cr0.TS) | Cr0.MP | Cr0.NE
        vcpu.sregs.cr4 |= Cr4.OSFXSR | Cr4.OSXMMEXCPT | Cr4.OSXSAVE
        xcrs = vcpu.get_xcrs()
        xcrs.nr_xcrs, xcrs.xcrs[0].value = 1, xcr0() & (3 | AVX | AVX_512)
        vcpu.set_xcrs(xcrs)
        outcome = machine.run(timeout=30)
        assert outcome.code == 3, outcome
        found = [machine.memory.read_u64(RESULTS + 8 * place) for place in range(COUNT)]
    assert found == on_the_host(flags, tmp_path)
