"""The Python prompt of `kvmpy shell`: reads statements, runs them, shows values in hex, goes on after errors."""

from __future__ import annotations

import ast
import builtins
import code
import contextlib
import io
import os
import select
import sys
import traceback
from typing import TYPE_CHECKING, Any

from kvmpy.cli.guest_output import GuestOutput, StandardOutput
from kvmpy.debug.prompt.hex_text import shown
from kvmpy.errors import KvmpyError

if TYPE_CHECKING:
    from types import CodeType, TracebackType
    from typing import Self

    from kvmpy.cli.prompt_line import PromptLine
    from kvmpy.debug.prompt import GuestPrompt

__all__ = ["PromptConsole"]

_UNTOLD = (os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep, contextlib.__file__)
"""Where the frames are that tracebacks leave out: in kvmpy, and in what stands between two of its functions."""
_FIRST, _NEXT = ">>> ", "... "


class PromptConsole(code.InteractiveConsole):
    """A prompt before the guest of `prompt`. Within its context values are shown in hex, and printing is shared.

    `names` are there besides those of `prompt`. With `whole_tracebacks` errors show the frames within kvmpy too.
    """

    def __init__(
        self, prompt: GuestPrompt, names: dict[str, Any], output: GuestOutput, *, whole_tracebacks: bool = False
    ) -> None:
        self.prompt = prompt
        self.output = output
        self._present = prompt.present()
        self._whole_tracebacks = whole_tracebacks
        self._line: PromptLine | None = None
        self._failed = False
        super().__init__({"__name__": "__console__", "__doc__": None, **prompt.names(), **names})
        self.namespace: dict[str, Any] = self.locals

    def __enter__(self) -> Self:
        self._before = sys.displayhook, sys.stdout
        sys.displayhook = self._display
        sys.stdout = StandardOutput(sys.stdout, self.output)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout.flush()
        sys.displayhook, sys.stdout = self._before

    # Reading

    def converse(self, banner: str) -> None:
        """Read and run statements until the input ends. With a terminal there are `banner`, prompts, and completion."""
        terminal = os.isatty(0) and os.isatty(1)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # what is no text shall fail as a statement, not as a read
        if terminal:
            self._line = self._editable_line()
            print(banner)
        more = interrupted = False
        while True:
            try:
                if interrupted:  # shown in here, where another Ctrl-C does no harm
                    self.resetbuffer()
                    more = interrupted = False
                    self._show_interruption()
                if end := self._end():
                    self.output.show(end)
                line = self.raw_input((_NEXT if more else _FIRST) if terminal else "")
                more = self.push(line)
            except EOFError:
                if terminal:
                    print()
                return
            except KeyboardInterrupt:
                interrupted = True

    def raw_input(self, prompt: str = "") -> str:
        """One line of input."""
        self.output.finish_line()
        sys.stdout.flush()  # somebody may wait for it at the other end of a pipe
        if sys.stdin is None:  # the descriptor was closed when Python started
            raise EOFError
        if self._line is None:
            return input(prompt)
        self.output.hold()
        try:
            return self._line.read(prompt)
        finally:
            self.output.release()

    def _editable_line(self) -> PromptLine | None:
        try:
            import readline
        except ImportError:  # a Python without it
            return None
        from kvmpy.cli.prompt_line import PromptLine
        from kvmpy.debug.prompt.completion import Completer

        completer = Completer(self.prompt, self.namespace)
        words: list[str] = []

        def complete(text: str, number: int) -> str | None:
            if not number:
                words[:] = completer.complete(readline.get_line_buffer(), readline.get_begidx(), text)
            return words[number] if number < len(words) else None

        readline.set_completer(complete)
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
        return PromptLine(self._look)

    def _look(self) -> None:
        """While a line is typed: show what the guest wrote, and how it ended."""
        assert self._line is not None
        end = self._end()
        taken = self.output.take(everything=bool(end))
        if taken:
            self._line.show_above(taken if taken.endswith(b"\n") else taken + b"\n")
        if end:
            self._line.show_above(f"{end}\n".encode("utf-8", "replace"))

    def _end(self) -> str:
        """How the run in the background has ended; nothing as long as it has not, or was told."""
        try:
            stopped = self.prompt.ended()
        except Exception as error:  # a device handler's
            return self._traceback(error).rstrip()
        if stopped is None:
            return ""
        self._renew_names()
        return f"in the background: {stopped}"

    # Running

    def execute(self, source: str) -> int:
        """Run the statements of `source`; the exit status: 0, or 1 after an error. KeyboardInterrupt comes out."""
        self._failed = False
        try:
            tree = ast.parse(source, "<command>")
        except (SyntaxError, ValueError):
            self.showsyntaxerror("<command>")
            return 1
        for statement in tree.body:
            self.runcode(compile(ast.Interactive([statement]), "<command>", "single"))
            if self._failed:
                return 1
        return 0

    def runcode(self, code: CodeType) -> None:
        """Run a compiled statement, and show the traceback of an error."""
        try:
            exec(code, self.namespace)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if isinstance(error, BrokenPipeError) and _reader_has_gone():
                raise
            self._failed = True
            self.showtraceback()
        finally:
            self._renew_names()

    def _renew_names(self) -> None:
        """`vcpu`, `regs` and the like follow the vCPU that stopped, unless the user gave the name to something else."""
        present = self.prompt.present()
        for name, value in present.items():
            if self.namespace.get(name) is self._present[name]:
                self.namespace[name] = value
        self._present = present

    # Showing

    def _display(self, value: object) -> None:
        if value is None:
            return
        builtins._ = value  # type: ignore[attr-defined]
        self.output.show(shown(value))

    def _show_interruption(self) -> None:
        stopped = self.prompt.interrupted()
        self.output.show(f"\n{'KeyboardInterrupt' if stopped is None else stopped}")

    def showtraceback(self) -> None:
        """Show the exception that is being handled."""
        error = sys.exception()
        assert error is not None
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__  # for pdb.pm()
        self.output.finish_line()
        sys.stdout.flush()
        self.write(self._traceback(error))

    def _traceback(self, error: BaseException) -> str:
        """The text about an error: the frames of the user's code; of one that kvmpy raised, perhaps just the error."""
        if self._whole_tracebacks:
            return "".join(traceback.format_exception(error))
        told = traceback.TracebackException.from_exception(error)
        for part in _chain(told):
            part.stack = traceback.StackSummary.from_list(
                [frame for frame in part.stack if not os.path.abspath(frame.filename).startswith(_UNTOLD)]
            )
        if isinstance(error, KvmpyError) and len(told.stack) <= 1:
            return f"{type(error).__name__}: {error}\n"
        return "".join(told.format())


def _reader_has_gone() -> bool:
    """Whether nobody reads our standard output any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _chain(told: traceback.TracebackException | None) -> list[traceback.TracebackException]:
    """An exception and those that it came from."""
    found: list[traceback.TracebackException] = []
    while told is not None and told not in found:
        found.append(told)
        told = told.__cause__ or told.__context__
    return found
