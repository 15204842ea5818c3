"""SHA and GFNI in software, against the processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from instruction_batch import Batch, compare_forms
from instruction_forms import codes_of, states_of
from vector_cases import two_sources, vector_state

pytestmark = pytest.mark.kvm

SHA = {
    name: [f"{name} xmm1, xmm2", f"{name} xmm9, xmmword ptr [rsi + 16]", f"{name} xmm1, xmm0"]
    for name in ("sha1nexte", "sha1msg1", "sha1msg2", "sha256msg1", "sha256msg2", "sha256rnds2")
}
SHA["sha1rnds4"] = [f"sha1rnds4 xmm1, xmm{number + 2}, {number}" for number in range(5)]
GALOIS = two_sources("gf2p8mulb") | {
    name: two_sources(name, immediate=", 0x63")[name] for name in ("gf2p8affineqb", "gf2p8affineinvqb")
}
NEEDED = {"sha": "sha_ni", "gf2": "gfni"}


states = states_of(vector_state, "vector hash")
codes = codes_of(SHA | GALOIS)


@pytest.mark.parametrize("name", SHA | GALOIS)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], name: str) -> None:
    feature = NEEDED[name[:3]]
    if feature not in Path("/proc/cpuinfo").read_text("utf-8").split():
        pytest.skip(f"this processor has no {feature}")
    compare_forms(states, codes, (SHA | GALOIS)[name])
