"""The report as HTML that needs nothing else: for a notebook cell, and as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.debug.crash_report.text import heading

if TYPE_CHECKING:
    from kvmpy.debug.crash_report.findings import Finding
    from kvmpy.debug.crash_report.report import CrashReport
    from kvmpy.debug.crash_report.sections import Section

__all__ = ["fragment"]

_STYLE = """
.kvmpy-crash { font: 14px/1.45 system-ui, sans-serif; max-width: 72em; }
.kvmpy-crash pre { font: 12px/1.4 ui-monospace, monospace; margin: 0; padding: .5em; overflow-x: auto; }
.kvmpy-crash .sentence { font-size: 1.15em; font-weight: 600; margin: .2em 0; }
.kvmpy-crash .finding { border-left: 4px solid #888; padding: .2em .8em; margin: .8em 0; }
.kvmpy-crash .finding.cause { border-color: #c33; }
.kvmpy-crash .finding.contributes { border-color: #d80; }
.kvmpy-crash .finding p { margin: .2em 0; }
.kvmpy-crash code { font-family: ui-monospace, monospace; }
.kvmpy-crash summary { cursor: pointer; font-weight: 600; padding: .2em 0; }
.kvmpy-crash mark { background: #fd06; color: inherit; }
""".strip()

_OPEN = frozenset(("events", "code", "stack", "steps"))
"""Parts that are unfolded at first."""


def fragment(report: CrashReport) -> str:
    """A <div> with its style. ASCII only, so that it reads the same in any encoding."""
    parts = [
        f"<style>{_STYLE}</style>",
        f'<p class="sentence">{_escaped(report.summary)}</p>',
        f"<p>{_escaped(report.mode)}</p>",
    ]
    parts += (_finding(finding, heading(finding, number)) for number, finding in enumerate(report.findings))
    if not report.findings:
        parts.append("<p>No classic mistake was recognized.</p>")
    parts += (_section(section) for section in report.sections)
    if report.unavailable:
        rows = "".join(f"<li>{_escaped(what)}: {_escaped(why)}</li>" for what, why in report.unavailable.items())
        parts.append(f"<details><summary>Not available</summary><ul>{rows}</ul></details>")
    body = "\n".join(parts)
    text = f'<div class="kvmpy-crash">\n{body}\n</div>\n'
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _finding(finding: Finding, title: str) -> str:
    rule = f"<p><i>{_escaped(finding.rule)}</i> ({_escaped(finding.source)})</p>" if finding.rule else ""
    return (
        f'<div class="finding {finding.weight.name.lower()}">'
        f"<p><b>{_escaped(title)}: {_escaped(finding.title)}</b> "
        f"<code>{_escaped(finding.id)}</code></p>"
        f"<p>{_escaped(finding.text.rstrip('.'))}.</p>{rule}<p>{_escaped(finding.remedy)}</p></div>"
    )


def _section(section: Section) -> str:
    lines = "\n".join(
        f"<mark>{_escaped(line.text)}</mark>" if line.mark else _escaped(line.text) for line in section.lines
    )
    if section.unavailable:
        lines += f"\nnot available: {_escaped(section.unavailable)}"
    unfolded = " open" if section.name in _OPEN else ""
    return f"<details{unfolded}><summary>{_escaped(section.title)}</summary><pre>{lines}</pre></details>"


def _escaped(text: str) -> str:
    """Safe inside an element and an attribute; control characters, which HTML does not have, are shown as a box."""
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#39;")):
        text = text.replace(letter, entity)
    return "".join(letter if letter >= " " or letter in "\n\t" else "�" for letter in text)
