"""Guest writes that wake an eventfd or wait in a ring instead of exiting, and eventfds that raise interrupts."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from bare_guest import MMIO, empty_vm, guest, next_exit, run_to_hlt, start
from kvmpy import Vcpu
from kvmpy.errors import ClosedError, KvmError, RegisterValueError
from kvmpy.exits import Hlt, Interrupted, IoOut, MmioWrite
from kvmpy.kvm.coalesced_ring import CoalescedRing

PORT = 0x500


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def count(fd: int) -> int:
    """How often an eventfd was signalled since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# ioeventfd


def test_a_port_signals_an_eventfd_without_an_exit(eventfd: int) -> None:
    with guest(f"mov dx, {PORT}; mov cx, 5; 1: out dx, ax; loop 1b; hlt") as vcpu:
        vcpu.vm.add_ioeventfd(eventfd, PORT, 2, port=True)
        assert run_to_hlt(vcpu) == []
        assert count(eventfd) == 5


def test_other_ports_and_widths_still_exit(eventfd: int) -> None:
    with guest(f"mov dx, {PORT}; out dx, al; out dx, ax; inc dx; out dx, ax; hlt") as vcpu:
        vcpu.vm.add_ioeventfd(eventfd, PORT, 2, port=True)
        assert [event for event in run_to_hlt(vcpu) if isinstance(event, IoOut)] == [
            IoOut(PORT, b"\0", 1),
            IoOut(PORT + 1, b"\0\0", 2),
        ]
        assert count(eventfd) == 1


def test_an_mmio_address_signals_an_eventfd(eventfd: int) -> None:
    with guest(f"mov dword ptr [{MMIO}], 3; mov dword ptr [{MMIO + 4}], 3; hlt", 32) as vcpu:
        vcpu.vm.add_ioeventfd(eventfd, MMIO, 4)
        assert run_to_hlt(vcpu) == [MmioWrite(MMIO + 4, b"\3\0\0\0")]
        assert count(eventfd) == 1


def test_size_zero_takes_every_width(eventfd: int) -> None:
    with guest(f"mov byte ptr [{MMIO}], 3; mov word ptr [{MMIO}], 3; mov dword ptr [{MMIO}], 3; hlt", 32) as vcpu:
        vcpu.vm.add_ioeventfd(eventfd, MMIO)
        assert run_to_hlt(vcpu) == []
        assert count(eventfd) == 3


def test_a_match_takes_only_that_value(eventfd: int) -> None:
    second = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with guest(f"mov dx, {PORT}; xor al, al; 1: out dx, al; inc al; cmp al, 4; jne 1b; hlt") as vcpu:
            vcpu.vm.add_ioeventfd(eventfd, PORT, 1, port=True, match=0)
            vcpu.vm.add_ioeventfd(second, PORT, 1, port=True, match=2)
            assert run_to_hlt(vcpu) == [IoOut(PORT, b"\1"), IoOut(PORT, b"\3")]
            assert (count(eventfd), count(second)) == (1, 1)
    finally:
        os.close(second)


def test_a_removed_ioeventfd_exits_again(eventfd: int) -> None:
    with guest(f"mov dx, {PORT}; 1: out dx, al; hlt; jmp 1b") as vcpu:
        vcpu.vm.add_ioeventfd(eventfd, PORT, 1, port=True)
        assert next_exit(vcpu) == Hlt()
        vcpu.vm.remove_ioeventfd(eventfd, PORT, 1, port=True)
        assert next_exit(vcpu) == IoOut(PORT, b"\0")
        with pytest.raises(KvmError):
            vcpu.vm.remove_ioeventfd(eventfd, PORT, 1, port=True)


def test_a_second_ioeventfd_at_one_place_is_refused(eventfd: int) -> None:
    with empty_vm() as vm:
        vm.add_ioeventfd(eventfd, MMIO, 4)
        with pytest.raises(KvmError, match="already"):
            vm.add_ioeventfd(eventfd, MMIO, 4)
        with pytest.raises(KvmError):
            vm.add_ioeventfd(eventfd, MMIO + 8, 3)  # no such width
        with open("/dev/null", "rb") as file, pytest.raises(KvmError):
            vm.add_ioeventfd(file.fileno(), MMIO + 8, 4)


@pytest.mark.parametrize(("size", "match"), [(1, 256), (2, 1 << 16), (4, -1), (8, 1 << 64)])
def test_a_match_that_does_not_fit_is_refused(eventfd: int, size: int, match: int) -> None:
    with empty_vm() as vm, pytest.raises(RegisterValueError):
        vm.add_ioeventfd(eventfd, MMIO, size, match=match)


# irqfd


def with_pic(vm_source: str) -> str:
    return f"""
        jmp go
        handler: push ax; mov al, 0x55; out 0x10, al; mov al, 0x20; out 0x20, al; pop ax; iret
        go: xor ax, ax; mov ds, ax
        mov word ptr [0x25 * 4], offset handler; mov word ptr [0x25 * 4 + 2], 0
        mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al
        mov al, 0; out 0x21, al
        {vm_source}
    """


