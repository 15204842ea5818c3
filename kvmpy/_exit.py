"""The base of all exit classes, and where the answer to an exit goes. The classes themselves: `kvmpy.exits`."""

from kvmpy.errors import ReplyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Protocol

    class AnswerPage(Protocol):
        """What an answer needs of `kvmpy.kvm.run_page.RunPage`."""

        u8: memoryview
        runs: list[int]


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
    """Where the reply to an exit goes: `size` bytes from `start` on in the run page.

    It is valid as long as the vCPU has not run on since the exit: `page.runs` counts the entries of the vCPU, `run`
    remembers which one this exit came from. It holds no view of the page, so that exits which somebody keeps do not
    keep the vCPU's mapping, and with it the VM, alive in the kernel.
    """

    __slots__ = ("page", "run", "size", "start")

    def __init__(self, page: "AnswerPage", start: int, size: int) -> None:
        self.page = page
        self.start = start
        self.size = size
        self.run = page.runs[0]

    def give(self, value: "int | bytes") -> None:
        if self.run != self.page.runs[0]:
            raise ReplyError("the vCPU has run on since this exit, or was closed; answer before the next run")
        size = self.size
        if isinstance(value, int):
            if not 0 <= value < 1 << (8 * size):
                raise ReplyError(f"a reply of {value:#x} does not fit the {size} bytes that the guest reads")
            value = value.to_bytes(size, "little")
        elif not isinstance(value, (bytes, bytearray, memoryview)):
            raise ReplyError(f"a reply is an int or bytes, not {value!r}")
        elif len(value) != size:
            raise ReplyError(f"a reply of {len(value)} bytes to a read of {size} bytes")
        self.page.u8[self.start : self.start + size] = value


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
