"""PCI configuration mechanism #1, with a host bridge and an empty bus behind it."""

from __future__ import annotations

from typing import Any

import pytest

from device_board import RecordingBoard
from kvmpy.devices.pci_host import PciHostBridge

ADDRESS, RESET_CONTROL, DATA = 0, 1, 4
ENABLE = 0x8000_0000


def select(device: PciHostBridge, bus: int, slot: int, function: int, register: int) -> None:
    device.write(ADDRESS, 4, ENABLE | bus << 16 | slot << 11 | function << 8 | register)


def test_address_register_reads_back_without_its_reserved_bits() -> None:
    device = PciHostBridge()
    device.write(ADDRESS, 4, 0xFFFF_FFFF)
    assert device.read(ADDRESS, 4) == 0x80FF_FFFC
    device.write(ADDRESS, 4, ENABLE)
    assert device.read(ADDRESS, 4) == ENABLE


@pytest.mark.parametrize("size", [1, 2])
def test_narrow_access_is_not_to_the_address_register(size: int) -> None:
    device = PciHostBridge()
    device.write(ADDRESS, 4, ENABLE)
    device.write(ADDRESS, size, 0x40)
    assert device.read(ADDRESS, 4) == ENABLE
    assert device.read(ADDRESS, size) == (1 << 8 * size) - 1


def test_host_bridge_identity_in_every_width() -> None:
    device = PciHostBridge()
    select(device, 0, 0, 0, 0x00)
    assert device.read(DATA, 4) == 0x1237_8086
    assert device.read(DATA, 2) == 0x8086
    assert device.read(DATA + 2, 2) == 0x1237
    assert [device.read(DATA + place, 1) for place in range(4)] == [0x86, 0x80, 0x37, 0x12]
    select(device, 0, 0, 0, 0x08)
    assert device.read(DATA, 4) >> 16 == 0x0600


def test_host_bridge_identity_cannot_be_written() -> None:
    device = PciHostBridge()
    for register in range(0, 0x40, 4):
        select(device, 0, 0, 0, register)
        before = device.read(DATA, 4)
        if register != 0x04:
            device.write(DATA, 4, 0xFFFF_FFFF)
            assert device.read(DATA, 4) == before


def test_host_bridge_keeps_its_own_registers() -> None:
    device = PciHostBridge()
    select(device, 0, 0, 0, 0x58)
    device.write(DATA + 1, 1, 0x30)
    assert device.read(DATA, 4) == 0x0000_3000


@pytest.mark.parametrize(("bus", "slot", "function"), [(0, 0, 1), (0, 1, 0), (0, 31, 7), (1, 0, 0), (255, 0, 0)])
def test_empty_places_read_all_ones(bus: int, slot: int, function: int) -> None:
    device = PciHostBridge()
    select(device, bus, slot, function, 0)
    assert device.read(DATA, 4) == 0xFFFF_FFFF
    device.write(DATA, 4, 0)
    assert device.read(DATA + 3, 1) == 0xFF


def test_nothing_is_read_without_the_enable_bit() -> None:
    device = PciHostBridge()
    device.write(ADDRESS, 4, 0)
    assert device.read(DATA, 4) == 0xFFFF_FFFF


def test_absent_bridge_is_not_found() -> None:
    device = PciHostBridge(present=False)
    device.write(ADDRESS, 4, ENABLE)
    assert device.read(ADDRESS, 4) == 0xFFFF_FFFF
    assert device.read(DATA, 2) == 0xFFFF


def test_function_put_in_is_reached() -> None:
    class Function:
        def __init__(self) -> None:
            self.written: list[tuple[int, int, int]] = []

        def read_config(self, register: int, size: int) -> int:
            return register

        def write_config(self, register: int, size: int, value: int) -> None:
            self.written.append((register, size, value))

        def reset(self) -> None:
            self.written.clear()

        def state(self) -> dict[str, Any]:
            return {}

        def restore(self, state: dict[str, Any]) -> None:
            pass

    device, function = PciHostBridge(), Function()
    device.functions[2, 3, 1] = function
    select(device, 2, 3, 1, 0x10)
    assert device.read(DATA + 2, 2) == 0x12
    device.write(DATA + 1, 1, 0x55)
    assert function.written == [(0x11, 1, 0x55)]


def test_reset_control_register_resets_when_its_bit_rises() -> None:
    board, device = RecordingBoard(), PciHostBridge()
    device.attach(board)
    device.write(RESET_CONTROL, 1, 0x02)
    assert board.ended == []
    device.write(RESET_CONTROL, 1, 0x06)
    device.write(RESET_CONTROL, 1, 0x06)
    assert board.ended == [("reset", None)]
    assert device.read(RESET_CONTROL, 1) == 0x06


def test_reset_is_power_on() -> None:
    device = PciHostBridge()
    power_on = device.state()
    select(device, 0, 0, 0, 0x58)
    device.write(DATA, 4, 0x1111_1111)
    device.reset()
    assert device.state() == power_on
