"""A device of our own that takes its time and then interrupts the guest.

You learn: a device with an `irq` gets an interrupt line from the machine. It raises the line when it has something,
from whatever thread, and lowers it when the guest has taken it. Meanwhile the guest sleeps.

Output::

    tick
    outcome: halted, 5 letters asked for
"""

import threading

from kvmpy import Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import DebugConsole, Device, Region


class SlowLetters(Device):
    """Write anything to ask for a letter; when it is there, the device interrupts; read it. 0 ends the text."""

    name = "slow letters"
    irq = 5

    def __init__(self, text: str) -> None:
        super().__init__()
        self.letters = [*text.encode(), 0]
        self.asked = 0
        self.letter = 0

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", 0x300, 1, self.name, self.read, self.write),)

    def write(self, offset: int, size: int, value: int) -> None:
        self.asked += 1
        threading.Timer(0.01, self.deliver).start()

    def deliver(self) -> None:
        self.letter = self.letters[self.asked - 1]
        self.line.raise_line()

    def read(self, offset: int, size: int) -> int:
        self.line.lower_line()
        return self.letter


CODE = bytes.fromhex(
    # 16-bit code for 0x1000
    "c7 06 94 00 22 10"  # mov word ptr [0x94], offset done  # the vector of IRQ 5 will be 0x25
    "b0 11            "  # mov al, 0x11            # set up the first PIC, as in timer_interrupt.py
    "e6 20            "  # out 0x20, al
    "b0 20            "  # mov al, 0x20
    "e6 21            "  # out 0x21, al
    "b0 04            "  # mov al, 4
    "e6 21            "  # out 0x21, al
    "b0 01            "  # mov al, 1
    "e6 21            "  # out 0x21, al
    "b0 df            "  # mov al, 0xdf            # let IRQ 5 through, nothing else
    "e6 21            "  # out 0x21, al
    "ba 00 03         "  # mov dx, 0x300
    "ee               "  # out dx, al              # ask the device for a letter
    "fb               "  # sti
    "f4               "  # sleep: hlt
    "eb fd            "  # jmp sleep
    "ec               "  # done: in al, dx         # take the letter; the device lowers its line
    "84 c0            "  # test al, al
    "74 08            "  # jz stop
    "e6 e9            "  # out 0xe9, al
    "b0 20            "  # mov al, 0x20            # end of interrupt
    "e6 20            "  # out 0x20, al
    "ee               "  # out dx, al              # ask for the next one
    "cf               "  # iret
    "f4               "  # stop: hlt               # with interrupts off: the end
)

with Machine(memory=0x10000) as machine:
    console = machine.add(DebugConsole())
    device = machine.add(SlowLetters("tick"))
    machine.load(FlatImage(CODE, address=0x1000, mode="real"))
    outcome = machine.run(timeout=10)
    print(console.text)
    print(f"outcome: {outcome.end}, {device.asked} letters asked for")
