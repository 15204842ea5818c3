"""One processor starts another, and the two interrupt each other.

You learn: with two vCPUs the second waits until the guest itself starts it by INIT and a start-up IPI (SIPI), as on a
PC; each vCPU runs in a thread of its own; interrupts between processors (IPIs) go through their local APICs, which
live inside KVM.

Output::

    processor 0: INIT and start-up IPI to processor 1
    processor 1: awake; interrupt processor 0
    processor 0: interrupted; interrupt processor 1
    processor 1: interrupted; good night
    outcome: halted
"""

from kvmpy import Machine
from kvmpy.boot import FlatImage

MESSAGES = (
    "processor 0: INIT and start-up IPI to processor 1",
    "processor 1: awake; interrupt processor 0",
    "processor 0: interrupted; interrupt processor 1",
    "processor 1: interrupted; good night",
)
CODE = bytes.fromhex(
    # 16-bit code for 0x1000
    "ea 05 10 00 00   "  # jmp 0:start             # both come here: the first with CS = 0, the second with CS = 0x100
    "66 b9 1b 00 00 00"  # start: mov ecx, 0x1b    # IA32_APIC_BASE
    "0f 32            "  # rdmsr
    "0d 00 0c         "  # or ax, 0xc00            # x2APIC: the APIC's registers are MSRs now
    "0f 30            "  # wrmsr
    "89 c3            "  # mov bx, ax              # bit 8: this is the boot processor
    "66 b9 0f 08 00 00"  # mov ecx, 0x80f          # spurious interrupt vector register
    "66 b8 ff 01 00 00"  # mov eax, 0x1ff          # bit 8 switches the APIC on
    "66 31 d2         "  # xor edx, edx
    "0f 30            "  # wrmsr
    "66 b9 30 08 00 00"  # mov ecx, 0x830          # interrupt command register: EDX is to whom, EAX what
    "f6 c7 01         "  # test bh, 1
    "74 26            "  # jz second
    "c7 06 00 01 64 10"  # mov word ptr [0x100], offset answer  # vector 0x40
    "c7 06 04 01 6f 10"  # mov word ptr [0x104], offset goodbye  # vector 0x41
    "66 ba 01 00 00 00"  # mov edx, 1
    "66 b8 00 45 00 00"  # mov eax, 0x4500         # INIT
    "0f 30            "  # wrmsr
    "e6 10            "  # out 0x10, al
    "66 b8 01 46 00 00"  # mov eax, 0x4601         # start-up: begin at page 1, which is 0x1000
    "0f 30            "  # wrmsr
    "eb 0a            "  # jmp sleep
    "e6 11            "  # second: out 0x11, al
    "66 b8 40 00 00 00"  # mov eax, 0x40           # EDX is 0: interrupt processor 0 with vector 0x40
    "0f 30            "  # wrmsr
    "fb               "  # sleep: sti
    "f4               "  # hlt
    "eb fc            "  # jmp sleep
    "e6 12            "  # answer: out 0x12, al
    "66 b8 41 00 00 00"  # mov eax, 0x41           # EDX is 1: interrupt processor 1 with vector 0x41
    "0f 30            "  # wrmsr
    "f4               "  # hlt                     # interrupts are off in a handler: this one sleeps for good
    "e6 13            "  # goodbye: out 0x13, al
    "f4               "  # hlt                     # and so does this one: the run ends
)


def say(offset: int, size: int, value: int) -> None:
    print(MESSAGES[offset])


with Machine(memory=0x10000, vcpus=2) as machine:
    machine.map_ports(0x10, len(MESSAGES), write=say)
    machine.load(FlatImage(CODE, address=0x1000, mode="real"))
    outcome = machine.run(timeout=10)
    print(f"outcome: {outcome.end}")
