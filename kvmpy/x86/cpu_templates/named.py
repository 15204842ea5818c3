"""The templates that have a name.

The levels are those of the x86-64 psABI ("Micro-Architecture Levels"). What a kernel needs of a processor besides
instructions for programs (paging, APIC, MSRs and so on) is in all of them.
"""

from __future__ import annotations

from kvmpy.x86.cpu_templates.template import CpuTemplate

__all__ = ["HOST", "PLAIN", "PORTABLE", "TEMPLATES"]

_SYSTEM = """
    fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca pat pse36 clflush ss ht x2apic tsc_deadline_timer
    hypervisor syscall nx lm lahf_lm cmp_legacy cr8_legacy topoext"""
_X86_64 = "cmov mmx fxsr sse sse2"
_X86_64_V2 = "cx16 popcnt sse3 ssse3 sse4_1 sse4_2"
_SPECULATION = """
    spec_ctrl intel_stibp flush_l1d arch_capabilities spec_ctrl_ssbd amd_ibpb amd_ibrs amd_stibp amd_ibrs_always_on
    amd_stibp_always_on amd_ibrs_preferred amd_ibrs_same_mode amd_ssbd virt_ssbd amd_ssb_no amd_psfd btc_no
    amd_ibpb_ret"""
"""What a guest needs to protect itself against speculative execution, on whatever processor it is."""

HOST = CpuTemplate("host")
"""All that the host and its KVM support."""

PORTABLE = CpuTemplate("portable", only=frozenset(f"{_SYSTEM} {_X86_64} {_X86_64_V2} {_SPECULATION} md_clear".split()))
"""No instructions beyond x86-64-v2, which every processor from 2009 on has. Vendor and model stay the host's."""

PLAIN = CpuTemplate("plain", only=frozenset(f"{_SYSTEM} {_X86_64} {_SPECULATION}".split()))
"""No instructions beyond x86-64: nothing that KVM's own emulator lacks where a kernel can do without.

The emulator runs ring 0 on hosts without VT-x and AMD-V. It knows no XSAVE, AVX, POPCNT, CMPXCHG16B, STAC, VERW and
RDTSCP, and takes LZCNT for BSR and TZCNT for BSF. ERMS and FSRM are off because it moves strings element by element.
Such hosts may show a guest more than its table has: `kvmpy doctor` says what.
"""

TEMPLATES = {template.name: template for template in (HOST, PORTABLE, PLAIN)}
"""By name."""
