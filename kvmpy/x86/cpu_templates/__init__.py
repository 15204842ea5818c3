"""CPU templates: what a guest's processors shall be, as a value.

A template says how to make the CPUID of a guest from what a host's KVM supports, and which model-specific registers
begin with another value than KVM's. It knows no host and no machine: how many processors there are, what they share and
how fast their clocks are is the machine's own (`kvmpy.x86.cpuid_topology`, `kvmpy.x86.cpuid_platform`).

`TEMPLATES` are those that have a name: `host`, `portable`, `plain`. `cpu_template` takes a name or a dict::

    cpu_template({"base": "portable", "features": {"sse4_2": False}, "brand": "My processor"})

Templates compare, print, and are kept in JSON files: `save`, `load`.
"""

from kvmpy.x86.cpu_templates.named import HOST, PLAIN, PORTABLE, TEMPLATES
from kvmpy.x86.cpu_templates.plain_data import cpu_template, load, save, to_dict
from kvmpy.x86.cpu_templates.template import CpuTemplate

__all__ = ["HOST", "PLAIN", "PORTABLE", "TEMPLATES", "CpuTemplate", "cpu_template", "load", "save", "to_dict"]
