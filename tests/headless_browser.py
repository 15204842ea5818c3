"""A page as a browser builds it: headless Chromium, and what its scripts made of the document.

Without the browser tests skip, naming the Debian package (they fail under KVMPY_REQUIRE_KVM=1).
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tempfile
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from kvmpy.pytest_plugin.requirement import skip_or_fail

__all__ = ["Document", "Page", "colours", "explore"]

_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1100",
    "--virtual-time-budget=20000", "--run-all-compositor-stages-before-draw",
)  # fmt: skip


class Document(HTMLParser):
    """What is in the body, apart from scripts: `rows(id)` of a table, `text(id)` of any element, its `attributes`."""

    _EMPTY = frozenset(("br", "canvas", "col", "img", "input", "link", "meta"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self._open: list[tuple[str, str]] = []
        self._texts: dict[str, list[str]] = {}
        self._rows: dict[str, list[list[str]]] = {}
        self._chosen: dict[str, list[int]] = {}
        self.attributes: dict[str, dict[str, str | None]] = {}
        """By id, and those of the body as "body"."""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        id = named.get("id") or ""
        if id or tag == "body":
            self.attributes[id or tag] = named
        if tag not in self._EMPTY:
            self._open.append((tag, id))
        for table in self._ids("table"):
            if tag == "tr":
                self._rows.setdefault(table, []).append([])
                if named.get("class") == "chosen":
                    self._chosen.setdefault(table, []).append(len(self._rows[table]) - 1)
            if tag in ("td", "th"):
                self._rows[table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if any(tag in ("script", "style") for tag, _ in self._open):
            return
        for _, id in self._open:
            if id:
                self._texts.setdefault(id, []).append(data)
        for table in self._ids("table"):
            if any(tag in ("td", "th") for tag, _ in self._open):
                self._rows[table][-1][-1] += data

    def _ids(self, tag: str) -> list[str]:
        return [id for name, id in self._open if name == tag and id]

    def rows(self, table: str) -> list[list[str]]:
        """The texts of the cells of a table, row by row, its head first."""
        return [[cell.strip() for cell in row] for row in self._rows.get(table, [])]

    def chosen(self, table: str) -> list[list[str]]:
        """Those of the class "chosen"."""
        return [self.rows(table)[row] for row in self._chosen.get(table, [])]

    def text(self, id: str) -> str:
        """All text in an element."""
        return "".join(self._texts.get(id, [])).strip()


class Page(NamedTuple):
    """A page and what is to be done with it: scripts by name, one after the other, each on what the last has left."""

    html: str
    steps: dict[str, str]


def explore(pages: dict[str, Page], screenshot: Path | None = None) -> dict[tuple[str, str], Document]:
    """Open pages in one browser; the documents by page and step, with "" for the page as it was opened.

    `screenshot` is where a picture of the last page goes, as it is in the end.
    """
    work = [{"name": name, "html": page.html, "steps": page.steps} for name, page in pages.items()]
    with tempfile.TemporaryDirectory(prefix="kvmpy-browser-", ignore_cleanup_errors=True) as folder:
        harness = Path(folder) / "harness.html"
        harness.write_text(_HARNESS.replace("WORK", json.dumps(work).replace("<", "\\u003c")), "utf-8")
        command = [_browser(), *_OPTIONS, f"--user-data-dir={folder}/profile", "--dump-dom", harness.as_uri()]
        if screenshot is not None:
            command.insert(-1, f"--screenshot={screenshot}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(Document(done.stdout).text("results") or "null")
    assert results is not None, "the browser ended before it was done"
    return {(name, step): Document(html) for name, step, html in results}


_HARNESS = """<!DOCTYPE html><meta charset="utf-8">
<body style="margin: 0"><pre id="results" hidden></pre><script>
const results = [], pause = () => new Promise(done => setTimeout(done, 150));
async function explore(work) {
  for (const {name, html, steps} of work) {
    document.querySelector("iframe")?.remove();
    const frame = document.createElement("iframe");
    frame.style.cssText = "border: 0; width: 1400px; height: 1100px;";
    frame.srcdoc = html;
    await new Promise(done => { frame.onload = done; document.body.append(frame); });
    for (const [step, script] of Object.entries({"": "", ...steps})) {
      await frame.contentWindow.eval(script);  // which may be a promise
      await pause();
      const copy = frame.contentDocument.documentElement.cloneNode(true);
      for (const element of copy.querySelectorAll("script, style")) element.remove();
      results.push([name, step, copy.outerHTML]);
    }
  }
  document.getElementById("results").textContent = JSON.stringify(results);
}
explore(WORK);
</script></body>"""


@functools.cache
def _browser() -> str:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return path or skip_or_fail("needs headless Chromium (Debian package chromium)")


def colours(picture: Path, rows: int) -> set[str]:
    """The colours in the first rows of a PNG of 8 bits a channel, as "#rrggbb" (PNG specification, chapters 7, 9)."""
    data, at, packed = picture.read_bytes(), 8, b""
    width = height = channels = 0
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        content = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height = int.from_bytes(content[:4]), int.from_bytes(content[4:8])
            channels = {2: 3, 6: 4}[content[9]]
        elif kind == b"IDAT":
            packed += content
        at += 12 + length
    lines, stride = zlib.decompress(packed), width * channels
    found: set[bytes] = set()
    above = bytearray(stride)
    for row in range(min(rows, height)):
        start = row * (stride + 1)
        line = _unfiltered(lines[start], lines[start + 1 : start + 1 + stride], above, channels)
        found.update({bytes(line[x : x + 3]) for x in range(0, stride, channels)})
        above = line
    return {f"#{colour.hex()}" for colour in found}


def _unfiltered(method: int, line: bytes, above: bytearray, channels: int) -> bytearray:
    plain = bytearray(line)
    for x in range(len(plain)):
        left = plain[x - channels] if x >= channels else 0
        up, corner = above[x], above[x - channels] if x >= channels else 0
        if method == 1:
            plain[x] = plain[x] + left & 0xFF
        elif method == 2:
            plain[x] = plain[x] + up & 0xFF
        elif method == 3:
            plain[x] = plain[x] + (left + up) // 2 & 0xFF
        elif method == 4:
            nearest = min((left, up, corner), key=lambda value: abs(left + up - corner - value))
            plain[x] = plain[x] + nearest & 0xFF
    return plain
