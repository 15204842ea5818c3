"""Fixtures of modules that compare many forms of instructions: states to compare them in, and their machine code.

A module binds them to names: `states = states_of(vector_state, "vector moves")`, `codes = codes_of(FORMS)`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest

from instruction_batch import Batch, assemble_each, batch
from instruction_comparison import Given, components

__all__ = ["OSXMMEXCPT", "codes_of", "families_of", "states_of"]

OSXMMEXCPT = 1 << 10
"""CR4: exceptions of vector instructions on floating-point numbers are #XM."""
_AVX_512 = {5, 6, 7}


def states_of(
    make: Callable[[random.Random, int, int], Given], seed: str, *, avx_512: bool = False, cr4: int = 0
) -> Any:
    """A fixture: states, as `batch` makes them, with more bits in CR4. `avx_512`: tests skip without it."""

    @pytest.fixture(scope="module")
    def states() -> Iterator[Batch]:
        if avx_512 and not components().keys() >= _AVX_512:
            pytest.skip("this processor has no AVX-512")
        with batch(make, seed) as made:
            made.state.sregs.cr4 |= cr4
            yield made

    return states


def codes_of(forms: Mapping[str, Iterable[str]], more: Iterable[str] = ()) -> Any:
    """A fixture: the machine code of each of the forms."""

    @pytest.fixture(scope="module")
    def codes() -> dict[str, bytes]:
        return assemble_each([*(form for each in forms.values() for form in each), *more])

    return codes


def families_of(forms: Mapping[str, Iterable[str]], family: Callable[[str], str]) -> dict[str, list[str]]:
    """The forms of all instructions of a family together, by its name: each gets fewer states, in less time."""
    families: dict[str, list[str]] = {}
    for name, each in forms.items():
        families.setdefault(family(name), []).extend(each)
    return families
