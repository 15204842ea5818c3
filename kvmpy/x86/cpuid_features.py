"""Names of CPUID feature bits (SDM vol. 2, CPUID; APM vol. 3, appendix E; KVM: Documentation/virt/kvm/x86/cpuid.rst).

Lower-case names as /proc/cpuinfo of Linux shows them, where it does. Bits that mean the same in leaf 1 and in AMD's
leaf 0x80000001 have a name only in leaf 1.
"""

from __future__ import annotations

from typing import Literal

from kvmpy._value import frozen
from kvmpy.errors import UsageError

__all__ = ["FEATURES", "Feature", "FeatureName", "Register", "feature", "feature_name"]

Register = Literal["eax", "ebx", "ecx", "edx"]


@frozen
class Feature:
    """One bit of a CPUID answer: leaf, subleaf, register and bit number (0 to 31; UsageError for others)."""

    function: int
    index: int
    register: Register
    bit: int

    def __post_init__(self) -> None:
        if self.register not in ("eax", "ebx", "ecx", "edx") or not 0 <= self.bit < 32:
            raise UsageError(f"bit {self.bit} of {self.register} is no bit of a CPUID answer")


# From bit 0 upwards; "-" is a bit without a name here.
_WORDS: dict[tuple[int, int, Register], str] = {
    (0x1, 0, "ecx"): """
        sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm
        - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor""",
    (0x1, 0, "edx"): """
        fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov
        pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe""",
    (0x7, 0, "ebx"): """
        fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a
        avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni
        avx512bw avx512vl""",
    (0x7, 0, "ecx"): """
        prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg
        tme avx512_vpopcntdq - la57 - - - - - rdpid key_locker bus_lock_detect cldemote - movdiri movdir64b enqcmd
        sgx_lc pks""",
    (0x7, 0, "edx"): """
        - sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort
        - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8
        spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd""",
    (0x7, 1, "eax"): """
        sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - -
        - fred lkgs wrmsrns nmi_source amx_fp16 hreset avx_ifma - - lam msrlist - - - movrs""",
    (0x7, 1, "edx"): """
        - - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchi -
        - uiret_uif cet_sss avx10 - apx_f""",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x4000_0001, 0, "eax"): """
        kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt
        - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int
        kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvmclock_stable""",
    (0x4000_0001, 0, "edx"): "kvm_hints_realtime",
    (0x8000_0001, 0, "ecx"): """
        lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp
        fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx""",
    (0x8000_0001, 0, "edx"): """
        - - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow""",
    (0x8000_0008, 0, "ebx"): """
        clzero irperf xsaveerptr invlpgb rdpru - mba - mcommit wbnoinvd - - amd_ibpb wbinvd_int amd_ibrs amd_stibp
        amd_ibrs_always_on amd_stibp_always_on amd_ibrs_preferred amd_ibrs_same_mode no_efer_lmsle invlpgb_nested -
        amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no amd_ibpb_ret brs""",
}

FEATURES: dict[str, Feature] = {
    name: Feature(function, index, register, bit)
    for (function, index, register), words in _WORDS.items()
    for bit, name in enumerate(words.split())
    if name != "-"
}
"""Every name and its bit."""

_NAMES = {place: name for name, place in FEATURES.items()}


FeatureName = str | Feature | tuple[int, int, Register, int]
"""How a feature may be given: by name, or by its bit."""


def feature(name: FeatureName) -> Feature:
    """The bit of a name, or of (function, index, register, bit) itself. Raises UsageError for others."""
    if isinstance(name, Feature):
        return name
    if not isinstance(name, str):
        return Feature(*name)
    try:
        return FEATURES[name.lower()]
    except KeyError:
        import difflib

        likely = difflib.get_close_matches(name.lower(), FEATURES, 3)
        advice = f"; like it: {', '.join(likely)}" if likely else ""
        raise UsageError(f"no CPUID feature is named {name!r}{advice}") from None


def feature_name(place: Feature) -> str | None:
    """The name of a bit, or None."""
    return _NAMES.get(place)
