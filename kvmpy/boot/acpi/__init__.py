"""ACPI: the tables by which an operating system finds processors, devices, and the way to switch the machine off.

As the Advanced Configuration and Power Interface Specification 6.5 has them; section numbers are of that. `AcpiTables`
makes all of them for a `Platform`; the modules below make one table each.
"""

from __future__ import annotations

from kvmpy.boot.acpi.tables import AcpiTables

__all__ = ["AcpiTables"]
