"""A guest sets up the interrupt controller and the timer, sleeps, and is woken five times.

You learn: `Machine` has a PC's PICs and timer inside KVM, so that port 0x20 and 0x40 need no exit and HLT sleeps in the
kernel. In real mode the handlers' addresses are a table at 0. When HLT comes with interrupts off, nothing can wake the
processor any more, and the run ends.

Output::

    .....
    outcome: halted
"""

from kvmpy import Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import DebugConsole

CODE = bytes.fromhex(
    # 16-bit code for 0x1000
    "c7 06 80 00 2e 10"  # mov word ptr [0x80], offset tick  # the vector of IRQ 0 will be 0x20
    "b0 11            "  # mov al, 0x11            # set up the first PIC: ICW1, edges, ICW4 follows
    "e6 20            "  # out 0x20, al
    "b0 20            "  # mov al, 0x20            # ICW2: its IRQ 0 is vector 0x20
    "e6 21            "  # out 0x21, al
    "b0 04            "  # mov al, 4               # ICW3: the second PIC is at input 2
    "e6 21            "  # out 0x21, al
    "b0 01            "  # mov al, 1               # ICW4: 8086 mode
    "e6 21            "  # out 0x21, al
    "b0 fe            "  # mov al, 0xfe            # let IRQ 0 through, nothing else
    "e6 21            "  # out 0x21, al
    "b0 34            "  # mov al, 0x34            # PIT: channel 0, both bytes, rate generator
    "e6 43            "  # out 0x43, al
    "b8 9c 2e         "  # mov ax, 11932           # 1193182 Hz / 11932 = 100 Hz
    "e6 40            "  # out 0x40, al
    "88 e0            "  # mov al, ah
    "e6 40            "  # out 0x40, al
    "b9 05 00         "  # mov cx, 5
    "fb               "  # sti
    "f4               "  # sleep: hlt              # sleeps inside KVM until an interrupt comes
    "eb fd            "  # jmp sleep
    "b0 2e            "  # tick: mov al, 0x2e      # a dot
    "e6 e9            "  # out 0xe9, al
    "49               "  # dec cx
    "74 05            "  # jz stop
    "b0 20            "  # mov al, 0x20            # end of interrupt
    "e6 20            "  # out 0x20, al
    "cf               "  # iret
    "f4               "  # stop: hlt               # interrupts are off in a handler: nothing can wake us
)

with Machine(memory=0x10000) as machine:
    console = machine.add(DebugConsole())  # port 0xE9
    machine.load(FlatImage(CODE, address=0x1000, mode="real"))
    outcome = machine.run(timeout=10)
    print(console.text)
    print(f"outcome: {outcome.end}")
