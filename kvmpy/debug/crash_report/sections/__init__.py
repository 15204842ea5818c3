"""The parts of the page, in order."""

from __future__ import annotations

from kvmpy.debug.crash_report.case import Case
from kvmpy.debug.crash_report.sections.addresses import PAGES, STACK
from kvmpy.debug.crash_report.sections.code import CODE, STEPS, instruction_text
from kvmpy.debug.crash_report.sections.events import EVENTS
from kvmpy.debug.crash_report.sections.machine import CONSOLES, DEVICES, EXITS, MEMORY, STATISTICS
from kvmpy.debug.crash_report.sections.registers import REGISTERS
from kvmpy.debug.crash_report.sections.section import Line, Section, SectionBuilder, build
from kvmpy.debug.crash_report.sections.tables import TABLES

__all__ = ["BUILDERS", "Line", "Section", "build_sections", "instruction_text"]

BUILDERS: tuple[SectionBuilder, ...] = (
    EVENTS,
    CODE,
    STEPS,
    REGISTERS,
    STACK,
    PAGES,
    TABLES,
    EXITS,
    DEVICES,
    CONSOLES,
    MEMORY,
    STATISTICS,
)


def build_sections(case: Case) -> tuple[Section, ...]:
    """All parts that have something to say."""
    return tuple(section for builder in BUILDERS if (section := build(builder, case)) is not None)
