"""QEMU's firmware configuration device: named pieces of data that the machine offers to its firmware.

Source: QEMU, docs/specs/fw_cfg ("QEMU Firmware Configuration (fw_cfg) Device").
"""

from __future__ import annotations

import struct

from kvmpy.devices.device import Device, Region
from kvmpy.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, Protocol
else:
    Protocol = object

__all__ = ["FLOPPY_SIZES", "DmaControl", "FwCfg", "GuestMemory", "Key"]

DATA = 1  # port 0x511
DMA_HIGH = 4  # port 0x514: the address of the DMA descriptor, big endian
DMA_LOW = 8  # port 0x518: a write starts the transfer
DMA_SIGNATURE = b"QEMU CFG"

WRITE_CHANNEL = 0x4000
ARCH_LOCAL = 0x8000
FILE_FIRST = 0x20
FILE_LIMIT = 0x1000
NAME_LENGTH = 56  # with the closing NUL
CHUNK = 1 << 20

KIB = 1024
FLOPPY_SIZES = tuple(size * KIB for size in (160, 180, 320, 360, 720, 1200, 1440, 2880))
"""The floppy formats that SeaBIOS knows, by their bytes: it tells sides, tracks and sectors from the size alone."""
USUAL_FLOPPY = 1440 * KIB


class Key:
    """The items with a number of their own."""

    SIGNATURE = 0x00
    ID = 0x01
    UUID = 0x02
    RAM_SIZE = 0x03
    NOGRAPHIC = 0x04
    NB_CPUS = 0x05
    NUMA = 0x0D
    BOOT_MENU = 0x0E
    MAX_CPUS = 0x0F
    FILE_DIR = 0x19


class DmaControl:
    """The lower half of a DMA descriptor's first field; with SELECT, the upper half is the key."""

    ERROR = 1 << 0
    READ = 1 << 1
    SKIP = 1 << 2
    SELECT = 1 << 3
    WRITE = 1 << 4


class GuestMemory(Protocol):
    """What DMA needs: both raise ValueError (such as GuestMemoryError) outside guest RAM."""

    def read(self, address: int, length: int, /) -> bytes: ...
    def guest_write(self, address: int, data: bytes, /) -> object: ...


