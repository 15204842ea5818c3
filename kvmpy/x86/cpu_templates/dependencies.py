"""Which CPUID features need which, and which leaves go with them (SDM vol. 1, chapter 13 and 14; vol. 2, CPUID)."""

from __future__ import annotations

import functools

from kvmpy.x86.cpuid_features import FEATURES
from kvmpy.x86.cpuid_leaves import EAX, EBX, ECX, EDX, CpuidLeaves

__all__ = ["dependents", "has", "needs", "settle_extended_state", "settle_leaves"]

_NEEDED_BY = {
    "fxsr": "sse",
    "sse": "sse2",
    "sse2": "sse3 aes pclmulqdq sha_ni gfni",
    "sse3": "ssse3 sse4a",
    "ssse3": "sse4_1",
    "sse4_1": "sse4_2",
    "sse4_2": "avx",
    "mmx": "mmxext 3dnow",
    "3dnow": "3dnowext",
    "aes": "vaes",
    "pclmulqdq": "vpclmulqdq",
    "apic": "x2apic tsc_deadline_timer",
    "xsave": "avx xsaveopt xsavec xgetbv1 xfd pku mpx amx_tile apx_f",
    "xsavec": "xsaves",
    "xsaves": "shstk ibt",
    "avx": """
        avx2 fma f16c fma4 xop vaes vpclmulqdq avx_vnni avx_vnni_int8 avx_vnni_int16 avx_ne_convert avx_ifma
        sha512 sm3 sm4""",
    "avx2": "avx512f",
    "avx512f": """
        avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 avx512_vnni
        avx512_bitalg avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_vp2intersect avx512_bf16 avx512_fp16 avx10""",
    "amx_tile": "amx_bf16 amx_int8 amx_fp16 amx_complex",
}

_COMPONENTS = {
    2: ("avx",), 3: ("mpx",), 4: ("mpx",), 5: ("avx512f",), 6: ("avx512f",), 7: ("avx512f",), 8: ("intel_pt",),
    9: ("pku",), 10: ("enqcmd",), 11: ("shstk", "ibt"), 12: ("shstk", "ibt"), 14: ("uintr",), 15: ("arch_lbr",),
    17: ("amx_tile",), 18: ("amx_tile",), 19: ("apx_f",),
}  # fmt: skip
"""State components of XSAVE (SDM vol. 1, 13.1) and the features, one of which each belongs to."""

_LEGACY_AREA = 576
"""Bytes of an XSAVE area without components beyond x87 and SSE: 512 and a header of 64."""

_LEAVES = {
    0x5: "monitor", 0xF: "cqm", 0x10: "rdt_a", 0x12: "sgx", 0x14: "intel_pt", 0x19: "key_locker", 0x1C: "arch_lbr",
    0x1D: "amx_tile", 0x1E: "amx_tile", 0x24: "avx10", 0x8000_000A: "svm", 0x8000_001D: "topoext",
    0x8000_001E: "topoext",
}  # fmt: skip
"""Leaves that tell more of one feature."""


@functools.cache
def dependents(name: str) -> frozenset[str]:
    """All features that cannot be without this one."""
    found: set[str] = set()
    for each in _NEEDED_BY.get(name, "").split():
        found |= {each, *dependents(each)}
    return frozenset(found)


@functools.cache
def needs(name: str) -> frozenset[str]:
    """All features that this one cannot be without."""
    return frozenset(each for each in _NEEDED_BY if name in dependents(each))


def has(leaves: CpuidLeaves, name: str) -> bool:
    """Whether a feature is announced."""
    place = FEATURES[name]
    row = leaves.get(place.function, place.index)
    return row is not None and bool(row[("eax", "ebx", "ecx", "edx").index(place.register)] >> place.bit & 1)


def settle_extended_state(leaves: CpuidLeaves) -> None:
    """Make leaf 0xD agree with the features: no components of those that are gone (SDM vol. 1, 13.2).

    Without XSAVE, one empty answer to all of the leaf, and a highest leaf below it: kernels take XSAVE for absent then,
    even where KVM shows them its bit all the same.
    """
    if not has(leaves, "xsave"):
        leaves.drop(0xD)
        leaves.put(0xD, None, 0, 0, 0, 0)
        first = leaves.get(0)
        if first is not None:
            first[EAX] = min(first[EAX], 0xC)
        return
    gone = [n for n, names in _COMPONENTS.items() if not any(has(leaves, name) for name in names)]
    mask = ~sum(1 << component for component in gone)
    main, more = leaves.get(0xD, 0), leaves.get(0xD, 1)
    if main is None:
        return
    main[EAX] &= mask & 0xFFFF_FFFF
    size = _LEGACY_AREA
    for component, row in leaves.subleaves(0xD).items():
        if component in gone:
            row[:4] = 0, 0, 0, 0
        elif component > 1 and main[EAX] >> component & 1:
            size = max(size, row[EAX] + row[EBX])
    main[EBX] = main[ECX] = size  # EBX follows XCR0: KVM fills it in whenever the guest asks
    if more is not None:
        more[ECX] &= mask & 0xFFFF_FFFF


def settle_leaves(leaves: CpuidLeaves) -> None:
    """Drop the leaves that tell more of a feature that is gone, and leaf 7 when none of its features is left.

    There are KVMs that put all that the processor has into leaf 7, unless it is missing.
    """
    leaves.drop(*(leaf for leaf, name in _LEAVES.items() if not has(leaves, name)))
    if not any(row[EBX] or row[ECX] or row[EDX] or (row[EAX] and index) for index, row in leaves.subleaves(7).items()):
        leaves.drop(7)
