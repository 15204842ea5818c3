"""TAP and KTAP: what a guest's own tests print, taken apart.

`parse` reads TAP 12 to 14 (https://testanything.org) and KTAP version 1 (the kernel's
Documentation/dev-tools/ktap.rst), as they come over a serial line: with log lines in between, time stamps of the kernel
before each line, CR LF, colours. It takes any text; what is wrong with the output is in `TapReport.problems`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Status", "TapReport", "TapResult", "parse"]


class Status(StrEnum):
    """How a test point ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    XFAILED = "xfailed"  # it failed as expected: TODO, XFAIL


@dataclass(frozen=True, slots=True)
class TapResult:
    """One test point that has no points of its own; or one that has, but failed without any of them having failed."""

    name: str
    """Its description, after those of the points that it is in: "kernel > string > copies"."""
    status: Status
    reason: str = ""
    """What the directive says: why it was skipped, for example."""
    diagnostics: tuple[str, ...] = ()
    """Lines that belong to it: before the result line in KTAP, after it in TAP. The last ones, when there are many."""


@dataclass(frozen=True, slots=True)
class TapReport:
    """What a text says of its tests."""

    results: tuple[TapResult, ...]
    problems: tuple[str, ...]
    """What makes the output itself doubtful: a plan that was not kept, "Bail out!", no TAP at all."""

    @property
    def failed(self) -> tuple[TapResult, ...]:
        """The results that are failures."""
        return tuple(result for result in self.results if result.status is Status.FAILED)

    @property
    def ok(self) -> bool:
        """Whether nothing failed and the output is complete."""
        return not self.failed and not self.problems


_LINES_KEPT = 50
"""Diagnostic lines that a result keeps."""
_DEEPEST = 16
"""Levels of subtests. Further to the right is no TAP, but text."""

_LONGEST = 4096
"""Characters of a line that are looked at."""

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_TIME_STAMP = re.compile(r"(?:<\d{1,3}>)?\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ?|<\d{1,3}>")
"""What the kernel puts before a line of its log: level, seconds, and with CONFIG_PRINTK_CALLER thread or processor."""
_VERSION = re.compile(r"(?P<before>.*?)(?P<dialect>K?TAP) version (?P<version>\d{1,3})\s*$")
_PLAN = re.compile(r"1\.\.(?P<count>\d{1,9})\s*(?:#\s*(?P<reason>.*))?$")
_RESULT = re.compile(r"(?P<not>not )?ok(?![^\s#])(?:\s+(?P<number>\d{1,9})(?![^\s#]))?(?:\s*-(?=\s|$))?(?P<rest>.*)$")
_DIRECTIVE = re.compile(r"(?P<name>skip|todo|xfail|xpass|timeout|error)[^\s:]*:?\s*(?P<reason>.*)$", re.IGNORECASE)
_SUBTEST = re.compile(r"# Subtest(?::\s*|\s+)(?P<name>.*)$")
_BAIL_OUT = re.compile(r"bail out!\s*(?P<reason>.*)$", re.IGNORECASE)
_HASH = re.compile(r"(?<!\\)#")


def parse(text: str) -> TapReport:
    """The results in `text`, and what is wrong with it."""
    parser = _Parser(any(_VERSION.match(line) for line in _lines(text)))
    for line in _lines(text):
        parser.take(line)
        if parser.bailed_out:
            break
    return parser.report()


def _lines(text: str) -> Iterable[str]:
    """The lines without colours and time stamps, as far as they say anything. Spaces before a line count."""
    for line in re.split(r"[\r\n]+", _COLOUR.sub("", text)):
        stamp = _TIME_STAMP.match(line)
        line = line[stamp.end() :] if stamp else line
        if line.strip():
            yield line[:_LONGEST].expandtabs().rstrip()


@dataclass(slots=True)
class _Draft:
    """A result to which diagnostics may still come."""

    name: str
    status: Status
    reason: str = ""
    diagnostics: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES_KEPT))


@dataclass(slots=True)
class _Block:
    """The test points at one indentation: a whole document, or a subtest."""

    indent: int
    name: str = ""
    kernel: bool = False
    """KTAP: numbers are required, and diagnostics come before the result."""
    plan: int | None = None
    no_tests: str | None = None
    """Why there are none, when the plan is 1..0."""
    count: int = 0
    results: list[_Draft] = field(default_factory=list)
    inside: list[_Draft] = field(default_factory=list)
    """Results of a subtest whose own result line is to come."""
    inside_name: str = ""
    announced: str = ""
    """A subtest's name, from a comment at this level."""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES_KEPT))
    """Since the last result."""

    @property
    def fresh(self) -> bool:
        return self.plan is None and not self.count and not self.inside


