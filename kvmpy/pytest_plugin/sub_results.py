"""The fixture `kvm_tap`: each test point that a guest printed, as a result of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvmpy.pytest_plugin.boot import BootResult
from kvmpy.pytest_plugin.tap import Status, TapReport, TapResult, parse

if TYPE_CHECKING:
    from kvmpy.pytest_plugin.guests import Guests

__all__ = ["KvmTap"]


class KvmTap:
    """Checks TAP and KTAP output."""

    def __init__(self, request: pytest.FixtureRequest, guests: Guests) -> None:
        self._request = request
        self._guests = guests

    def __call__(self, output: BootResult | str) -> TapReport:
        """Show each test point in `output` (of `kvm_boot`: what came over the serial port) as a subtest.

        The test fails when a point does, or when the output itself is not right: no TAP in it, a plan that was not
        kept, "Bail out!". Without subtests (pytest 8 without pytest-subtests) it fails at once, with all that failed.
        """
        __tracebackhide__ = True
        text = output.console if isinstance(output, BootResult) else output
        report = parse(text)
        problems = list(report.problems)
        if isinstance(output, BootResult):
            if lost := output.machine.console.dropped:
                problems.insert(0, f"the first {lost} bytes of the console are lost")
            if problems:
                problems.append(f"the guest ended: {output.outcome}")
        if report.failed or problems:
            self._guests.failed_inside = True
        try:
            subtests = self._request.getfixturevalue("subtests")
        except pytest.FixtureLookupError:
            problems = [_text(result) for result in report.failed] + problems
        else:
            self._guests.giving_sub_results = True
            try:
                for result in report.results:
                    with subtests.test(result.name):
                        _end_like(result)
            finally:
                self._guests.giving_sub_results = False
        if problems:
            total = f"test points from the guest: {len(report.results)}, failed: {len(report.failed)}"
            pytest.fail("\n".join([total, *problems]), pytrace=False)
        return report


def _end_like(result: TapResult) -> None:
    """Pass, fail, skip or fail as expected, as the test point did."""
    match result.status:
        case Status.FAILED:
            pytest.fail(_text(result), pytrace=False)
        case Status.SKIPPED:
            skipped: Any = pytest.skip.Exception(result.reason or "skipped in the guest")
            skipped._use_item_location = True  # the test's, not this line
            raise skipped
        case Status.XFAILED:
            pytest.xfail(result.reason or "expected in the guest")


def _text(result: TapResult) -> str:
    reason = f": {result.reason}" if result.reason else ""
    return "\n".join([f"not ok: {result.name}{reason}", *(f"  {line}" for line in result.diagnostics)])
