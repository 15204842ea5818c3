"""The way to PCI configuration space, ports 0xCF8 to 0xCFF (PCI Local Bus Specification 3.0, 3.2.2.3.2)."""

from __future__ import annotations

from kvmpy.devices.device import Device, Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol
else:
    Protocol = object

__all__ = ["HostBridge", "PciFunction", "PciHostBridge"]

ADDRESS = 0  # port 0xCF8, only as 32 bits
RESET_CONTROL = 1  # port 0xCF9, only as a byte
DATA = 4  # port 0xCFC
ENABLE = 1 << 31
ADDRESS_BITS = 0x80FF_FFFC
SYSTEM_RESET = 1 << 1  # port 0xCF9 (Intel PIIX3): hard rather than soft
RESET_PROCESSOR = 1 << 2  # going from 0 to 1, it resets


class PciFunction(Protocol):
    """One function of a PCI device: 256 bytes of configuration space. An access stays inside one aligned dword."""

    def read_config(self, register: int, size: int) -> int: ...
    def write_config(self, register: int, size: int, value: int) -> None: ...
    def reset(self) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class HostBridge:
    """The Intel 440FX host bridge (82441FX data sheet) as far as firmware looks at it.

    The command register and the chip's own registers from 0x40 on keep what is written; they change nothing: all of
    guest memory is RAM whatever PAM (0x59 to 0x5F) says. The subsystem identity is the one by which SeaBIOS knows
    QEMU's machines; on others it asks neither CMOS nor fw_cfg for the memory size.
    """

    VENDOR, DEVICE = 0x8086, 0x1237
    SUBSYSTEM_VENDOR, SUBSYSTEM = 0x1AF4, 0x1100

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        config = bytearray(0x100)
        for register, value, size in (
            (0x00, self.VENDOR, 2),
            (0x02, self.DEVICE, 2),
            (0x04, 0x0006, 2),  # command: bus master and memory space, fixed to one
            (0x06, 0x0280, 2),  # status: medium DEVSEL timing, fast back-to-back
            (0x08, 0x02, 1),  # revision
            (0x0A, 0x0600, 2),  # class: bridge, host
            (0x2C, self.SUBSYSTEM_VENDOR, 2),
            (0x2E, self.SUBSYSTEM, 2),
        ):
            config[register : register + size] = value.to_bytes(size, "little")
        self._config = config

    def read_config(self, register: int, size: int) -> int:
        return int.from_bytes(self._config[register : register + size], "little")

    def write_config(self, register: int, size: int, value: int) -> None:
        for place, byte in enumerate(value.to_bytes(size, "little"), register):
            if place >= 0x40:
                self._config[place] = byte
            elif place == 0x05:
                self._config[place] = byte & 0x01  # SERR# enable

    def state(self) -> dict[str, Any]:
        return {"config": bytes(self._config)}

    def restore(self, state: dict[str, Any]) -> None:
        self._config = bytearray(state["config"])


class PciHostBridge(Device):
    """Ports 0xCF8 to 0xCFF with a 440FX at 00:00.0 and otherwise empty buses, which read all ones.

    `functions` maps (bus, device, function) to what is there: more may be put in. A byte at 0xCF9 is the reset control
    register of the PIIX3. `present=False`: the ports are claimed, but all reads are all ones and writes are lost, so
    that a guest finds no PCI (without the probing being counted as accesses that nobody answers).
    """

    name = "PCI host bridge"

    def __init__(self, *, present: bool = True) -> None:
        super().__init__()
        self.present = present
        self.functions: dict[tuple[int, int, int], PciFunction] = {}
        if present:
            self.functions[0, 0, 0] = HostBridge()
        self._address = 0
        self._reset_control = 0

    def regions(self) -> tuple[Region, ...]:
        return (Region("port", 0xCF8, 8, self.name, self.read, self.write, width=4),)

    def _selected(self) -> PciFunction | None:
        address = self._address
        if not address & ENABLE:
            return None
        return self.functions.get((address >> 16 & 0xFF, address >> 11 & 0x1F, address >> 8 & 0x07))

    def read(self, offset: int, size: int) -> int:
        if self.present:
            if offset == ADDRESS and size == 4:
                return self._address
            if offset == RESET_CONTROL and size == 1:
                return self._reset_control
            if offset >= DATA and offset + size <= DATA + 4:
                function = self._selected()
                if function is not None:
                    return function.read_config((self._address & 0xFC) + offset - DATA, size)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if not self.present:
            return
        if offset == ADDRESS and size == 4:
            self._address = value & ADDRESS_BITS
        elif offset == RESET_CONTROL and size == 1:
            rising = value & ~self._reset_control & RESET_PROCESSOR
            self._reset_control = value & (SYSTEM_RESET | RESET_PROCESSOR)
            if rising:
                self._reset_machine(value)
        elif offset >= DATA and offset + size <= DATA + 4:
            function = self._selected()
            if function is not None:
                function.write_config((self._address & 0xFC) + offset - DATA, size, value)

    def _reset_machine(self, value: int) -> None:
        if self.board is None:
            self.counters["reset_without_board"] += 1
        else:
            self.board.reset(f"{self.name}: write of {value:#x} to port 0xcf9")

    def reset(self) -> None:
        self._address = 0
        self._reset_control = 0
        for function in self.functions.values():
            function.reset()

    def state(self) -> dict[str, Any]:
        return {
            "address": self._address,
            "reset_control": self._reset_control,
            "functions": [[*place, function.state()] for place, function in sorted(self.functions.items())],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._address, self._reset_control = state["address"], state["reset_control"]
        for bus, device, function, its_state in state["functions"]:
            self.functions[bus, device, function].restore(its_state)