class _Parser:
    """Takes line by line. `blocks` are those that are open, each further to the right than the one before."""

    def __init__(self, has_version: bool) -> None:
        self.bailed_out = False
        self._has_version = has_version
        self._prefix = ""
        self._blocks: list[_Block] = []
        self._results: list[_Draft] = []
        self._problems: list[str] = []
        self._last: _Draft | None = None
        self._yaml: int | None = None

    def take(self, line: str) -> None:
        """One line, without its end."""
        if self._prefix and line.startswith(self._prefix):
            line = line[len(self._prefix) :]
        content = line.lstrip(" ")
        indent = len(line) - len(content)
        if self._is_yaml(content, indent) or self._takes_version(line):
            return
        if not self._blocks and self._has_version:
            return  # what came before the output of the tests
        if self._depth(indent) > _DEEPEST:
            self._note(content)
        elif match := _PLAN.match(content):
            self._take_plan(indent, int(match["count"]), match["reason"])
        elif match := _SUBTEST.match(content):
            self._take_name(indent, match["name"])
        elif (match := _RESULT.match(content)) and not (match["number"] is None and self._is_kernel(indent)):
            self._take_result(indent, match)
        elif match := _BAIL_OUT.match(content):
            self.bailed_out = True
            self._problems.append(f"Bail out! {match['reason']}".rstrip())
        else:
            self._note(content)

    def report(self) -> TapReport:
        """What was taken, once all has been."""
        if not self._blocks and not self._results and not self.bailed_out:
            self._problems.append("no TAP or KTAP output was found")
        self._close_down_to(-1)
        results = (TapResult(each.name, each.status, each.reason, tuple(each.diagnostics)) for each in self._results)
        return TapReport(tuple(results), tuple(self._problems))

    # Lines that mean something

    def _takes_version(self, line: str) -> bool:
        """A version line opens a document, or a subtest. It may stand behind what was left of a line before."""
        match = _VERSION.match(line)
        if match is None:
            return False
        before = match["before"]
        indent = len(before)
        if before.strip(" "):
            if self._blocks:
                return False  # text that mentions TAP
            self._prefix, indent = before, 0
        if self._depth(indent) > _DEEPEST:
            return False
        self._close_down_to(indent)
        if self._blocks and self._blocks[-1].indent == indent:
            if self._blocks[-1].fresh and self._blocks[-1].name:  # its name came first
                return True
            self._close_down_to(indent - 1)
        self._open(indent, kernel=match["dialect"] == "KTAP")
        return True

    def _take_plan(self, indent: int, count: int, reason: str | None) -> None:
        block = self._at(indent)
        if block.plan is not None:
            self._problems.append(f"{self._place()}a second plan, 1..{count}, after 1..{block.plan}")
            return
        block.plan = count
        if count == 0:
            directive = _DIRECTIVE.match(reason or "")
            block.no_tests = directive["reason"] if directive else reason or ""

    def _take_name(self, indent: int, name: str) -> None:
        block = self._at(indent)
        if block.fresh and not block.name and len(self._blocks) > 1:
            block.name = name
        else:
            block.announced = name

    def _take_result(self, indent: int, match: re.Match[str]) -> None:
        block = self._at(indent)
        block.count += 1
        if match["number"] is not None and int(match["number"]) != block.count:
            self._problems.append(f"{self._place()}test point {match['number']} is number {block.count}")
        name, status, reason = _described(match["rest"], bool(match["not"]))
        name = name or block.inside_name or f"test point {match['number'] or block.count}"
        draft = _Draft(name, status, reason)
        if block.kernel:
            draft.diagnostics.extend(block.lines)
        block.lines.clear()
        inside, block.inside, block.inside_name, block.announced = block.inside, [], "", ""
        for each in inside:
            each.name = f"{name} > {each.name}"
        block.results.extend(inside)
        failed_inside = any(each.status is Status.FAILED for each in inside)
        if not inside or (status is Status.FAILED and not failed_inside):
            block.results.append(draft)
        self._last = None if block.kernel else draft

    def _is_yaml(self, content: str, indent: int) -> bool:
        """Whether the line belongs to a YAML block below a result, which is not looked into."""
        if self._yaml is None:
            if content != "---" or self._last is None:
                return False
            self._yaml = indent
            return True
        if indent < self._yaml:
            self._yaml = None
            return False
        if content == "..." and indent == self._yaml:
            self._yaml = None
        elif self._last is not None:
            self._last.diagnostics.append(" " * (indent - self._yaml) + content)
        return True

    def _note(self, content: str) -> None:
        """A comment, or what somebody else printed."""
        content = re.sub(r"^# ?", "", content)
        if self._last is not None:
            self._last.diagnostics.append(content)
        elif self._blocks:
            self._blocks[-1].lines.append(content)

    # Blocks

    def _depth(self, indent: int) -> int:
        """How many blocks there would be with one at `indent`."""
        return sum(block.indent < indent for block in self._blocks) + 1

    def _is_kernel(self, indent: int) -> bool:
        return any(block.kernel for block in self._blocks if block.indent <= indent)

    def _at(self, indent: int) -> _Block:
        """The block at `indent`; those further to the right are over, and where there is none yet, one begins."""
        self._close_down_to(indent)
        if not self._blocks or self._blocks[-1].indent < indent:
            self._open(indent, kernel=bool(self._blocks) and self._blocks[-1].kernel)
        return self._blocks[-1]

    def _open(self, indent: int, *, kernel: bool) -> None:
        name = ""
        if self._blocks:
            parent = self._blocks[-1]
            self._keep_orphans(parent)
            name, parent.announced = parent.announced, ""
        self._blocks.append(_Block(indent, name, kernel))
        self._last = None

    def _close_down_to(self, indent: int) -> None:
        """Close the blocks that are further to the right."""
        while self._blocks and self._blocks[-1].indent > indent:
            self._close()

    def _close(self) -> None:
        block = self._blocks[-1]
        self._keep_orphans(block)
        if not self.bailed_out:
            self._check_plan(block)
        self._blocks.pop()
        self._last = None
        if self._blocks:
            parent = self._blocks[-1]
            self._keep_orphans(parent)
            parent.inside, parent.inside_name = block.results, block.name
            parent.lines.extend(block.lines)
        else:
            if block.plan == 0 and not block.results:
                block.results.append(_Draft(block.name or "all tests", Status.SKIPPED, block.no_tests or ""))
            self._results.extend(block.results)

    def _check_plan(self, block: _Block) -> None:
        if block.plan is None:
            # The kernel's parameterised tests have none; the result line that follows shows that they are complete.
            if len(self._blocks) == 1:
                self._problems.append(f"{self._place()}no plan (1..N): the output may have been cut off")
        elif block.plan != block.count:
            self._problems.append(f"{self._place()}the plan was 1..{block.plan}, but {block.count} came")

    def _keep_orphans(self, block: _Block) -> None:
        """Results of a subtest that has got no result line of its own."""
        if not block.inside:
            return
        name = block.inside_name or "a subtest"
        if not self.bailed_out:
            self._problems.append(f"{self._place()}{name} has no result line of its own")
        for each in block.inside:
            each.name = f"{name} > {each.name}"
        block.results.extend(block.inside)
        block.inside, block.inside_name = [], ""

    def _place(self) -> str:
        """Where in the output we are, for a problem."""
        names = [block.name for block in self._blocks if block.name]
        return f"{' > '.join(names)}: " if names else ""


def _described(rest: str, not_ok: bool) -> tuple[str, Status, str]:
    """Name, status and reason from what follows the number of a result line."""
    status = Status.FAILED if not_ok else Status.PASSED
    name, reason = rest, ""
    for mark in _HASH.finditer(rest):
        directive = _DIRECTIVE.match(rest[mark.end() :].lstrip())
        if directive is None:
            continue
        name, reason = rest[: mark.start()], directive["reason"]
        match directive["name"].lower():
            case "skip":
                status = Status.SKIPPED
            case "todo":
                status = Status.XFAILED if not_ok else Status.PASSED
            case "xfail":
                status = Status.XFAILED
            case "timeout" | "error":
                status = Status.FAILED
                reason = f"{directive['name']} {reason}".rstrip()
        break
    return name.strip().replace("\\#", "#").replace("\\\\", "\\"), status, reason
