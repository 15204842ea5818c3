"""A guest in real mode prints a line, one port write after the other.

You learn: a VM is memory and a vCPU; `vcpu.exits()` runs the guest until it does something that only the host can do,
here writing to a port (`IoOut`), and at last HLT. In between, the guest runs by itself.

Output::

    Hello from real mode!
    The guest left 23 times: IoOut 22, Hlt 1; it stopped at 0x100f.
"""

from collections import Counter

from kvmpy import Hlt, IoOut, Kvm

CODE = bytes.fromhex(
    # 16-bit code for 0x1000
    "be 00 11"  # mov si, 0x1100
    "ac      "  # next: lodsb             # AL = the byte at SI, and SI moves on
    "84 c0   "  # test al, al
    "74 06   "  # jz end
    "ba f8 03"  # mov dx, 0x3f8           # the first serial port
    "ee      "  # out dx, al              # leaves the guest: Python goes on
    "eb f5   "  # jmp next
    "f4      "  # end: hlt                # leaves the guest, too
)
TEXT = b"Hello from real mode!\n\0"

with Kvm() as kvm, kvm.create_vm() as vm:
    vm.add_ram(0x1000, size=0x1000)
    vm.memory.write(0x1000, CODE)
    vm.memory.write(0x1100, TEXT)
    vcpu = vm.create_vcpu()
    vcpu.set_real_mode(entry=0x1000)

    reasons: Counter[str] = Counter()
    for event in vcpu.exits():
        reasons[type(event).__name__] += 1
        match event:
            case IoOut(port=0x3F8, data=data):
                print(data.decode(), end="")
            case Hlt():
                break
            case _:
                raise SystemExit(f"unexpected: {event}")

    counts = ", ".join(f"{name} {count}" for name, count in reasons.items())
    print(f"The guest left {reasons.total()} times: {counts}; it stopped at {vcpu.regs.rip:#x}.")
