"""Samples, ratios and targets."""

from collections.abc import Callable

import pytest

from kvmpy.bench.rows import Row, Samples, Target, alternate


def test_contenders_take_turns_and_the_first_turn_does_not_count() -> None:
    turns: list[str] = []

    def sampler(name: str) -> Callable[[], float]:
        def sample() -> float:
            turns.append(name)
            return float(len(turns))

        return sample

    taken = alternate(3, {"a": sampler("a"), "b": sampler("b")})
    assert turns == ["a", "b"] * 4
    assert taken == {"a": Samples((3, 5, 7)), "b": Samples((4, 6, 8))}


def test_ratios_are_formed_pair_by_pair() -> None:
    # While the machine was slow, both were: the quotient of the medians would be 10 / 8.
    own, other = Samples((10, 1000, 1.0)), Samples((8, 1000, 1.0))
    assert own.over(other) == Samples((1.25, 1.0, 1.0))
    assert own.over(other).median == 1.0
    assert own.minus(other) == Samples((2, 0, 0))


def test_samples_know_their_spread() -> None:
    samples = Samples((3, 1, 2, 10))
    assert (samples.low, samples.median, samples.high) == (1, 2.5, 10)


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (Target(1.1), 1.1, True),
        (Target(1.1), 1.11, False),
        (Target(0.9, at_least=True), 0.9, True),
        (Target(0.9, at_least=True), 0.89, False),
    ],
)
def test_a_target_is_met_at_its_limit(target: Target, value: float, met: bool) -> None:
    assert target.met(value) is met


def test_a_row_compares_its_first_contender_with_the_others() -> None:
    taken = {"kvmpy": Samples((3, 4)), "C loop": Samples((2, 2)), "QEMU": Samples((4, 4))}
    row = Row.of("exit", "us", taken, target=Target(3), ratios={"C loop": Target(1.8)})
    assert row.samples == Samples((3, 4))
    assert row.met is False
    assert [(c.contender, c.ratio, c.met) for c in row.comparisons] == [
        ("C loop", Samples((1.5, 2.0)), True),
        ("QEMU", Samples((0.75, 1.0)), None),
    ]
