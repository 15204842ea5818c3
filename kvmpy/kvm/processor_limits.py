"""What the CPUID of a vCPU lets its registers hold: for naming the rule when KVM refuses them (KVM_SET_SREGS)."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.x86.cpuid import CpuidTable
    from kvmpy.x86.entry_rules import ProcessorLimits

__all__ = ["limits_of"]

_CR4_NEEDS = {
    "UMIP": ("umip",), "LA57": ("la57",), "VMXE": ("vmx",), "FSGSBASE": ("fsgsbase",), "PCIDE": ("pcid",),
    "OSXSAVE": ("xsave",), "SMEP": ("smep",), "SMAP": ("smap",), "PKE": ("pku",), "CET": ("shstk", "ibt"),
    "LAM_SUP": ("lam",),
}  # fmt: skip
"""CR4 bits that need one of these features (Linux arch/x86/kvm/x86.h, __cr4_reserved_bits)."""

_EFER_NEEDS = {
    "SCE": ("syscall",), "LME": ("lm",), "LMA": ("lm",), "NXE": ("nx",), "SVME": ("svm",), "FFXSR": ("fxsr_opt",),
    "TCE": ("tce",),
}  # fmt: skip

_WIDTHS = 0x8000_0008
_PHYSICAL_BITS_BY_DEFAULT = 36  # KVM's guess for a guest without that leaf (Linux arch/x86/kvm/cpuid.c)


def limits_of(table: "CpuidTable") -> "ProcessorLimits":
    """The limits that KVM derives from the CPUID table of a vCPU; an empty table is one that was never set."""
    from kvmpy.x86.entry_rules import KVM_CR4, KVM_EFER, ProcessorLimits
    from kvmpy.x86.flags import Cr4, Efer

    cr4, efer = KVM_CR4, KVM_EFER
    for bit, features in _CR4_NEEDS.items():
        if not any(table.has(feature) for feature in features):
            cr4 &= ~int(Cr4[bit])
    for bit, features in _EFER_NEEDS.items():
        if not any(table.has(feature) for feature in features):
            efer &= ~int(Efer[bit])
    widths = table.find(_WIDTHS)
    return ProcessorLimits(
        physical_address_bits=widths.eax & 0xFF if widths is not None else _PHYSICAL_BITS_BY_DEFAULT,
        cr4=cr4,
        efer=efer,
        x2apic=table.has("x2apic"),
        long_mode=table.has("lm"),
        lam=table.has("lam"),
    )
