"""AES-NI and PCLMULQDQ in software, against the processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from instruction_batch import Batch, assemble_each, batch, compare_forms
from vector_cases import listed, vector_state

pytestmark = pytest.mark.kvm

FORMS = listed("""
aesimc xmm1, xmm2 | vaesimc xmm1, [rsi + 1]
aeskeygenassist xmm1, xmm2, 0x1b | vaeskeygenassist xmm1, [rsi + 1], 0x36
pclmulqdq xmm1, xmm2, 0 | pclmulqdq xmm1, [rsi], 17 | vpclmulqdq xmm1, xmm2, xmm3, 1
| vpclmulqdq xmm1, xmm2, [rsi + 1], 16
""")
for name in ["aesenc", "aesenclast", "aesdec", "aesdeclast"]:
    FORMS[name] = [
        f"{name} xmm1, xmm12",
        f"{name} xmm9, [rsi]",
        f"v{name} xmm1, xmm2, xmm3",
        f"v{name} xmm1, xmm2, [rsi + 3]",
    ]


@pytest.fixture(scope="module")
def states() -> Iterator[Batch]:
    with batch(vector_state, "vector cipher") as made:
        yield made


@pytest.fixture(scope="module")
def codes() -> dict[str, bytes]:
    return assemble_each(form for forms in FORMS.values() for form in forms)


@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])
