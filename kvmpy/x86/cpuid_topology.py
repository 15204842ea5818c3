"""What CPUID says about the processors of one machine: how many they are, what they share, and which one is asked.

The machine is one package of `count` cores of one thread each; core n has the APIC id n. Each has its first- and
second-level caches for itself, and all share what is above. KVM_GET_SUPPORTED_CPUID tells of the host's processors
instead (KVM API, section 4.46), and a kernel that believed it would group the machine's wrongly.

Sources: SDM vol. 2, CPUID, leaves 1, 4, 0xB, 0x1F, and vol. 3, "Detecting Hardware Multi-Threading Support and
Topology"; APM vol. 3, appendix E, functions 1, 0xB, 0x80000001, 0x80000008, 0x8000001D, 0x8000001E, 0x80000026.
"""

from kvmpy.x86.cpuid_leaves import EAX, EBX, ECX, EDX, CpuidLeaves

__all__ = ["describe_processors", "stamp_apic_id"]

_HTT = 1 << 28
_CMP_LEGACY = 1 << 1
_TOPOLOGY_EXTENSIONS = 1 << 22
_SMT_LEVEL, _CORE_LEVEL = 1, 2
_INTEL_CACHES, _AMD_CACHES = 0x4, 0x8000_001D
_EXTENDED_TOPOLOGY = (0xB, 0x1F)
_AMD_EXTENDED_TOPOLOGY = 0x8000_0026


def describe_processors(leaves: CpuidLeaves, count: int) -> None:
    """Tell of `count` processors, and of what they share. `stamp_apic_id` says for each which one it is."""
    amd = leaves.of_amd
    bits = (count - 1).bit_length()
    ids = 1 << bits
    """Intel counts ids that are set aside, a power of two; AMD counts processors."""
    first = leaves.get(1)
    if first is not None:
        first[EBX] = first[EBX] & 0x0000_FFFF | min(count if amd else ids, 0xFF) << 16
        first[EDX] = first[EDX] | _HTT if count > 1 else first[EDX] & ~_HTT
    if amd:
        _describe_to_amd(leaves, count, bits)
    else:
        for row in leaves.subleaves(_INTEL_CACHES).values():
            _share_cache(row, ids - 1)
            if row[EAX]:
                row[EAX] = row[EAX] & 0x03FF_FFFF | min(ids - 1, 0x3F) << 26
    for leaf in _EXTENDED_TOPOLOGY:
        leaves.drop(leaf)
        if leaves.highest(0) >= leaf:
            # EAX: how many bits of the id tell apart what is below the next level. EBX: the processors at this one.
            leaves.put(leaf, 0, 0, 1, _SMT_LEVEL << 8, 0)
            leaves.put(leaf, 1, bits, count, _CORE_LEVEL << 8 | 1, 0)
            leaves.put(leaf, 2, 0, 0, 2, 0)
    leaves.drop(_AMD_EXTENDED_TOPOLOGY)  # all zero says that it is not there, and that 0xB counts


def _describe_to_amd(leaves: CpuidLeaves, count: int, bits: int) -> None:
    extended = leaves.get(0x8000_0001)
    if extended is not None:
        extended[ECX] = extended[ECX] | _CMP_LEGACY if count > 1 else extended[ECX] & ~_CMP_LEGACY
    sizes = leaves.get(0x8000_0008)
    if sizes is not None:
        sizes[ECX] = sizes[ECX] & 0xFFFF_0F00 | min(bits, 0xF) << 12 | min(count - 1, 0xFF)
    for row in leaves.subleaves(_AMD_CACHES).values():
        _share_cache(row, count - 1)
    leaves.drop(0x8000_001E)
    if extended is not None and extended[ECX] & _TOPOLOGY_EXTENSIONS and leaves.highest(0x8000_0000) >= 0x8000_001E:
        leaves.put(0x8000_001E, None, 0, 0, 0, 0)


def _share_cache(row: list[int], others: int) -> None:
    """EAX of a cache: its type in bits 4:0 (0: there is none), its level in 7:5, who shares it in 25:14."""
    eax = row[EAX]
    if eax & 0x1F:
        shared = others if eax >> 5 & 7 > 2 else 0
        row[EAX] = eax & ~(0xFFF << 14) | min(shared, 0xFFF) << 14


def stamp_apic_id(leaves: CpuidLeaves, apic_id: int) -> None:
    """Say that the processor with this APIC id is the one that is asked."""
    first = leaves.get(1)
    if first is not None:
        first[EBX] = first[EBX] & 0x00FF_FFFF | (apic_id & 0xFF) << 24
    for leaf in _EXTENDED_TOPOLOGY:
        for row in leaves.subleaves(leaf).values():
            row[EDX] = apic_id
    core = leaves.get(0x8000_001E)
    if core is not None:
        core[EAX], core[EBX] = apic_id, core[EBX] & ~0xFF | apic_id & 0xFF
