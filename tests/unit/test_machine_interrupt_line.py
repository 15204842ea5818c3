"""The interrupt line of a machine: what it tells KVM, and when another thread is quicker than the ioctl."""

import errno
import threading
from collections.abc import Callable

import pytest

from kvmpy import KvmError
from kvmpy.machine.interrupts import InterruptPin, KvmInterruptLine


class RecordingVm:
    """Stands in for `Vm`: remembers the levels, and calls `during` while it "is in the ioctl"."""

    def __init__(self) -> None:
        self.levels: list[int] = []
        self.during: Callable[[int], None] = lambda level: None

    def set_irq_line(self, gsi: int, level: int) -> None:
        self.levels.append(level)
        self.during(level)


@pytest.fixture
def vm() -> RecordingVm:
    return RecordingVm()


@pytest.fixture
def pin(vm: RecordingVm) -> InterruptPin:
    return InterruptPin(vm, 5)  # type: ignore[arg-type]


@pytest.fixture
def line(pin: InterruptPin) -> KvmInterruptLine:
    return KvmInterruptLine(pin)


def test_a_line_tells_kvm_only_what_changes(vm: RecordingVm, line: KvmInterruptLine) -> None:
    for action in (line.lower_line, line.raise_line, line.raise_line, line.lower_line, line.lower_line, line.pulse):
        action()
    assert vm.levels == [1, 0, 1, 0]


def test_a_pin_is_high_while_any_of_its_lines_is(vm: RecordingVm, pin: InterruptPin) -> None:
    first, second = KvmInterruptLine(pin), KvmInterruptLine(pin)
    for action in (first.raise_line, second.raise_line, first.lower_line):
        action()
    assert vm.levels == [1]
    second.lower_line()
    assert vm.levels == [1, 0]


def test_a_guest_that_is_quicker_than_the_ioctl_gets_its_line_lowered(vm: RecordingVm, line: KvmInterruptLine) -> None:
    # The device's thread raises the line; before KVM_IRQ_LINE has returned, the vCPU's thread handles the interrupt.
    threads = []

    def handle(level: int) -> None:
        if level:
            vcpu = threading.Thread(target=line.lower_line)
            vcpu.start()
            vcpu.join(0.2)  # it waits for us, or, wrongly, is done
            threads.append(vcpu)

    vm.during = handle
    line.raise_line()
    for thread in threads:
        thread.join()
    assert vm.levels == [1, 0]
    assert line.level == 0


def test_a_line_that_kvm_refused_to_raise_is_low(vm: RecordingVm, line: KvmInterruptLine) -> None:
    def refuse(level: int) -> None:
        raise KvmError("KVM_IRQ_LINE", errno.ENXIO)

    vm.during = refuse
    with pytest.raises(KvmError):
        line.raise_line()
    vm.during = lambda level: None
    line.raise_line()
    assert (vm.levels, line.level) == ([1, 1], 1)
