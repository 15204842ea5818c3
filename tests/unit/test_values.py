"""Frozen and mutable values: `kvmpy._value` against what `dataclasses` does with the same class."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest

from kvmpy._value import field, field_names, frozen, mutable, replace


@frozen
class Point:
    """A place."""

    x: int
    y: int = 2
    tags: list[str] = field(default_factory=list)
    limit = 7

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError(self.x)

    @property
    def sum(self) -> int:
        return self.x + self.y


@mutable
class Count:
    number: int = 0
    seen: list[int] = field(default_factory=list)


@frozen
class OwnText:
    x: int

    def __repr__(self) -> str:
        return f"<{self.x}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OwnText) and abs(self.x) == abs(other.x)

    def __hash__(self) -> int:
        return abs(self.x)


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    x: int
    y: int = 2
    tags: list[str] = dataclasses.field(default_factory=list)


def test_it_prints_compares_and_is_called_as_a_dataclass_is() -> None:
    assert repr(Point(1, tags=["a"])) == repr(Model(1, tags=["a"])).replace("Model", "Point")
    assert Point(1) == Point(x=1, y=2) != Point(1, 3)
    assert Point(1) != Model(1)  # type: ignore[comparison-overlap]
    ours, model = (list(inspect.signature(kind).parameters) for kind in (Point, Model))
    assert ours == model
    assert Point.__match_args__ == Model.__match_args__
    match Point(4, 5):
        case Point(x, y):
            assert (x, y) == (4, 5)


@pytest.mark.parametrize("arguments", [(), (1, 2, [], 4)])
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...]) -> None:
    for kind in (Point, Model):
        with pytest.raises(TypeError, match="__init__"):
            kind(*arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        Point(1, z=2)  # type: ignore[call-arg]


def test_a_frozen_value_does_not_change() -> None:
    point = Point(1)
    with pytest.raises(AttributeError, match="a Point does not change"):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x
    with pytest.raises(AttributeError):
        point.other = 3  # type: ignore[attr-defined]
    assert point.x == 1
    assert not hasattr(point, "__dict__")


def test_what_the_class_defines_stays() -> None:
    assert Point.limit == 7
    assert Point(1).sum == 3
    assert Point.__doc__ == "A place."
    assert repr(OwnText(3)) == "<3>"
    assert OwnText(3) == OwnText(-3)
    assert hash(OwnText(-3)) == 3
    with pytest.raises(ValueError, match="-1"):
        Point(-1)


def test_defaults_from_a_factory_are_not_shared() -> None:
    Count().seen.append(1)
    assert Count().seen == []
    assert Point(1).tags is not Point(1).tags


def test_a_mutable_one_changes_and_has_no_hash() -> None:
    count = Count()
    count.number += 1
    assert count == Count(1)
    with pytest.raises(TypeError, match="unhashable"):
        hash(count)
    with pytest.raises(AttributeError):
        count.others = 1  # type: ignore[attr-defined]


def test_replaced_copied_and_pickled() -> None:
    point = Point(1, 5, ["a"])
    assert replace(point, x=3) == Point(3, 5, ["a"])
    with pytest.raises(TypeError):
        replace(point, z=3)
    with pytest.raises(ValueError, match="-2"):
        replace(point, x=-2)
    assert copy.deepcopy(point) == pickle.loads(pickle.dumps(point)) == copy.copy(point) == point
    assert copy.deepcopy(point).tags is not point.tags


def test_equal_values_have_one_hash() -> None:
    @frozen
    class Key:
        a: int
        b: str = ""

    assert {Key(1), Key(1, ""), Key(2)} == {Key(1), Key(2)}


def test_names_of_the_fields() -> None:
    assert field_names(Point) == ("x", "y", "tags")
    assert field_names(Model) is None
    assert field_names(int) is None
