"""What is measured: samples, taken in turns, and the comparisons that they give."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Comparison", "Row", "Sampler", "Samples", "Target", "alternate"]

Sampler = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that shall be reached: at most `limit`, or at least with `at_least`."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Whether `value` reaches it."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Samples:
    """Values of one quantity, in the order they were taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def over(self, other: Samples) -> Samples:
        """The quotients, pair by pair: what disturbs the machine for a while disturbs both of a pair."""
        return Samples(tuple(own / its for own, its in zip(self.values, other.values, strict=True)))

    def minus(self, other: Samples) -> Samples:
        """The differences, pair by pair."""
        return Samples(tuple(own - its for own, its in zip(self.values, other.values, strict=True)))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A row's samples over those of a contender, and the target of that ratio."""

    contender: str
    samples: Samples
    ratio: Samples
    target: Target | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median of the ratios reaches the target; None without one."""
        return None if self.target is None else self.target.met(self.ratio.median)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what kvmpy takes, and what others take for the same."""

    name: str
    unit: str
    samples: Samples
    comparisons: tuple[Comparison, ...] = ()
    target: Target | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the row's own target; None without one."""
        return None if self.target is None else self.target.met(self.samples.median)

    @classmethod
    def of(
        cls, name: str, unit: str, taken: Mapping[str, Samples], *,
        target: Target | None = None, ratios: Mapping[str, Target] | None = None, note: str = "",
    ) -> Row:  # fmt: skip
        """A row of what `alternate` gave: the first contender is kvmpy, `ratios` has targets of the others."""
        first, *others = taken.items()
        own = first[1]
        comparisons = tuple(
            Comparison(contender, samples, own.over(samples), (ratios or {}).get(contender))
            for contender, samples in others
        )
        return cls(name, unit, own, comparisons, target, note)


def alternate(rounds: int, samplers: Mapping[str, Sampler]) -> dict[str, Samples]:
    """Take `rounds` samples of each in turns, A B A B ..., after one of each that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    for number in range(rounds + 1):
        for name, sampler in samplers.items():
            value = sampler()
            if number:
                taken[name].append(value)
    return {name: Samples(tuple(values)) for name, values in taken.items()}
