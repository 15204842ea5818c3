"""The page of a trace, as a browser builds it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from headless_browser import Document, Page, colours, explore
from kvmpy.debug.trace.html_page import HtmlPage
from traced_machine import fake_machine, notes, records

HOSTILE = "</script><script>document.body.dataset.harmed = 1</script><!-- /*SCRIPTS*/ /*DATA*/"
LINES = (
    (None, 50_000, 50_000, 50_000, ("irq", "raise", 4), None),
    (None, 90_000, 90_000, 90_000, ("irq", "lower", 4), None),
)

FILTERS = {
    "uart16550": (400, {"uart16550"}),
    "out uart": (200, {"uart16550"}),
    "0x1f7|hpet": (600, {"nobody", "hpet"}),
    "-port": (400, {"hpet"}),
    "cpu:1": (600, {"uart16550", '100% "odd" <b>', "nobody", "hpet"}),
    "ata primary": (200, {"nobody"}),
    ">2us": (200, {"uart16550", '100% "odd" <b>', "nobody", "hpet"}),
    "no such thing": (0, {"nothing"}),
}
"""What is typed, how many events pass, and which devices are in the table: it counts all events of what passes."""


def page(*made: Any, kept: int = 100_000, title: str = "a machine") -> str:
    form, done = HtmlPage(title, kept), records(*made)
    text = form.begin()
    for start in range(0, len(done), 1024):
        text += form.batch(done[start : start + 1024])
    return text + form.last() + form.end()


def typing(text: str) -> str:
    return f"""{{
        const filter = document.getElementById("filter");
        filter.value = {json.dumps(text)};
        filter.dispatchEvent(new Event("input"));
    }}"""


def wheel(delta: int) -> str:
    """Turn the wheel over the middle of the timeline."""
    return f"""{{
        const canvas = document.getElementById("timeline"), place = canvas.getBoundingClientRect();
        for (let i = 0; i < 5; i++) canvas.dispatchEvent(new WheelEvent("wheel", {{
            deltaY: {delta}, clientX: place.left + 37 + place.width / 2, clientY: place.top + 40, bubbles: true,
            cancelable: true}}));
    }}"""


def clicking(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)}).click();"


# The event by itself comes with the next frame, whenever that is.
SCROLLING = """{
    const list = document.getElementById("list");
    list.scrollTop = 21 * 1190;
    list.dispatchEvent(new Event("scroll"));
}"""

STEPS = {
    "wheel out of the whole": wheel(400),
    "wheel into it": wheel(-400),
    **{text: typing(text) for text in FILTERS},
    "all again": typing(""),
    "scroll": SCROLLING,
    "slowest": clicking("#slowest tbody tr"),
    "by place": clicking("#places th"),
    "the other way": clicking("#places th"),
    "no ports": clicking("#kinds button"),
}

Documents = dict[tuple[str, str], Document]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    pages = {
        "usual": Page(page(*notes(1_200)), STEPS),
        "very many": Page(page(*notes(30_000), kept=1_000), {}),
        "100,000": Page(page(*notes(100_002)), {"hpet": typing("hpet")}),
        "empty": Page(page(), {}),
        "hostile": Page(page(*notes(12), title=HOSTILE), {}),
        "lines": Page(page(*notes(20, vcpus=3), *LINES), {}),
    }
    return explore(pages)


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_the_page_says_who_did_what_how_often(documents: Documents) -> None:
    document = documents["usual", ""]
    assert document.text("title") == "a machine"
    assert "events1,200processors2" in squeezed(document.text("facts"))
    heads, *devices = document.rows("devices")
    assert [head.split(" ")[0] for head in heads] == ["device", "events", "time", "share", "mean", "longest"]
    assert {device[0]: device[1] for device in devices} == {
        "uart16550": "400", '100% "odd" <b>': "200", "nobody": "200", "hpet": "400",
    }  # fmt: skip
    assert sum(float(device[3].removesuffix(" %")) for device in devices) == pytest.approx(100, abs=0.3)
    places = {row[0]: row[1:5] for row in document.rows("places")[1:]}
    assert places == {
        "0x3f8": ["uart16550", "", "200", "200"], "0x3fd": ["uart16550", "200", "", "200"],
        "0x70": ['100% "odd" <b>', "", "200", "200"], "0x1f7": ["nobody (ATA, primary channel)", "200", "", "200"],
        "0xfed000f0": ["hpet", "200", "200", "400"],
    }  # fmt: skip
    slowest = document.rows("slowest")[1:]
    assert len(slowest) == 100
    assert slowest[0][0] == "2.20 µs"
    assert squeezed(document.text("kinds")) == "port800mmio400"


def test_the_list_has_only_the_rows_in_view(documents: Documents) -> None:
    rows = documents["usual", ""].rows("events")
    assert 20 < len(rows) < 60
    assert rows[0][1:] == ["cpu0", "8.00 µs", "1.00 µs", "out 0x3f8", "0x00", "uart16550"]
    last = documents["usual", "scroll"].rows("events")[-1]
    assert last[4:] == ["write 0xfed000f0", f"0x{1199 & 0xFF:08x}", "hpet"]


@pytest.mark.parametrize("typed", FILTERS)
def test_the_filter_narrows_list_and_tables(documents: Documents, typed: str) -> None:
    document, (matching, devices) = documents["usual", typed], FILTERS[typed]
    assert document.text("matching") == f"{matching:,} of 1,200 events"
    assert {row[0] for row in document.rows("devices")[1:]} == devices
    if not matching:
        assert document.rows("events") == [["no event passes the filter"]]


def test_a_kind_can_be_switched_off(documents: Documents) -> None:
    document = documents["usual", "no ports"]
    assert document.text("matching") == "400 of 1,200 events"
    assert [row[0] for row in document.rows("places")[1:]] == ["0xfed000f0"]


def test_a_table_is_sorted_by_the_column_that_is_clicked(documents: Documents) -> None:
    ports = ["0x70", "0x1f7", "0x3f8", "0x3fd"]
    assert [row[0] for row in documents["usual", "by place"].rows("places")[1:]] == ["0xfed000f0", *ports]
    assert [row[0] for row in documents["usual", "the other way"].rows("places")[1:]] == [*ports[::-1], "0xfed000f0"]


def test_a_click_on_a_slow_handler_shows_it_in_the_list(documents: Documents) -> None:
    document = documents["usual", "slowest"]
    took, what, when, cpu = document.rows("slowest")[1]
    chosen = document.chosen("events")
    assert len(chosen) == 1
    time, vcpu, _, duration, name, *_ = chosen[0]
    assert (duration, f"{time} s", vcpu) == (took, when, f"cpu{cpu}")
    assert what.startswith(name)


def test_the_timeline_takes_the_wheel(documents: Documents) -> None:
    def view(step: str) -> tuple[int, int]:
        first, _, last, _ = (documents["usual", step].attributes["timeline"]["data-view"] or "").split()
        return int(first), int(last)

    first, last = view("wheel out of the whole")
    assert first == 0
    assert last > 5_000_000
    zoomed = view("wheel into it")
    assert zoomed[1] - zoomed[0] == pytest.approx(last * 1.0018 ** (-5 * 400), rel=0.02)
    assert sum(zoomed) / 2 == pytest.approx(last / 2, rel=0.02)


def test_of_very_many_events_the_first_and_the_last_are_listed_and_all_are_counted(documents: Documents) -> None:
    document = documents["very many", ""]
    assert document.text("kept") == "the first 500 and the last 500 of 30,000; the tables count all of them"
    assert sum(int(row[1].replace(",", "")) for row in document.rows("devices")[1:]) == 30_000


def test_a_page_of_100_000_events_works(documents: Documents) -> None:
    document = documents["100,000", "hpet"]
    assert document.text("matching") == "33,334 of 100,000 events"


def test_interrupt_lines_and_processors_have_lanes(documents: Documents) -> None:
    document = documents["lines", ""]
    assert document.attributes["timeline"]["style"] == f"height: {20 + 3 * (34 + 4) + 18 + 4}px;"
    assert next(row[1] for row in document.rows("places") if row[0] == "irq 4") == "uart16550"


def test_an_empty_trace_is_a_page_too(documents: Documents) -> None:
    assert documents["empty", ""].rows("events") == [["no event passes the filter"]]
    assert "events0" in squeezed(documents["empty", ""].text("facts"))


def test_names_are_text_and_nothing_else(documents: Documents) -> None:
    assert documents["hostile", ""].text("title") == HOSTILE
    assert "data-harmed" not in documents["hostile", ""].attributes["body"]


def test_the_timeline_is_painted_in_the_colours_of_guest_and_devices(tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    documents = explore({"small": Page(page(*notes(12)), {})}, picture)
    guest, most_busy, next_busy = "#dfe9df", "#2f6fde", "#e07b1a"
    assert {guest, most_busy, next_busy} <= colours(picture, rows=350)
    assert documents["small", ""].text("title") == "a machine"


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = page(*notes(1_200))
    assert not re.search(r"https?:|//[a-z]+\.|\bsrc=|\bhref=|@import|url\(|import\(|fetch\(|XMLHttp", text)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["count"] == 1_200


def test_a_machine_of_many_places_counts_the_later_ones_together(tmp_path: Path) -> None:
    made = [(0, at, at + 5, at + 9, ("mmio", "read", 0x1_0000_0000 + 4 * at, 4), 0) for at in range(10_000)]
    form = HtmlPage("a machine")
    form.batch(records(*made, machine=fake_machine()))
    data = json.loads(re.findall(r'id="data">(.*?)</script>', form.last(), re.DOTALL)[0])
    assert len(data["subjects"]) == 4097
    assert sum(subject["count"] for subject in data["subjects"]) == 10_000
