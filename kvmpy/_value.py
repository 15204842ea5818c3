"""Values with named fields: what `dataclass(frozen=True, slots=True)` makes, at a thirtieth of its price.

A frozen dataclass takes half a millisecond to define, and the module that makes it six to import (measured). A page
walk, a gate or a crash report is made of fifty such classes, and a guest that ends badly after 20 ms should not wait
as long again for its report. Here all classes share their methods, and `__init__` is compiled when it is first used.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar, dataclass_transform

    T = TypeVar("T")
else:

    def dataclass_transform(**_):
        return lambda decorator: decorator


__all__ = ["field", "field_names", "frozen", "mutable", "replace"]


class _Default:
    """A default that is made anew for every value."""

    __slots__ = ("factory",)

    def __init__(self, factory: "Callable[[], object]") -> None:
        self.factory = factory


def field(*, default_factory: "Callable[[], Any]") -> "Any":
    """A field whose default is what `default_factory()` answers."""
    return _Default(default_factory)


@dataclass_transform(eq_default=True, frozen_default=True, field_specifiers=(field,))
def frozen(cls: "type[T]") -> "type[T]":
    """Make a class of annotated names one of immutable values, with these names as fields in this order.

    As with `dataclasses`: a value after the `=` is the default, `__post_init__` is called at the end of `__init__`,
    values of one class are equal when their fields are, and what the class defines itself stays. Setting a field
    raises AttributeError. A ClassVar has no place here: define constants without an annotation.
    """
    return _with_fields(cls, {"__setattr__": _refuse, "__delattr__": _refuse, "__eq__": _eq, "__hash__": _hash})


@dataclass_transform(eq_default=True, field_specifiers=(field,))
def mutable(cls: "type[T]") -> "type[T]":
    """The same for objects whose fields can be set. They have no hash."""
    return _with_fields(cls, {"__eq__": _eq, "__hash__": None})


def _with_fields(cls: "type[T]", methods: "dict[str, object]") -> "type[T]":
    own = {name: item for name, item in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    names = tuple(own.get("__annotations__", ()))
    defaults = {name: own.pop(name) for name in names if name in own}
    if "__eq__" in own:
        del methods["__eq__"], methods["__hash__"]
    made = {"__slots__": names, "__match_args__": names, "__init__": _Init(names, defaults), "__reduce__": _reduce}
    metaclass: Any = type(cls)
    complete: type[T] = metaclass(cls.__name__, cls.__bases__, {"__repr__": _repr} | methods | made | own)
    return complete


def field_names(kind: type) -> "tuple[str, ...] | None":
    """The fields of a class that was made here, None for others."""
    return kind.__match_args__ if kind.__dict__.get("__reduce__") is _reduce else None  # type: ignore[attr-defined]


def replace(old: "T", **changes: object) -> "T":
    """A value like `old`, with other content in some fields."""
    kind = type(old)
    given = {name: getattr(old, name) for name in kind.__match_args__}  # type: ignore[attr-defined]
    return kind(**given | changes)


class _Init:
    """`__init__` until somebody asks for it, which is when its class is first called."""

    __slots__ = ("defaults", "names")

    def __init__(self, names: tuple[str, ...], defaults: dict[str, object]) -> None:
        self.names = names
        self.defaults = defaults

    def __get__(self, instance: object, owner: type) -> object:
        cls = next(cls for cls in owner.__mro__ if cls.__dict__.get("__init__") is self)
        scope: dict[str, Any] = {}
        parameters, lines = [], []
        for name in self.names:
            scope[f"_set_{name}"] = cls.__dict__[name].__set__
            content = name
            if name in self.defaults:
                default = self.defaults[name]
                scope[f"_{name}"] = default
                parameters.append(f"{name}=_{name}")
                if isinstance(default, _Default):
                    scope[f"_make_{name}"] = default.factory
                    content = f"_make_{name}() if {name} is _{name} else {name}"
            else:
                parameters.append(name)
            lines.append(f" _set_{name}(self, {content})")
        if hasattr(cls, "__post_init__"):
            lines.append(" self.__post_init__()")
        exec(f"def __init__(self, {', '.join(parameters)}):\n" + ("\n".join(lines) or " pass"), scope)
        made = scope["__init__"]
        made.__qualname__ = f"{cls.__qualname__}.__init__"
        made.__module__ = cls.__module__
        made.__annotations__ = {**cls.__annotations__, "return": None}
        cls.__init__ = made  # type: ignore[misc]
        return made.__get__(instance, owner)


def _contents(self: object) -> "tuple[Any, ...]":
    return tuple([getattr(self, name) for name in self.__match_args__])  # type: ignore[attr-defined]


def _eq(self: object, other: object) -> "Any":
    return _contents(self) == _contents(other) if type(other) is type(self) else NotImplemented


def _hash(self: object) -> int:
    return hash(_contents(self))


def _repr(self: object) -> str:
    kind = type(self)
    fields = ", ".join([f"{name}={getattr(self, name)!r}" for name in kind.__match_args__])  # type: ignore[attr-defined]
    return f"{kind.__qualname__}({fields})"


def _reduce(self: object) -> tuple[type, tuple[object, ...]]:
    return type(self), _contents(self)


def _refuse(self: object, name: str, *_: object) -> None:
    raise AttributeError(f"a {type(self).__name__} does not change; replace() makes another with another {name}")
