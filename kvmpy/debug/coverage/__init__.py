"""Which code of a guest was executed: `Machine.coverage`, lines and blocks of it, and files for other tools.

`Coverage` takes it while the guest runs, by single steps or by one-shot breakpoints. What it gives is `CoveredCode`,
which can be merged with that of other runs and written as lcov's tracefile or DynamoRIO's drcov.
"""

from __future__ import annotations

from kvmpy.debug.coverage.basic_blocks import BasicBlock
from kvmpy.debug.coverage.coverage import Coverage
from kvmpy.debug.coverage.covered_code import CoverageFormat, CoveredCode, Module, coverage_format
from kvmpy.debug.coverage.program import basic_blocks

__all__ = ["BasicBlock", "Coverage", "CoverageFormat", "CoveredCode", "Module", "basic_blocks", "coverage_format"]