WAIT = "mov al, 0x77; out 0x11, al; sti; 1: hlt; jmp 1b"


def silent(vcpu: Vcpu) -> bool:
    return vcpu.run(timeout=0.05) == Interrupted(True)


def test_an_irqfd_raises_its_interrupt(eventfd: int) -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        vm.add_irqfd(eventfd, 5)
        vcpu = start(vm, with_pic(WAIT))
        assert next_exit(vcpu) == IoOut(0x11, b"\x77")
        for _ in range(10):
            os.eventfd_write(eventfd, 1)
            assert next_exit(vcpu) == IoOut(0x10, b"\x55")
        assert silent(vcpu)
        vm.remove_irqfd(eventfd, 5)
        os.eventfd_write(eventfd, 1)
        assert silent(vcpu)


def test_a_resampling_irqfd_is_a_level_until_the_eoi(eventfd: int) -> None:
    resample = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with empty_vm() as vm:
            vm.create_irqchip()
            vm.add_irqfd(eventfd, 5, resample=resample)
            # ELCR at 0x4D0 makes IRQ 5 level-triggered.
            vcpu = start(vm, with_pic("mov al, 0x20; mov dx, 0x4D0; out dx, al;" + WAIT))
            assert next_exit(vcpu) == IoOut(0x11, b"\x77")
            assert count(resample) == 0
            os.eventfd_write(eventfd, 1)
            assert next_exit(vcpu) == IoOut(0x10, b"\x55")
            assert silent(vcpu)  # meanwhile the guest sent its EOI
            assert count(resample) == 1
            os.eventfd_write(eventfd, 1)
            assert next_exit(vcpu) == IoOut(0x10, b"\x55")
    finally:
        os.close(resample)


def test_an_irqfd_needs_an_eventfd() -> None:
    with empty_vm() as vm:
        vm.create_irqchip()
        with open("/dev/null", "rb") as file, pytest.raises(KvmError):
            vm.add_irqfd(file.fileno(), 5)


# Coalesced writes


def test_coalesced_mmio_waits_in_the_ring_in_order() -> None:
    source = f"mov dword ptr [{MMIO}], 0x11223344; mov byte ptr [{MMIO + 5}], 9; mov dword ptr [{MMIO + 0x100}], 1; hlt"
    with guest(source, 32) as vcpu:
        vcpu.vm.coalesce_writes(MMIO, 0x100)
        ring = CoalescedRing(vcpu)
        assert ring.drain() == []
        assert next_exit(vcpu) == MmioWrite(MMIO + 0x100, b"\1\0\0\0")
        assert ring.drain() == [MmioWrite(MMIO, b"\x44\x33\x22\x11"), MmioWrite(MMIO + 5, b"\x09")]
        assert ring.drain() == []


def test_coalesced_ports_wait_in_the_ring() -> None:
    with guest(f"mov dx, {PORT}; mov eax, 0xAABBCCDD; out dx, al; out dx, eax; hlt") as vcpu:
        vcpu.vm.coalesce_writes(PORT, 1, port=True)
        ring = CoalescedRing(vcpu)
        rest = run_to_hlt(vcpu)
        assert ring.drain()[0] == IoOut(PORT, b"\xdd")
        # The wider write reaches beyond the range, so it is an exit, or it was coalesced whole.
        assert rest in ([], [IoOut(PORT, bytes.fromhex("ddccbbaa"), 4)])


def test_a_full_ring_is_an_ordinary_exit_and_nothing_is_lost() -> None:
    source = f"mov edi, {MMIO}; xor eax, eax; 1: inc eax; mov [edi], eax; cmp eax, 1000; jne 1b; hlt"
    with guest(source, 32) as vcpu:
        vcpu.vm.coalesce_writes(MMIO, 4)
        ring = CoalescedRing(vcpu)
        values: list[int] = []
        exits = 0
        while (event := next_exit(vcpu)) != Hlt():
            assert isinstance(event, MmioWrite)
            exits += 1
            values += [write.value for write in ring.drain()] + [event.value]
        values += [write.value for write in ring.drain()]
        assert values == list(range(1, 1001))
        assert 3 < exits < 20


def test_a_range_that_is_no_longer_coalesced_exits() -> None:
    with guest(f"1: mov [{MMIO}], eax; hlt; jmp 1b", 32) as vcpu:
        vcpu.vm.coalesce_writes(MMIO, 4)
        assert next_exit(vcpu) == Hlt()
        vcpu.vm.stop_coalescing_writes(MMIO, 4)
        assert next_exit(vcpu) == MmioWrite(MMIO, bytes(4))


def test_the_ring_of_a_closed_vcpu_is_closed() -> None:
    with guest("hlt") as vcpu:
        ring = CoalescedRing(vcpu)
    with pytest.raises(ClosedError):
        ring.drain()