class FwCfg(Device):
    """Selector at port 0x510 (16 bits), data at 0x511, and with `memory` the DMA interface at 0x514.

    `cpus`, `ram_size` (bytes), `boot_menu`, `boot_order` (device paths) and `e820` (address, length, type) fill the
    items that SeaBIOS reads; `add_file` and `add_item` add more, `add_floppy` and `add_video_bios` files that SeaBIOS
    knows. The machine says that it has no graphics, whereupon SeaBIOS copies all that is printed by INT 10h to COM1,
    and what comes from there to INT 16h. The guest cannot write items: the DMA write sets the error bit. What a guest
    gets wrong with DMA is counted as `dma_error`.
    """

    name = "fw_cfg"

    def __init__(
        self,
        port: int = 0x510,
        *,
        cpus: int = 1,
        ram_size: int = 0,
        e820: Iterable[tuple[int, int, int]] = (),
        boot_order: Iterable[str] = (),
        boot_menu: bool = False,
        memory: GuestMemory | None = None,
    ) -> None:
        super().__init__()
        self.port = port
        self._memory = memory
        self._items: dict[int, bytes] = {}
        self._files: list[str] = []
        self._deferred: list[Callable[[], object]] = []
        self._power_on()
        self.add_item(Key.SIGNATURE, b"QEMU")
        self.add_item(Key.ID, struct.pack("<I", 1 | (memory is not None) << 1))  # bit 0: ports, bit 1: DMA
        self.add_item(Key.UUID, bytes(16))
        self.add_item(Key.RAM_SIZE, struct.pack("<Q", ram_size))
        self.add_item(Key.NOGRAPHIC, struct.pack("<H", 1))
        self.add_item(Key.NB_CPUS, struct.pack("<H", cpus))
        self.add_item(Key.MAX_CPUS, struct.pack("<H", cpus))
        self.add_item(Key.NUMA, bytes(8))
        self.add_item(Key.BOOT_MENU, struct.pack("<H", boot_menu))
        self._list_files()
        map_entries = b"".join(struct.pack("<QQI", *entry) for entry in e820)
        if map_entries:
            self.add_file("etc/e820", map_entries)
        paths = "\n".join(boot_order)
        if paths:
            self.add_file("bootorder", paths.encode() + b"\0")

    def add_item(self, key: int, data: bytes) -> None:
        """Set the item with number `key` (0 to 0xFFFF, without bit 14, which is the write flag)."""
        if not 0 <= key <= 0xFFFF or key & WRITE_CHANNEL:
            raise ValueError(f"{key:#x} is no fw_cfg key")
        self._items[int(key)] = bytes(data)

    def add_file(self, name: str, data: bytes) -> int:
        """Set the file `name` (1 to 55 ASCII characters), and return its key, which the directory lists."""
        encoded = name.encode("ascii")
        if not 0 < len(encoded) < NAME_LENGTH or b"\0" in encoded:
            raise ValueError(f"a fw_cfg file name has 1 to {NAME_LENGTH - 1} characters and no NUL: {name!r}")
        if name not in self._files:
            if len(self._files) >= FILE_LIMIT:
                raise ValueError(f"fw_cfg holds at most {FILE_LIMIT} files")
            self._files.append(name)
        key = FILE_FIRST + self._files.index(name)
        self.add_item(key, data)
        self._list_files()
        return key

    def add_floppy(self, image: bytes, name: str = "floppy.img") -> int:
        """Put a disk into SeaBIOS's drive A, from which it boots; answers the key of the file.

        SeaBIOS copies it into the guest's RAM, where INT 13h reads and writes it: `image` does not change. One that has
        none of FLOPPY_SIZES is filled up with zeros to 1440 KiB (18 sectors a track, 2 sides, 80 tracks) or, if it is
        larger, 2880 KiB. Raises UsageError for an empty image and for more than that.
        """
        size, largest = len(image), FLOPPY_SIZES[-1]
        if not 0 < size <= largest:
            raise UsageError(f"a floppy image has 1 to {largest} bytes (2880 KiB), not {size}")
        if size not in FLOPPY_SIZES:
            image = bytes(image).ljust(USUAL_FLOPPY if size <= USUAL_FLOPPY else largest, b"\0")
        return self.add_file(f"floppyimg/{name}", image)

    def add_video_bios(self, rom: bytes, name: str = "vgabios.bin") -> int:
        """A ROM that SeaBIOS starts for INT 10h, such as its own vgabios-isavga.bin; answers the key of the file.

        With it the text screen at 0xB8000 holds what INT 10h prints.
        """
        return self.add_file(f"vgaroms/{name}", rom)

    def add_smbios(self, entry_point: bytes, structures: bytes) -> None:
        """SMBIOS structures that SeaBIOS hands on; without them it makes its own, which takes it longer."""
        self.add_file("etc/smbios/smbios-anchor", entry_point)
        self.add_file("etc/smbios/smbios-tables", structures)

    def defer(self, add: Callable[[], object]) -> None:
        """Have `add()`, which adds files, called when somebody first asks for any: the guest, `files` or `state`.

        So what takes long to make does not hold up the start of a guest, nor is it made for one that never asks.
        """
        self._deferred.append(add)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files, in the order of their keys."""
        self._add_deferred()
        return tuple(self._files)

    def _add_deferred(self) -> None:
        while self._deferred:
            self._deferred[0]()  # one that raises will be called again
            del self._deferred[0]

    def _list_files(self) -> None:
        """The directory: big endian, unlike everything else."""
        entries = [
            struct.pack(f">IHH{NAME_LENGTH}s", len(self._items[key]), key, 0, name.encode())
            for key, name in enumerate(self._files, FILE_FIRST)
        ]
        self.add_item(Key.FILE_DIR, struct.pack(">I", len(entries)) + b"".join(entries))

    def regions(self) -> tuple[Region, ...]:
        ports = Region("port", self.port, 2, self.name, self.read, self.write, width=2)
        if self._memory is None:
            return (ports,)
        dma = Region("port", self.port + 4, 8, f"{self.name} DMA", self.read, self.write, base=DMA_HIGH, width=4)
        return (ports, dma)

    # --- the guest's side -------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == DATA:
            value = 0
            for place in range(size):  # the spec has bytes only; a wider access takes the next ones, lowest first
                value |= int.from_bytes(self._take(1), "little") << 8 * place
            return value
        if self._memory is not None and offset >= DMA_HIGH and offset + size <= DMA_HIGH + 8:
            return int.from_bytes(DMA_SIGNATURE[offset - DMA_HIGH :][:size], "little")
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 2:
            self._select(value)
        elif self._memory is not None and size == 4 and offset in (DMA_HIGH, DMA_LOW):
            half = int.from_bytes(value.to_bytes(4, "little"), "big")
            if offset == DMA_HIGH:
                self._dma_high = half
            else:
                address, self._dma_high = self._dma_high << 32 | half, 0
                self._transfer(self._memory, address)
        else:  # data cannot be written since QEMU 2.4, and the selector only as a whole
            self.counters["ignored_write"] += 1

    def _select(self, key: int) -> None:
        self._key = key & ~WRITE_CHANNEL & 0xFFFF
        self._offset = 0
        if self._deferred and self._key >= Key.FILE_DIR:
            self._add_deferred()

    def _take(self, length: int) -> bytes:
        """The next bytes of the selected item; zeros after its end, or if there is none."""
        data = self._items.get(self._key, b"")[self._offset : self._offset + length]
        self._offset = min(self._offset + length, 0xFFFF_FFFF)
        return data.ljust(length, b"\0")

    def _transfer(self, memory: GuestMemory, address: int) -> None:
        """Do what the descriptor at `address` says (be32 control, be32 length, be64 address), and clear its control."""
        try:
            control, length, target = struct.unpack(">IIQ", memory.read(address, 16))
        except ValueError:
            self.counters["dma_error"] += 1
            return
        if control & DmaControl.SELECT:
            self._select(control >> 16)
        failed = False
        if control & DmaControl.READ:
            try:
                while length:
                    # What is beyond the item is zeros for 4 GiB if the guest likes: never build them in one piece.
                    chunk = min(length, CHUNK)
                    memory.guest_write(target, self._take(chunk))
                    target += chunk
                    length -= chunk
            except ValueError:
                failed = True
        elif control & DmaControl.WRITE:
            failed = True
        elif control & DmaControl.SKIP:
            self._offset = min(self._offset + length, 0xFFFF_FFFF)
        if failed:
            self.counters["dma_error"] += 1
        try:
            memory.guest_write(address, struct.pack(">I", DmaControl.ERROR if failed else 0))
        except ValueError:
            self.counters["dma_error"] += 1

    # --- life -------------------------------------------------------------------------------------------------------

    def _power_on(self) -> None:
        self._key = 0
        self._offset = 0
        self._dma_high = 0

    def reset(self) -> None:
        self._power_on()

    def state(self) -> dict[str, Any]:
        """Selection, place in the item, half-written DMA address, and the items themselves."""
        self._add_deferred()
        return {
            "key": self._key, "offset": self._offset, "dma_high": self._dma_high,
            "items": sorted(self._items.items()), "files": list(self._files),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self._key, self._offset, self._dma_high = state["key"], state["offset"], state["dma_high"]
        self._items, self._files = dict(state["items"]), list(state["files"])
        self._deferred.clear()
