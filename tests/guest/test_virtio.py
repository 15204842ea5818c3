"""virtio on real KVM: a driver in C talks to the entropy device; what its requests cost in exits."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from gnu_toolchain import compile_c
from kvmpy import End, Kvm, Machine, MiB
from kvmpy.bench.contenders import C_SOURCES
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit
from kvmpy.machine.guest_events import IoEvent
from kvmpy.virtio import DeviceStatus, Entropy, Feature, VirtioMmio
from kvmpy.virtio import mmio_registers as reg
from virtio_driver import FakeDriver

SOURCE = str(C_SOURCES / "guest_programs" / "virtio_requests.c")
RESULT = 0x8000
ADDRESS = 0xD000_0000
EVENT_IDX = 1 << Feature.EVENT_IDX
INDIRECT = 1 << Feature.INDIRECT_DESC
ROUNDS = 20


class Requests(NamedTuple):
    """What ROUNDS rounds of requests did."""

    exits: Counter[str]
    """"notify", "status" and "acknowledge": exits for these registers, and "other" for all the rest while they ran."""
    spurious: int


def requests(
    *, batch: int = 1, wanted: int = EVENT_IDX, interrupt: bool = False, ioeventfd: bool = False, irqfd: bool = False,
    ring: int = 0, vcpus: int = 1, rounds: int = ROUNDS,
) -> Requests:  # fmt: skip
    """Run the guest; it checks every answer itself."""
    program = compile_c(
        SOURCE, flags=(
            f"-DADDRESS={ADDRESS:#x}", "-DDEVICE_ID=4", f"-DWANTED={wanted:#x}ULL", f"-DINTERRUPT={int(interrupt)}",
            f"-DBATCH={batch}", f"-DROUNDS={rounds}", f"-DRESULT={RESULT:#x}",
        ),
    )  # fmt: skip
    with Machine(memory=16 * MiB, vcpus=vcpus) as machine:
        entropy = Entropy(lambda length: b"\x5a" * length)
        machine.add(VirtioMmio(entropy, address=ADDRESS, irq=5, ioeventfd=ioeventfd, irqfd=irqfd))
        machine.add(DebugExit())
        machine.load(ElfImage(program.elf, ring=ring))
        outcome = machine.run(timeout=20)
        assert (outcome.end, (outcome.code or 0) >> 1) == (End.EXITED, 0)
        assert machine.host_errors == []
        assert entropy.counters == {}
        assert entropy.accepted == wanted | 1 << Feature.VERSION_1
        statistics = machine.statistics()
        exits = Counter(
            notify=statistics.count("mmio", ADDRESS + reg.QUEUE_NOTIFY),
            status=statistics.count("mmio", ADDRESS + reg.INTERRUPT_STATUS),
            acknowledge=statistics.count("mmio", ADDRESS + reg.INTERRUPT_ACK),
            other=sum(statistics.exits.values()),
        )
        return Requests(+exits, machine.memory.read_u64(RESULT + 16))


@pytest.mark.parametrize("wanted", [0, EVENT_IDX, EVENT_IDX | INDIRECT], ids=["plain", "event index", "indirect"])
@pytest.mark.parametrize("batch", [1, 32])
def test_a_batch_that_is_polled_for_costs_one_exit(batch: int, wanted: int) -> None:
    assert requests(batch=batch, wanted=wanted).exits == {"notify": ROUNDS}


@pytest.mark.parametrize("wanted", [0, EVENT_IDX], ids=["plain", "event index"])
@pytest.mark.parametrize("batch", [1, 32])
def test_with_ioeventfd_one_that_is_polled_for_costs_none(batch: int, wanted: int) -> None:
    assert requests(batch=batch, wanted=wanted, ioeventfd=True).exits == {}


@pytest.mark.parametrize("irqfd", [False, True], ids=["line", "irqfd"])
@pytest.mark.parametrize("wanted", [0, EVENT_IDX], ids=["plain", "event index"])
@pytest.mark.parametrize("batch", [1, 32])
def test_one_that_interrupts_costs_three(batch: int, wanted: int, irqfd: bool) -> None:
    done = requests(batch=batch, wanted=wanted, interrupt=True, irqfd=irqfd)
    assert done.exits == {"notify": ROUNDS, "status": ROUNDS, "acknowledge": ROUNDS}
    assert done.spurious == 0


@pytest.mark.parametrize("irqfd", [False, True], ids=["line", "irqfd"])
@pytest.mark.parametrize("wanted", [0, EVENT_IDX], ids=["plain", "event index"])
@pytest.mark.parametrize("batch", [1, 32])
def test_one_that_interrupts_costs_two_with_ioeventfd(batch: int, wanted: int, irqfd: bool) -> None:
    done = requests(batch=batch, wanted=wanted, interrupt=True, ioeventfd=True, irqfd=irqfd)
    assert done.exits == {"status": ROUNDS, "acknowledge": ROUNDS}
    assert done.spurious == 0


@pytest.mark.parametrize("ioeventfd", [False, True], ids=["exits", "ioeventfd"])
def test_a_driver_in_ring_3_does_as_well(ioeventfd: bool) -> None:
    # Natively, also where KVM emulates ring 0: guest and host then really are on two processors at once.
    assert requests(batch=4, ring=3, ioeventfd=ioeventfd).exits == ({} if ioeventfd else {"notify": ROUNDS})


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [0, EVENT_IDX], ids=["plain", "event index"])
def test_no_notification_is_lost(wanted: int) -> None:
    # The driver polls and the device's thread looks, on two processors: whoever misses the other waits for ever.
    assert requests(batch=2, ring=3, ioeventfd=True, wanted=wanted, rounds=20_000).exits == {}


def test_a_machine_of_several_processors_does_as_well() -> None:
    assert requests(batch=4, vcpus=2, interrupt=True).exits == {
        "notify": ROUNDS, "status": ROUNDS, "acknowledge": ROUNDS,
    }  # fmt: skip


@pytest.mark.parametrize("ioeventfd", [False, True], ids=["exits", "ioeventfd"])
def test_a_hostile_guest_harms_nobody_and_is_served_when_it_behaves(ioeventfd: bool) -> None:
    program = compile_c(str(Path(__file__).with_name("virtio_hostile.c")), flags=(f"-DADDRESS={ADDRESS:#x}",))
    with Machine(memory=16 * MiB) as machine:
        entropy = Entropy(lambda length: b"\x5a" * length)
        machine.add(VirtioMmio(entropy, address=ADDRESS, irq=5, ioeventfd=ioeventfd))
        machine.add(DebugExit())
        machine.load(ElfImage(program.elf, ring=3))
        outcome = machine.run(timeout=20)
        assert (outcome.end, (outcome.code or 0) >> 1) == (End.EXITED, 0)
        assert machine.host_errors == []
        assert entropy.counters["buffer_not_in_ram"] == 3
        assert entropy.counters["available_index"] == 1
        assert entropy.counters["register_width"] > 10


def test_machine_add_finds_a_place_for_a_device() -> None:
    with Machine(memory=1 * MiB) as machine:
        first, second = machine.add(Entropy()), machine.add(Entropy())
        places = [(device.address, device.gsi) for device in machine.devices if isinstance(device, VirtioMmio)]
        assert [device.device for device in machine.devices if isinstance(device, VirtioMmio)] == [first, second]
        assert places == [(0xD000_0000, 5), (0xD000_1000, 10)]


def test_places_that_are_taken_are_left_out() -> None:
    with Machine(memory=1 * MiB) as machine:
        machine.map_mmio(0xD000_0800, 0x1000)
        machine.interrupt_line(5)
        transport = machine.add(VirtioMmio(Entropy()))
        assert (transport.address, transport.gsi) == (0xD000_2000, 10)


def test_more_devices_than_inputs_share_them() -> None:
    with Machine(memory=1 * MiB) as machine:
        irqs = [machine.add(VirtioMmio(Entropy())).gsi for _ in range(9)]
        assert irqs == [5, 10, 11, 6, 15, 14, 7, 5, 10]


def test_a_device_is_plugged_in_once() -> None:
    with Machine(memory=1 * MiB) as machine, Machine(memory=1 * MiB) as other:
        entropy = machine.add(Entropy())
        for place in (machine, other):
            with pytest.raises(ValueError, match="virtio-entropy is plugged in already"):
                place.add(entropy)


def test_without_an_irqchip_it_is_polled() -> None:
    with Machine(memory=1 * MiB, irqchip=False) as machine:
        transport = machine.add(VirtioMmio(Entropy()))
        assert transport.interrupt.event is None


def test_a_closed_machine_gives_all_descriptors_back() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with Kvm() as kvm:
        for number in range(5):
            with Machine(memory=1 * MiB, kvm=kvm) as machine:
                machine.add(Entropy())
                machine.add(VirtioMmio(Entropy(), irqfd=False))
            if number == 1:  # from the second one on, Kvm keeps an idle VM
                before = descriptors()
        assert descriptors() == before


def test_an_error_of_a_device_is_kept_and_it_can_be_reset() -> None:
    # The host input thread must not forget the queue because handling one notification failed.
    failures = [RuntimeError("a bug")]

    def source(length: int) -> bytes:
        if failures:
            raise failures.pop()
        return bytes(length)

    with Machine(memory=1 * MiB) as machine:
        transport = machine.add(VirtioMmio(Entropy(source)))
        event = transport.write_events[0]
        assert isinstance(event, IoEvent)
        driver = FakeDriver(transport.device, mmio=transport, memory=machine.memory).start()
        driver.queues[0].add([], [8])
        os.eventfd_write(event.fileno(), 1)  # as KVM does when the guest writes
        wait_for(lambda: bool(driver.status & DeviceStatus.DEVICE_NEEDS_RESET))
        assert [str(error) for _, error in machine.host_errors] == ["a bug"]
        driver.start()
        driver.queues[0].add([], [8])
        os.eventfd_write(event.fileno(), 1)
        wait_for(lambda: driver.queues[0].used_idx == 1)


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)
