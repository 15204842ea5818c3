"""A program in ring 3 touches memory that is not there; the handler in ring 0 maps it, and the program goes on.

You learn: exceptions go through the IDT to ring 0, on the stack that the TSS names; CR2 and the error code say what
happened; IRETQ tries the instruction again. This is how every operating system gives memory to its programs. In the
end the program tries HLT, which ring 3 may not: a general protection fault.

Output::

    page fault at 0x200000, error code 0x4 (U)
    the program read 42
    general protection fault, error code 0x0
"""

from kvmpy import Hlt, IoOut, Kvm, MiB
from kvmpy.x86.gates import Gate, Idt
from kvmpy.x86.long_mode import prepare
from kvmpy.x86.paging import PageFault

PROGRAM = bytes.fromhex(
    # 64-bit code for 0x10000
    "be 00 00 20 00"  # mov esi, 0x200000
    "8b 06         "  # mov eax, [rsi]          # page fault: nothing is mapped there
    "ba 80 00 00 00"  # mov edx, 0x80
    "ef            "  # out dx, eax             # the handler has mapped a page: the read went well
    "f4            "  # hlt                     # general protection fault: HLT is for ring 0
)
PAGE_FAULT = bytes.fromhex(
    # 64-bit code for 0x18000
    "50                                 "  # page_fault: push rax
    "48 8b 44 24 08                     "  # mov rax, [rsp + 8]      # what the processor pushed: the error code
    "e7 ea                              "  # out 0xea, eax
    "0f 20 d0                           "  # mov rax, cr2            # and where it put the address
    "e7 e9                              "  # out 0xe9, eax
    "48 c7 04 25 08 60 02 00 87 00 20 00"  # mov qword ptr [0x26008], 0x200087  # map it: 2 MiB, for all
    "58                                 "  # pop rax
    "48 83 c4 08                        "  # add rsp, 8              # drop the error code
    "48 cf                              "  # iretq                   # the instruction is tried again
)
GENERAL_PROTECTION = bytes.fromhex(
    # 64-bit code for 0x19000
    "58   "  # general_protection: pop rax
    "e7 eb"  # out 0xeb, eax           # the error code
    "f4   "  # hlt
)

idt = Idt()
idt[13] = Gate("interrupt", 0x19000)
idt[14] = Gate("interrupt", 0x18000)

with Kvm() as kvm, kvm.create_vm() as vm:
    vm.add_ram(0, size=4 * MiB)
    for address, part in ((0x10000, PROGRAM), (0x18000, PAGE_FAULT), (0x19000, GENERAL_PROTECTION)):
        vm.memory.write(address, part)
    vm.memory.write_u32(0x200000, 42)
    vcpu = vm.create_vcpu()
    # GDT, TSS (with an I/O bitmap: ring 3 may use ports), IDT, and page tables for the first 2 MiB only.
    vcpu.set_cpu_state(prepare(vm.memory, entry=0x10000, tables=0x20000, ring=3, idt=idt, identity_map=2 * MiB))

    error = PageFault(0)
    for event in vcpu.exits():
        match event:
            case IoOut(port=0xEA, value=code):
                error = PageFault(code)
            case IoOut(port=0xE9, value=address):
                print(f"page fault at {address:#x}, error code {error:#x} ({error.name})")
            case IoOut(port=0x80, value=value):
                print(f"the program read {value}")
            case IoOut(port=0xEB, value=code):
                print(f"general protection fault, error code {code:#x}")
            case Hlt():
                break
            case _:
                raise SystemExit(f"unexpected: {event}")
