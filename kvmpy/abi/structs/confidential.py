# ruff: noqa: N801  these classes carry the kernel's names
"""Commands for guests with encrypted memory: AMD SEV and SEV-SNP, Intel TDX (KVM_MEMORY_ENCRYPT_OP, 4.110).

`kvm_sev_cmd.data` and `kvm_tdx_cmd.data` hold the address of the struct that belongs to the command. The documents are
virt/kvm/x86/amd-memory-encryption.rst and virt/kvm/x86/intel-tdx.rst. `..._uaddr` fields are addresses of the caller's
memory, `..._len` fields bytes.
"""

from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

from kvmpy.abi.structs import Structure
from kvmpy.abi.structs.cpuid_msr import kvm_cpuid2, kvm_cpuid_entry2

__all__ = [
    "kvm_sev_attestation_report",
    "kvm_sev_cmd",
    "kvm_sev_dbg",
    "kvm_sev_guest_status",
    "kvm_sev_init",
    "kvm_sev_launch_measure",
    "kvm_sev_launch_secret",
    "kvm_sev_launch_start",
    "kvm_sev_launch_update_data",
    "kvm_sev_receive_start",
    "kvm_sev_receive_update_data",
    "kvm_sev_send_start",
    "kvm_sev_send_update_data",
    "kvm_sev_snp_launch_finish",
    "kvm_sev_snp_launch_start",
    "kvm_sev_snp_launch_update",
    "kvm_tdx_capabilities",
    "kvm_tdx_cmd",
    "kvm_tdx_init_mem_region",
    "kvm_tdx_init_vm",
]


class kvm_sev_cmd(Structure):
    """The command `id` (KVM_SEV_*) for the firmware behind `sev_fd`; `error` is the firmware's answer."""

    _fields_ = [
        ("id", c_uint32),
        ("pad0", c_uint32),
        ("data", c_uint64),
        ("error", c_uint32),
        ("sev_fd", c_uint32),
    ]


class kvm_sev_init(Structure):
    """KVM_SEV_INIT2."""

    _fields_ = [
        ("vmsa_features", c_uint64),
        ("flags", c_uint32),
        ("ghcb_version", c_uint16),
        ("pad1", c_uint16),
        ("pad2", c_uint32 * 8),
    ]


class kvm_sev_launch_start(Structure):
    """KVM_SEV_LAUNCH_START."""

    _fields_ = [
        ("handle", c_uint32),
        ("policy", c_uint32),
        ("dh_uaddr", c_uint64),
        ("dh_len", c_uint32),
        ("pad0", c_uint32),
        ("session_uaddr", c_uint64),
        ("session_len", c_uint32),
        ("pad1", c_uint32),
    ]


class kvm_sev_launch_update_data(Structure):
    """KVM_SEV_LAUNCH_UPDATE_DATA: encrypts a range in place."""

    _fields_ = [("uaddr", c_uint64), ("len", c_uint32), ("pad0", c_uint32)]


class kvm_sev_launch_secret(Structure):
    """KVM_SEV_LAUNCH_SECRET: puts a secret into the guest after its measurement."""

    _fields_ = [
        ("hdr_uaddr", c_uint64),
        ("hdr_len", c_uint32),
        ("pad0", c_uint32),
        ("guest_uaddr", c_uint64),
        ("guest_len", c_uint32),
        ("pad1", c_uint32),
        ("trans_uaddr", c_uint64),
        ("trans_len", c_uint32),
        ("pad2", c_uint32),
    ]


class kvm_sev_launch_measure(Structure):
    """KVM_SEV_LAUNCH_MEASURE."""

    _fields_ = [("uaddr", c_uint64), ("len", c_uint32), ("pad0", c_uint32)]


class kvm_sev_guest_status(Structure):
    """KVM_SEV_GUEST_STATUS."""

    _fields_ = [("handle", c_uint32), ("policy", c_uint32), ("state", c_uint32)]


class kvm_sev_dbg(Structure):
    """KVM_SEV_DBG_DECRYPT and KVM_SEV_DBG_ENCRYPT."""

    _fields_ = [("src_uaddr", c_uint64), ("dst_uaddr", c_uint64), ("len", c_uint32), ("pad0", c_uint32)]


class kvm_sev_attestation_report(Structure):
    """KVM_SEV_GET_ATTESTATION_REPORT."""

    _fields_ = [("mnonce", c_uint8 * 16), ("uaddr", c_uint64), ("len", c_uint32), ("pad0", c_uint32)]


class kvm_sev_send_start(Structure):
    """KVM_SEV_SEND_START."""

    _fields_ = [
        ("policy", c_uint32),
        ("pad0", c_uint32),
        ("pdh_cert_uaddr", c_uint64),
        ("pdh_cert_len", c_uint32),
        ("pad1", c_uint32),
        ("plat_certs_uaddr", c_uint64),
        ("plat_certs_len", c_uint32),
        ("pad2", c_uint32),
        ("amd_certs_uaddr", c_uint64),
        ("amd_certs_len", c_uint32),
        ("pad3", c_uint32),
        ("session_uaddr", c_uint64),
        ("session_len", c_uint32),
        ("pad4", c_uint32),
    ]


