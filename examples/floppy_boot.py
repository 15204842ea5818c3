"""A boot sector, booted from a floppy by a PC's firmware, whose services it uses.

You learn: what a BIOS does for a boot sector. SeaBIOS (Debian package seabios) finds the floppy in fw_cfg, loads the
first sector and jumps to it. That one reads the second sector by INT 13h, prints it by INT 10h, and waits for a key by
INT 16h. There is no graphics card, so SeaBIOS sends what INT 10h prints to the serial port.

Output::

    Booting from Floppy...
    Hello from the second sector! Press a key:
    outcome: exited with code 195: debug exit at port 0xf4, value 0x61; the key was a
"""

import sys
from pathlib import Path

from kvmpy import Machine, MiB
from kvmpy.boot import FirmwareImage
from kvmpy.devices import I8042, Cmos, DebugExit, FwCfg, PciHostBridge, Uart16550

SEABIOS = Path("/usr/share/seabios/bios.bin")

BOOT_SECTOR = bytes.fromhex(
    # 16-bit code for 0x7c00
    "31 c0   "  # xor ax, ax
    "8e d8   "  # mov ds, ax
    "8e c0   "  # mov es, ax
    "b8 01 02"  # mov ax, 0x201            # read one sector,
    "b9 02 00"  # mov cx, 2                # the second of track 0,
    "b6 00   "  # mov dh, 0                # side 0,
    "bb 00 7e"  # mov bx, 0x7e00           # to es:bx
    "cd 13   "  # int 0x13                 # dl, the drive, is as SeaBIOS left it
    "72 14   "  # jc stop
    "be 00 7e"  # mov si, 0x7e00
    "ac      "  # print: lodsb
    "84 c0   "  # test al, al
    "74 06   "  # jz key
    "b4 0e   "  # mov ah, 0x0e             # print the character in al
    "cd 10   "  # int 0x10
    "eb f5   "  # jmp print
    "b4 00   "  # key: mov ah, 0           # wait for a key; its character comes in al
    "cd 16   "  # int 0x16
    "e6 f4   "  # out 0xf4, al
    "f4      "  # stop: hlt
)
TEXT = b"Hello from the second sector! Press a key:"
floppy = BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa" + TEXT + b"\0"

if not SEABIOS.exists():
    sys.exit("This example needs SeaBIOS: apt-get install seabios")

with Machine(memory=16 * MiB) as machine:
    serial = machine.add(Uart16550())
    keyboard = machine.add(I8042())
    machine.add(Cmos(memory_below_4g=16 * MiB))
    machine.add(PciHostBridge())  # by this SeaBIOS knows what machine it is in
    machine.add(DebugExit())
    fw_cfg = machine.add(FwCfg(ram_size=16 * MiB, memory=machine.memory))
    fw_cfg.add_floppy(floppy)
    machine.load(FirmwareImage(SEABIOS))
    machine.start(timeout=35)
    serial.expect(TEXT, timeout=30)
    keyboard.press(b"\x1e\x9e")  # the scan codes of A pressed and released
    outcome = machine.wait()
    print("\n".join(serial.text.splitlines()[1:]))  # the first line is SeaBIOS's version
    print(f"outcome: {outcome}; the key was {chr((outcome.code or 0) >> 1)}")
