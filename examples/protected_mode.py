"""A guest leaves real mode by itself and reads memory that real mode cannot reach.

You learn: protected mode needs a table of segments (GDT), one bit in CR0 and a far jump; the host prepares the table
with `kvmpy.x86` and looks at the result through the live registers. (No interrupts here: they need an IDT, too.)

Output::

    before: CR0.PE = 0, CS = 0x0
    the guest writes 0xdeadbeef
    after:  CR0.PE = 1, CS = 0x8, limit 0xffffffff
"""

import struct

from kvmpy import Hlt, IoOut, Kvm, MiB
from kvmpy.x86.descriptors import Gdt
from kvmpy.x86.flags import Cr0

CODE = bytes.fromhex(
    # 16-bit code for 0x1000
    "0f 01 16 00 11   "  # lgdt [0x1100]           # GDTR: where the table of segments is
    "0f 20 c0         "  # mov eax, cr0
    "0c 01            "  # or al, 1                # CR0.PE: protection enable
    "0f 22 c0         "  # mov cr0, eax
    "ea 12 10 08 00   "  # jmp 0x08:main           # loads CS: 32-bit code from here on
    # .code32
    "b8 10 00 00 00   "  # main: mov eax, 0x10
    "8e d8            "  # mov ds, eax             # flat 4 GiB of data
    "a1 00 00 20 00   "  # mov eax, [0x200000]     # real mode ends at 1 MiB
    "03 05 04 00 20 00"  # add eax, [0x200004]
    "ba 80 00 00 00   "  # mov edx, 0x80
    "ef               "  # out dx, eax             # 32 bits at once
    "f4               "  # hlt
)

gdt = Gdt()
gdt.append("code32")  # selector 0x08
gdt.append("data32")  # selector 0x10

with Kvm() as kvm, kvm.create_vm() as vm:
    vm.add_ram(0, size=4 * MiB)
    vm.memory.write(0x1000, CODE)
    vm.memory.write(0x1100, struct.pack("<HI", len(gdt) - 1, 0x2000))  # what LGDT loads: limit and address
    vm.memory.write(0x2000, gdt.to_bytes())
    vm.memory.write_u32(0x200000, 0xDEAD0000)
    vm.memory.write_u32(0x200004, 0x0000BEEF)
    vcpu = vm.create_vcpu()
    vcpu.set_real_mode(entry=0x1000)

    print(f"before: CR0.PE = {vcpu.sregs.cr0 & Cr0.PE:d}, CS = {vcpu.sregs.cs.selector:#x}")
    for event in vcpu.exits():
        match event:
            case IoOut(port=0x80, value=value):
                print(f"the guest writes {value:#x}")
            case Hlt():
                break
            case _:
                raise SystemExit(f"unexpected: {event}")
    cs = vcpu.sregs.cs
    print(f"after:  CR0.PE = {vcpu.sregs.cr0 & Cr0.PE:d}, CS = {cs.selector:#x}, limit {cs.limit:#x}")
