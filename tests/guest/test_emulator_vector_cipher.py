"""AES-NI and PCLMULQDQ in software, against the processor."""

from __future__ import annotations

import pytest

from instruction_batch import Batch, compare_forms
from instruction_forms import codes_of, states_of
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


states = states_of(vector_state, "vector cipher")
codes = codes_of(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_the_processor_gives_the_same(states: Batch, codes: dict[str, bytes], name: str) -> None:
    compare_forms(states, codes, FORMS[name])