class kvm_sev_send_update_data(Structure):
    """KVM_SEV_SEND_UPDATE_DATA."""

    _fields_ = [
        ("hdr_uaddr", c_uint64),
        ("hdr_len", c_uint32),
        ("pad0", c_uint32),
        ("guest_uaddr", c_uint64),
        ("guest_len", c_uint32),
        ("pad1", c_uint32),
        ("trans_uaddr", c_uint64),
        ("trans_len", c_uint32),
        ("pad2", c_uint32),
    ]


class kvm_sev_receive_start(Structure):
    """KVM_SEV_RECEIVE_START."""

    _fields_ = [
        ("handle", c_uint32),
        ("policy", c_uint32),
        ("pdh_uaddr", c_uint64),
        ("pdh_len", c_uint32),
        ("pad0", c_uint32),
        ("session_uaddr", c_uint64),
        ("session_len", c_uint32),
        ("pad1", c_uint32),
    ]


class kvm_sev_receive_update_data(Structure):
    """KVM_SEV_RECEIVE_UPDATE_DATA."""

    _fields_ = [
        ("hdr_uaddr", c_uint64),
        ("hdr_len", c_uint32),
        ("pad0", c_uint32),
        ("guest_uaddr", c_uint64),
        ("guest_len", c_uint32),
        ("pad1", c_uint32),
        ("trans_uaddr", c_uint64),
        ("trans_len", c_uint32),
        ("pad2", c_uint32),
    ]


class kvm_sev_snp_launch_start(Structure):
    """KVM_SEV_SNP_LAUNCH_START."""

    _fields_ = [
        ("policy", c_uint64),
        ("gosvw", c_uint8 * 16),
        ("flags", c_uint16),
        ("pad0", c_uint8 * 6),
        ("pad1", c_uint64 * 4),
    ]


class kvm_sev_snp_launch_update(Structure):
    """KVM_SEV_SNP_LAUNCH_UPDATE; `type` is KVM_SEV_SNP_PAGE_TYPE_*."""

    _fields_ = [
        ("gfn_start", c_uint64),
        ("uaddr", c_uint64),
        ("len", c_uint64),
        ("type", c_uint8),
        ("pad0", c_uint8),
        ("flags", c_uint16),
        ("pad1", c_uint32),
        ("pad2", c_uint64 * 4),
    ]


class kvm_sev_snp_launch_finish(Structure):
    """KVM_SEV_SNP_LAUNCH_FINISH."""

    _fields_ = [
        ("id_block_uaddr", c_uint64),
        ("id_auth_uaddr", c_uint64),
        ("id_block_en", c_uint8),
        ("auth_key_en", c_uint8),
        ("vcek_disabled", c_uint8),
        ("host_data", c_uint8 * 32),
        ("pad0", c_uint8 * 3),
        ("flags", c_uint16),
        ("pad1", c_uint64 * 4),
    ]


class kvm_tdx_cmd(Structure):
    """The command `id` (KVM_TDX_*); `hw_error` is the TDX module's answer."""

    _fields_ = [("id", c_uint32), ("flags", c_uint32), ("data", c_uint64), ("hw_error", c_uint64)]


class kvm_tdx_capabilities(Structure):
    """KVM_TDX_CAPABILITIES: what a TD may have; `cpuid.nent` leaves follow in `cpuid_entries`."""

    _fields_ = [
        ("supported_attrs", c_uint64),
        ("supported_xfam", c_uint64),
        ("kernel_tdvmcallinfo_1_r11", c_uint64),
        ("user_tdvmcallinfo_1_r11", c_uint64),
        ("kernel_tdvmcallinfo_1_r12", c_uint64),
        ("user_tdvmcallinfo_1_r12", c_uint64),
        ("reserved", c_uint64 * 250),
        ("cpuid", kvm_cpuid2),
    ]
    _flexible_ = ("cpuid_entries", kvm_cpuid_entry2)


class kvm_tdx_init_vm(Structure):
    """KVM_TDX_INIT_VM: what this TD has, SHA-384 digests included; `cpuid.nent` leaves follow in `cpuid_entries`."""

    _fields_ = [
        ("attributes", c_uint64),
        ("xfam", c_uint64),
        ("mrconfigid", c_uint64 * 6),
        ("mrowner", c_uint64 * 6),
        ("mrownerconfig", c_uint64 * 6),
        ("reserved", c_uint64 * 12),
        ("cpuid", kvm_cpuid2),
    ]
    _flexible_ = ("cpuid_entries", kvm_cpuid_entry2)


class kvm_tdx_init_mem_region(Structure):
    """KVM_TDX_INIT_MEM_REGION: copies pages into the TD before it runs."""

    _fields_ = [("source_addr", c_uint64), ("gpa", c_uint64), ("nr_pages", c_uint64)]
