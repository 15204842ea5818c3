"""The base of all exit classes, and where the answer to an exit goes. The classes themselves: `kvmpy.exits`."""

from kvmpy.errors import ReplyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar

__all__ = ["Answer", "Answered", "Exit"]


class Exit:
    """Base of all exits. `reason` is the KVM_EXIT_* number."""

    __slots__ = ()
    __match_args__: "ClassVar[tuple[str, ...]]" = ()
    reason: int = -1

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__match_args__)

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, name) for name in self.__match_args__)))

    def __repr__(self) -> str:
        fields = []
        for name in self.__match_args__:
            value = getattr(self, name)
            shown = hex(value) if type(value) is int and value > 9 else repr(value)
            fields.append(f"{name}={shown}")
        return f"{type(self).__name__}({', '.join(fields)})"


class Answer:
    """Where the reply to an exit goes: `target`, valid as long as the vCPU has not run on since the exit.

    `runs` counts the entries of the vCPU; it lives with the vCPU, `run` remembers which one this exit came from.
    """

    __slots__ = ("run", "runs", "target")

    def __init__(self, target: memoryview, runs: list[int]) -> None:
        self.target = target
        self.runs = runs
        self.run = runs[0]

    def give(self, value: "int | bytes") -> None:
        if self.run != self.runs[0]:
            raise ReplyError("the vCPU has run on since this exit; answer an exit before the next run")
        size = len(self.target)
        if isinstance(value, int):
            if not 0 <= value < 1 << (8 * size):
                raise ReplyError(f"a reply of {value:#x} does not fit the {size} bytes that the guest reads")
            value = value.to_bytes(size, "little")
        elif len(value) != size:
            raise ReplyError(f"a reply of {len(value)} bytes to a read of {size} bytes")
        self.target[:] = value


class Answered(Exit):
    """An exit that takes an answer."""

    __slots__ = ("_answer",)
    _answer: Answer | None

    def reply(self, value: "int | bytes") -> None:
        """Answer the guest's read with an unsigned int or with exactly as many bytes as it reads.

        Raises ReplyError when the size is wrong or the vCPU has run on since.
        """
        if self._answer is None:
            raise ReplyError("this exit did not come from a vCPU")
        self._answer.give(value)
