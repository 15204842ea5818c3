"""SHA and GFNI in software, against the processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from instruction_batch import Batch, assemble_each, batch, compare_forms
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


@pytest.fixture(scope="module")
def states() -> Iterator[Batch]:
    with batch(vector_state, "vector hash") as made:
        yield made


@pytest.fixture(scope="module")
def codes() -> dict[str, bytes]:
    return assemble_each(form for forms in [*SHA.values(), *GALOIS.values()] for form in forms)


@pytest.mark.parametrize("name", SHA | GALOIS)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], name: str) -> None:
    feature = NEEDED[name[:3]]
    if feature not in Path("/proc/cpuinfo").read_text("utf-8").split():
        pytest.skip(f"this processor has no {feature}")
    compare_forms(states, codes, (SHA | GALOIS)[name])
