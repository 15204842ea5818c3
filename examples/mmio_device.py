"""A device in 20 lines: the guest writes bytes to one register and reads their checksum from another.

You learn: a `Device` says which addresses it claims and answers `read` and `write`; `Machine` runs the guest and calls
them. `state` and `restore` make it fit for snapshots.

Output::

    the guest read 0xcbf43926
    9 bytes written, outcome: halted
"""

import zlib

from kvmpy import Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import Device, Region


class Checksum(Device):
    """Write a byte at offset 0; read the CRC-32 of all bytes so far at offset 4."""

    name = "checksum"

    def __init__(self, address: int) -> None:
        super().__init__()
        self.address = address
        self.crc = 0

    def regions(self) -> tuple[Region, ...]:
        return (Region("mmio", self.address, 8, self.name, self.read, self.write),)

    def read(self, offset: int, size: int) -> int:
        return self.crc if (offset, size) == (4, 4) else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self.crc = zlib.crc32(value.to_bytes(size, "little"), self.crc)

    def state(self) -> dict[str, int]:
        return {"crc": self.crc}

    def restore(self, state: dict[str, int]) -> None:
        self.crc = state["crc"]


CODE = bytes.fromhex(
    # 32-bit code for 0x1000
    "be 00 20 00 00"  # mov esi, 0x2000         # the text
    "bf 00 00 00 d0"  # mov edi, 0xd0000000     # the device
    "ac            "  # next: lodsb
    "84 c0         "  # test al, al
    "74 04         "  # jz done
    "88 07         "  # mov [edi], al           # register 0: one more byte
    "eb f7         "  # jmp next
    "8b 47 04      "  # done: mov eax, [edi + 4]  # register 4: the checksum
    "f4            "  # hlt
)

with Machine(memory=0x10000, irqchip=False) as machine:
    machine.add(Checksum(0xD0000000))
    machine.memory.write(0x2000, b"123456789\0")
    machine.load(FlatImage(CODE, address=0x1000, mode="protected"))
    outcome = machine.run(timeout=10)
    print(f"the guest read {machine.vcpus[0].regs.rax:#x}")
    written = machine.statistics().count("mmio", 0xD0000000, "write")
    print(f"{written} bytes written, outcome: {outcome.end}")
