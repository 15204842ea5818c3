"""Which events a trace keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvmpy.debug.trace.event import KINDS
from kvmpy.errors import UsageError

if TYPE_CHECKING:
    from kvmpy.debug.trace.subject import Subject

    Places = int | range | Iterable[int | range]

__all__ = ["Selection"]


class Selection:
    """The filters of a trace; an event must pass all that are given.

    `kinds` are names of KINDS. `ports` and `addresses` are numbers or ranges: an access passes when any of its bytes
    lies there. Without `kinds` they also choose the kinds that have such a place: "port", and "mmio" and "step".
    `devices` are names of devices or parts of them, in any case, "nobody" for what nobody claims. `vcpus` are ids;
    interrupt lines belong to no vCPU. `minimum` is the shortest time in the handler, in seconds.
    """

    def __init__(
        self,
        *,
        kinds: str | Iterable[str] | None = None,
        ports: Places | None = None,
        addresses: Places | None = None,
        devices: str | Iterable[str] | None = None,
        vcpus: int | Iterable[int] | None = None,
        minimum: float = 0.0,
    ) -> None:
        self._ports = None if ports is None else _ranges("ports", ports)
        self._addresses = None if addresses is None else _ranges("addresses", addresses)
        if kinds is None and not (ports is None and addresses is None):
            kinds = (() if ports is None else ("port",)) + (() if addresses is None else ("mmio", "step"))
        self.kinds = frozenset(KINDS if kinds is None else _names(kinds))
        if unknown := sorted(self.kinds - KINDS.keys()):
            raise UsageError(f"{unknown[0]!r} is no kind of event; there are {', '.join(KINDS)}")
        self._devices = None if devices is None else tuple(name.lower() for name in _names(devices))
        self.vcpus = None if vcpus is None else frozenset((vcpus,) if isinstance(vcpus, int) else vcpus)
        if not isinstance(minimum, (int, float)) or not minimum >= 0:
            raise UsageError(f"the shortest duration is a number of seconds, not {minimum!r}")
        self.minimum = round(min(minimum, 1e9) * 1e9)
        """In nanoseconds."""

    def takes(self, subject: Subject) -> bool:
        """Whether events of this subject pass, apart from their vCPU and duration."""
        if subject.kind not in self.kinds:
            return False
        if self._devices is not None and not any(name in (subject.device or "").lower() for name in self._devices):
            return False
        ranges = {"port": self._ports, "mmio": self._addresses, "step": self._addresses}.get(subject.kind)
        if ranges is None or subject.address is None:
            return True
        first, last = subject.address, subject.address + (subject.size or 1) - 1
        return any(first < there.stop and there.start <= last for there in ranges)


def _names(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _ranges(what: str, places: Places) -> tuple[range, ...]:
    wanted = (places,) if isinstance(places, (int, range)) else tuple(places)
    ranges = tuple(range(place, place + 1) if isinstance(place, int) else place for place in wanted)
    for there in ranges:
        if not isinstance(there, range) or there.step != 1 or not 0 <= there.start < there.stop:
            raise UsageError(f"{what} are numbers, or ranges such as range(0x3f8, 0x400), not {there!r}")
    return ranges
