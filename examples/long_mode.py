"""A guest in 64-bit mode, in an address space that we lay out page by page.

You learn: long mode always has page tables. `PageTables` writes them into guest memory, `set_long_mode(cr3=...)` starts
the vCPU on them, and the guest's addresses have nothing to do with where its bytes lie.

Output::

    Hello from long mode!
    The guest runs at 0xffffffff8000001b, which is physical 0x20001b.
    0x12345000 is physical 0x3000.
    Address 0 is not mapped.
    The page tables take 0x6000 bytes.
"""

from kvmpy import Hlt, IoOut, Kvm, MiB
from kvmpy.x86.page_tables import PageTables
from kvmpy.x86.paging import PagingMode

CODE_AT = 0xFFFF_FFFF_8000_0000  # where kernels live: the last 2 GiB of the address space
TEXT_AT = 0x1234_5000
CODE = bytes.fromhex(
    # 64-bit code for 0xffffffff80000000
    "48 c7 c6 00 50 34 12"  # mov rsi, 0x12345000     # the text: another page, read only
    "ba f8 03 00 00      "  # mov edx, 0x3f8
    "ac                  "  # next: lodsb
    "84 c0               "  # test al, al
    "74 03               "  # jz end
    "ee                  "  # out dx, al
    "eb f8               "  # jmp next
    "48 8d 05 00 00 00 00"  # end: lea rax, [rip]     # where this code thinks it is
    "f4                  "  # hlt
)

with Kvm() as kvm, kvm.create_vm() as vm:
    vm.add_ram(0, size=4 * MiB)
    vm.memory.write(0x200000, CODE)
    vm.memory.write(0x3000, b"Hello from long mode!\n\0")
    pages = PageTables(vm.memory, PagingMode.LEVEL4, 0x10000)
    pages.map(CODE_AT, 0x200000, 2 * MiB, writable=False)  # one page of 2 MiB
    pages.map(TEXT_AT, 0x3000, 0x1000, writable=False, no_execute=True)  # one of 4 KiB

    vcpu = vm.create_vcpu()
    vcpu.set_long_mode(entry=CODE_AT, cr3=pages.cr3)
    for event in vcpu.exits():
        match event:
            case IoOut(port=0x3F8, data=data):
                print(data.decode(), end="")
            case Hlt():
                break
            case _:
                raise SystemExit(f"unexpected: {event}")

    rip = vcpu.regs.rax
    print(f"The guest runs at {rip:#x}, which is physical {vcpu.translate(rip).physical_address:#x}.")
    print(f"{TEXT_AT:#x} is physical {vcpu.translate(TEXT_AT).physical_address:#x}.")
    print(f"Address 0 is {'mapped' if vcpu.translate(0).valid else 'not mapped'}.")
    print(f"The page tables take {pages.end - pages.base:#x} bytes.")
