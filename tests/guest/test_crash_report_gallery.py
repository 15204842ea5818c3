"""Classic mistakes in tiny guests (tests/crash_gallery/): the report names each as the first cause."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from crash_guests import GUESTS, CrashGuest, crashed
from kvmpy.debug.crash_report import RULES, CrashReport, Weight

IDS = {rule.id for rule in RULES}


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
def test_the_report_names_the_mistake_first(guest: CrashGuest) -> None:
    with crashed(guest) as (machine, outcome, report):
        memory = [bytes(region.buffer) for region in machine.memory.regions]
        registers = machine.vcpus[0].cpu_state()
        again = CrashReport.capture(machine, outcome)
        assert [bytes(region.buffer) for region in machine.memory.regions] == memory, "the guest was changed"
        assert machine.vcpus[0].cpu_state() == registers
    assert outcome.end in guest.ends, outcome
    page = str(report)
    assert report.cause is not None, page
    assert report.cause.id == guest.finds, page
    assert report.cause.weight is Weight[guest.settings.get("weight", "cause").upper()], page
    assert guest.settings.get("says", "") in report.cause.text, page
    others = [finding.id for finding in report.findings[1:]]
    if "contributes" in guest.settings:
        assert guest.settings["contributes"] in others, page
    assert not report.unavailable, page
    assert [section.name for section in report.sections if section.unavailable] == [], page
    assert page.startswith(report.summary)
    assert report.cause.title in page
    assert report.cause.title in report._repr_html_().replace("&#39;", "'")
    assert json.loads(json.dumps(report.as_data()))["findings"][0]["id"] == guest.finds
    assert str(again) == page


def test_the_gallery_is_large_and_says_what_it_is() -> None:
    assert len(GUESTS) >= 60
    assert len({guest.title for guest in GUESTS}) == len(GUESTS)
    known = {"mode", "finds", "contributes", "says", "ends", "weight", "memory", "stack", "ring", "irqchip"}
    for guest in GUESTS:
        assert guest.title, guest.name
        assert not guest.settings.keys() - known, guest.name
        assert {guest.finds, guest.settings.get("contributes", guest.finds)} <= IDS, guest.name
    assert len({guest.finds for guest in GUESTS}) >= 45


def test_a_triple_fault_is_explained_step_by_step() -> None:
    guest = next(guest for guest in GUESTS if guest.name == "gate_without_handler")
    with crashed(guest) as (_, _, report):
        pass
    section = report.section("events")
    assert section is not None
    (chosen,) = (one for one in section.data["candidates"] if one["chosen"])
    assert chosen["event"] == "#PF (error code 0x0, address 0x5000000000)"
    assert chosen["ends_in"] == "triple fault"
    assert [step["vector"] for step in chosen["steps"]] == [14, 8]
    assert not any(step["delivered"] for step in chosen["steps"])
    assert "no interrupt or trap gate" in chosen["steps"][0]["reason"]
    tables = report.section("tables")
    assert tables is not None
    assert [gate["vector"] for gate in tables.data["gates"]] == [14, 8]
    assert {gate["text"] for gate in tables.data["gates"]} == {"empty"}
    pages = report.section("pages")
    assert pages is not None
    walks = {walk["what"]: walk for walk in pages.data}
    assert walks["CR2"]["virtual"] == 0x5000000000
    assert walks["CR2"]["failure"] == "PDPTE not present"
    assert [entry["level"] for entry in walks["RIP"]["entries"]] == ["PML4E", "PDPTE", "PDE"]
    code = report.section("code")
    assert code is not None
    (current,) = (line for line in code.data if line["current"])
    assert current["bytes"] == "488b18"


def test_the_page_is_as_the_documentation_shows_it() -> None:
    pytest.importorskip("capstone")
    text = (Path(__file__).parents[2] / "docs" / "crash-reports.md").read_text("utf-8")
    shown = re.search(r"```text\n(Triple fault: .*?)\n```", text, re.DOTALL)
    assert shown is not None
    guest = next(guest for guest in GUESTS if guest.name == "gate_with_bad_selector")
    with crashed(guest) as (_, _, report):
        page = str(report).splitlines()
    # What KVM remembers differs from host to host.
    lines = [line for line in shown[1].splitlines() if not line.startswith(("...", "The last exception"))]
    assert len(lines) > 30
    assert [line for line in lines if line not in page] == []
