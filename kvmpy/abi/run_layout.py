"""Offsets in bytes into struct kvm_run, for code that reads it through memoryviews (KVM API, section 5).

Plain numbers, without ctypes: every exit passes here. `kvmpy.abi.structs.run` holds the same layout as classes, and a
test compares the two with each other and with the C compiler. A name is the path of the field in the kernel's struct;
a comment gives the width where it is not clear from the next offset.
"""

REQUEST_INTERRUPT_WINDOW = 0  # u8, in
IMMEDIATE_EXIT = 1  # u8, in
EXIT_REASON = 8  # u32
READY_FOR_INTERRUPT_INJECTION = 12  # u8
IF_FLAG = 13  # u8
FLAGS = 14  # u16
CR8 = 16  # u64, in and out
APIC_BASE = 24  # u64, in and out

EXIT = 32  # the union, 256 bytes
EXIT_SIZE = 256

HW_HARDWARE_EXIT_REASON = 32  # u64
FAIL_ENTRY_HARDWARE_ENTRY_FAILURE_REASON = 32  # u64
FAIL_ENTRY_CPU = 40  # u32
EX_EXCEPTION = 32  # u32
EX_ERROR_CODE = 36  # u32

IO_DIRECTION = 32  # u8
IO_SIZE = 33  # u8, bytes of one element
IO_PORT = 34  # u16
IO_COUNT = 36  # u32, elements
IO_DATA_OFFSET = 40  # u64, from the start of kvm_run

DEBUG_ARCH_EXCEPTION = 32  # u32
DEBUG_ARCH_PC = 40  # u64
DEBUG_ARCH_DR6 = 48  # u64
DEBUG_ARCH_DR7 = 56  # u64

MMIO_PHYS_ADDR = 32  # u64
MMIO_DATA = 40  # 8 bytes
MMIO_LEN = 48  # u32
MMIO_IS_WRITE = 52  # u8

HYPERCALL_NR = 32  # u64
HYPERCALL_ARGS = 40  # 6 x u64
HYPERCALL_RET = 88  # u64
HYPERCALL_LONGMODE = 96  # u32
HYPERCALL_FLAGS = 96  # u64, the same place

TPR_ACCESS_RIP = 32  # u64
TPR_ACCESS_IS_WRITE = 40  # u32

INTERNAL_SUBERROR = 32  # u32
INTERNAL_NDATA = 36  # u32
INTERNAL_DATA = 40  # 16 x u64
EMULATION_FAILURE_FLAGS = 40  # u64
EMULATION_FAILURE_INSN_SIZE = 48  # u8
EMULATION_FAILURE_INSN_BYTES = 49  # 15 bytes

SYSTEM_EVENT_TYPE = 32  # u32
SYSTEM_EVENT_NDATA = 36  # u32
SYSTEM_EVENT_FLAGS = 40  # u64
SYSTEM_EVENT_DATA = 40  # 16 x u64, the same place

EOI_VECTOR = 32  # u8

MSR_ERROR = 32  # u8, in
MSR_REASON = 40  # u32
MSR_INDEX = 44  # u32
MSR_DATA = 48  # u64

NOTIFY_FLAGS = 32  # u32

MEMORY_FAULT_FLAGS = 32  # u64
MEMORY_FAULT_GPA = 40  # u64
MEMORY_FAULT_SIZE = 48  # u64

HYPERV_TYPE = 32  # u32
HYPERV_U = 40  # by type
XEN_TYPE = 32  # u32
XEN_U = 40  # by type
TDX_FLAGS = 32  # u64
TDX_NR = 40  # u64
TDX_UNKNOWN = 48  # and the other members of its union, by nr

KVM_VALID_REGS = 288  # u64, in
KVM_DIRTY_REGS = 296  # u64, in

S_REGS = 304  # struct kvm_sync_regs, 520 bytes of 2048
S_REGS_REGS = 304  # struct kvm_regs, 144 bytes
S_REGS_SREGS = 448  # struct kvm_sregs, 312 bytes
S_REGS_EVENTS = 760  # struct kvm_vcpu_events, 64 bytes

SIZE = 2352  # of the struct; what is mapped is longer, KVM_GET_VCPU_MMAP_SIZE
