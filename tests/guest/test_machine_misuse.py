"""What somebody new to Machine gets wrong: every mistake is named at once, in terms of what was written."""

import math
from typing import Any

import pytest

from kvmpy import End, Hlt, Machine, MiB, OverlapError, UsageError
from kvmpy.boot import FlatImage
from kvmpy.devices import Pit8254, Uart16550


@pytest.fixture
def machine() -> Any:
    """Untyped, so that the mistakes below are not found by a type checker first."""
    with Machine(memory=0x10000) as machine:
        yield machine


def nothing(*_arguments: object) -> int:
    return 0


@pytest.mark.parametrize("memory", ["16M", 0.5 * MiB, None])
def test_memory_is_a_number_of_bytes(memory: Any) -> None:
    with pytest.raises(UsageError, match="number of bytes"):
        Machine(memory=memory)


@pytest.mark.parametrize("vcpus", ["2", 0, -1, 1.0])
def test_vcpus_are_counted_from_one(vcpus: Any) -> None:
    with pytest.raises(UsageError, match="at least one vCPU"):
        Machine(vcpus=vcpus)


@pytest.mark.parametrize("thing", [Uart16550, object(), None, "uart"])
def test_only_a_device_is_plugged_in(machine: Any, thing: object) -> None:
    with pytest.raises(UsageError, match=r"takes a device, such as Uart16550\(\)"):
        machine.add(thing)
    assert machine.devices == []


@pytest.mark.parametrize("image", [b"\xf4", bytes(MiB), "kernel.elf", None])
def test_only_an_image_is_loaded_and_the_message_stays_short(machine: Any, image: object) -> None:
    with pytest.raises(UsageError, match="takes an image, such as FlatImage") as caught:
        machine.load(image)
    assert len(str(caught.value)) < 160


@pytest.mark.parametrize(
    ("first", "count", "options"),
    [
        ("0x10", 1, {}),
        (0x10, 1.0, {}),
        (0x10, 0, {}),
        (0x10, -1, {}),
        (-1, 1, {}),
        (0xFFFF, 2, {}),
        (0x10, 1, {"read": 5}),
        (0x10, 1, {"write": "handler"}),
        (0x10, 1, {"width": 3}),
        (0x10, 1, {"width": 0}),
    ],
)
def test_ports_that_cannot_be_are_not_mapped(machine: Any, first: Any, count: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="port"):
        machine.map_ports(first, count, **options)
    assert machine.ports.regions == ()


@pytest.mark.parametrize("address", ["0xd0000000", 1.0, -0x1000, 1 << 52])
def test_addresses_that_cannot_be_are_not_mapped(machine: Any, address: Any) -> None:
    with pytest.raises(UsageError, match="mmio"):
        machine.map_mmio(address, 0x1000, read=nothing)
    assert machine.mmio.regions == ()


@pytest.mark.parametrize(
    ("first", "owner"), [(0x20, "PIC"), (0x43, "PIT"), (0x60, "PIT"), (0xA1, "PIC"), (0x4D1, "PIC")]
)
def test_ports_that_kvm_answers_by_itself_are_not_mapped_in_vain(machine: Any, first: int, owner: str) -> None:
    with pytest.raises(OverlapError, match=f"KVM's {owner}.*irqchip=False"):
        machine.map_ports(first, 2, read=nothing)
    with Machine(memory=0x10000, irqchip=False) as bare:
        bare.map_ports(first, 2, read=nothing)


@pytest.mark.parametrize(("address", "owner"), [(0xFEC0_0000, "IOAPIC"), (0xFEE0_0FFC, "local APIC")])
def test_addresses_that_kvm_answers_by_itself_are_not_mapped_in_vain(machine: Any, address: int, owner: str) -> None:
    with pytest.raises(OverlapError, match=f"KVM's {owner}"):
        machine.map_mmio(address, 4, read=nothing)


def test_a_timer_of_one_s_own_is_refused_beside_kvm_s(machine: Any) -> None:
    with pytest.raises(OverlapError, match="KVM's PIT"):
        machine.add(Pit8254())
    assert machine.ports.regions == ()


@pytest.mark.parametrize("number", ["4", -1, None, 1.5])
def test_an_interrupt_input_is_a_number(machine: Any, number: Any) -> None:
    with pytest.raises(UsageError, match="interrupt input"):
        machine.interrupt_line(number)


@pytest.mark.parametrize(("kind", "handler"), [("Hlt", nothing), (Hlt(), nothing), (Hlt, None), (int, nothing)])
def test_an_exit_handler_is_a_function_for_a_class_of_exits(machine: Any, kind: Any, handler: Any) -> None:
    with pytest.raises(UsageError, match=r"class of kvmpy\.exits"):
        machine.on_exit(kind, handler)


@pytest.mark.parametrize("timeout", ["5", math.nan, b"1", [1]])
def test_a_timeout_is_a_number_of_seconds(machine: Any, timeout: Any) -> None:
    with pytest.raises(UsageError, match="number of seconds"):
        machine.run(timeout=timeout)
    with pytest.raises(UsageError, match="number of seconds"):
        machine.start(timeout)
    machine.load(FlatImage(b"\xfa\xf4"))  # cli; hlt
    assert machine.run(timeout=5).end is End.HALTED


def test_a_run_with_nothing_loaded_says_what_is_missing(machine: Any) -> None:
    outcome = machine.run(timeout=5)
    assert outcome.end is End.FAILED
    assert "load an image" in outcome.message


def test_a_timeout_says_where_the_guest_was(machine: Any) -> None:
    machine.load(FlatImage(b"\xeb\xfe", address=0x2000))  # jmp to itself
    outcome = machine.run(timeout=0.05)
    assert outcome.end is End.TIMEOUT
    assert outcome.message.endswith("vCPU 0 is at rip 0x2000")
    assert outcome.vcpu == 0
