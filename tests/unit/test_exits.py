"""From the raw struct kvm_run to exits: every reason, with hand-made pages; and exits as values."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

from kvmpy import exits
from kvmpy.abi import run_layout
from kvmpy.abi.exit_reasons import EXIT_REASONS
from kvmpy.abi.structs import kvm_run
from kvmpy.errors import ReplyError
from kvmpy.exits import (
    Debug,
    FailEntry,
    Hlt,
    Hypercall,
    InternalError,
    Interrupted,
    IoapicEoi,
    IoIn,
    IoOut,
    MemoryFault,
    MmioRead,
    MmioWrite,
    Notify,
    RdMsr,
    SystemEvent,
    UnknownExit,
    WrMsr,
)
from kvmpy.kvm import run_page
from kvmpy.kvm.exit_decoder import decode
from kvmpy.kvm.run_page import RunPage

SIZE = 0x3000


@pytest.fixture
def page() -> Iterator[RunPage]:
    memfd = os.memfd_create("kvm_run")
    try:
        os.ftruncate(memfd, SIZE)
        page = RunPage(memfd, SIZE)
    finally:
        os.close(memfd)
    yield page
    page.drop()


def struct_of(page: RunPage) -> kvm_run:
    """The same page as the kernel declares it."""
    return kvm_run.from_buffer(page.u8)


def filled(page: RunPage, reason: int, **fields: object) -> exits.Exit:
    """The exit decoded from a page where struct kvm_run's fields, by path `a__b`, are set."""
    run = struct_of(page)
    run.exit_reason = reason
    for path, value in fields.items():
        *owners, name = path.split("__")
        target = run
        for owner in owners:
            target = getattr(target, owner)
        if isinstance(value, (list, tuple, bytes)):
            array = getattr(target, name)
            for index, item in enumerate(value):
                array[index] = item
        else:
            setattr(target, name, value)
    del run
    return decode(page)


def test_the_offsets_are_those_of_the_structure() -> None:
    assert run_page.EXIT_REASON == run_layout.EXIT_REASON == kvm_run.exit_reason.offset
    assert run_page.IMMEDIATE_EXIT == run_layout.IMMEDIATE_EXIT == kvm_run.immediate_exit.offset
    assert run_page.READY_FOR_INTERRUPT == run_layout.READY_FOR_INTERRUPT_INJECTION
    assert run_page.IF_FLAG == run_layout.IF_FLAG
    assert run_page.FLAGS == run_layout.FLAGS
    assert run_page.VALID_REGS == run_layout.KVM_VALID_REGS
    assert run_page.DIRTY_REGS == run_layout.KVM_DIRTY_REGS
    assert run_page.REGS == run_layout.S_REGS_REGS
    assert run_page.SREGS == run_layout.S_REGS_SREGS
    assert run_page.IO_DIRECTION == run_layout.IO_DIRECTION
    assert run_page.MMIO_IS_WRITE == run_layout.MMIO_IS_WRITE


def test_every_reason_of_x86_has_a_class_and_every_class_its_number(page: RunPage) -> None:
    for reason, name in EXIT_REASONS.items():
        event = filled(page, reason)
        if isinstance(event, UnknownExit):
            continue
        assert event.reason == reason, name
    decoded = {type(filled(page, reason)) for reason in EXIT_REASONS}
    public = {getattr(exits, name) for name in exits.__all__} - {exits.Exit, MmioWrite, MmioRead, IoIn, IoOut}
    assert public - decoded == set()


@pytest.mark.parametrize("number", [2**32 - 2, 99, 1000, 13, 35])
def test_an_unknown_reason_is_kept(page: RunPage, number: int) -> None:
    event = filled(page, number)
    assert event == UnknownExit(number)
    assert repr(event) == f"UnknownExit(number={number:#x})"


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (4, 1), (1, 4096), (2, 7), (4, 1024)])
def test_port_writes_carry_all_their_items(page: RunPage, size: int, count: int) -> None:
    data = bytes(number * 7 & 0xFF for number in range(size * count))
    page.u8[0x1000 : 0x1000 + len(data)] = data
    event = filled(page, 2, io__direction=1, io__size=size, io__port=0xFFFF, io__count=count, io__data_offset=0x1000)
    assert event == IoOut(0xFFFF, data, size, count)
    assert isinstance(event, IoOut)
    assert event.value == int.from_bytes(data[:size], "little")
    page.u8[0x1000] = 0xEE
    assert event.data == data  # a copy


def port_read(page: RunPage, size: int, count: int) -> IoIn:
    event = filled(page, 2, io__direction=0, io__size=size, io__port=0x60, io__count=count, io__data_offset=0x1000)
    assert isinstance(event, IoIn)
    return event


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (4, 1), (2, 5), (4, 1024)])
def test_port_reads_are_all_ones_until_they_are_answered(page: RunPage, size: int, count: int) -> None:
    length = size * count
    event = port_read(page, size, count)
    assert event == IoIn(0x60, size, count)
    assert page.u8[0x1000 : 0x1000 + length + 1].tobytes() == b"\xff" * length + b"\0"
    event.reply(bytes(length))
    assert page.u8[0x1000 : 0x1000 + length].tobytes() == bytes(length)
    event.reply((1 << 8 * length) - 2)
    assert page.u8[0x1000] == 0xFE
    for wrong in (bytes(length + 1), bytes(length - 1), 1 << 8 * length, -1, "x" * length, None, 1.5):
        with pytest.raises(ReplyError):
            event.reply(wrong)  # type: ignore[arg-type]
    assert page.u8[0x1000] == 0xFE


def test_an_answer_after_the_next_run_or_the_end_is_refused(page: RunPage) -> None:
    event = port_read(page, 1, 1)
    page.runs[0] += 1
    with pytest.raises(ReplyError, match="run on"):
        event.reply(1)
    later = port_read(page, 1, 1)
    later.reply(bytearray(b"\1"))  # type: ignore[arg-type]
    later.reply(memoryview(b"\2"))  # type: ignore[arg-type]
    page.drop()
    page.drop()
    with pytest.raises(ReplyError):
        later.reply(1)


def test_an_exit_made_by_hand_takes_no_answer() -> None:
    for event in (IoIn(1), MmioRead(0, 4), Hypercall(1), RdMsr(0, 1)):
        with pytest.raises(ReplyError, match="did not come from a vCPU"):
            event.reply(0)
    for access in (RdMsr(0, 1), WrMsr(0, 0, 1)):
        with pytest.raises(ReplyError):
            access.reject()


@pytest.mark.parametrize("size", range(1, 9))
def test_memory_accesses_of_every_size(page: RunPage, size: int) -> None:
    data = bytes(range(1, 9))
    fields = {"mmio__phys_addr": 0xFEED_0000_1234, "mmio__data": data, "mmio__len": size}
    event = filled(page, 6, **fields, mmio__is_write=1)
    assert event == MmioWrite(0xFEED_0000_1234, data[:size])
    event = filled(page, 6, **fields, mmio__is_write=0)
    assert event == MmioRead(0xFEED_0000_1234, size)
    assert isinstance(event, MmioRead)
    assert page.u8[40:48].tobytes() == (b"\xff" * size + data[size:])
    event.reply(0x42)
    assert page.u8[40:48].tobytes() == (b"\x42" + bytes(size - 1) + data[size:])


def test_an_impossible_length_stays_inside_the_field(page: RunPage) -> None:
    event = filled(page, 6, mmio__len=0xFFFF_FFFF, mmio__is_write=0)
    assert event == MmioRead(0, 8)
    assert page.u32[12] == 0xFFFF_FFFF


def test_hypercalls_are_answered_in_ret(page: RunPage) -> None:
    event = filled(page, 3, hypercall__nr=12, hypercall__args=(1, 2, 3, 4, 5, 6), hypercall__flags=1)
    assert event == Hypercall(12, (1, 2, 3, 4, 5, 6), 1)
    assert isinstance(event, Hypercall)
    event.reply(0x1122)
    assert struct_of(page).hypercall.ret == 0x1122


def test_msr_reads_are_refused_until_they_are_answered(page: RunPage) -> None:
    event = filled(page, 29, msr__index=0x12345, msr__reason=2)
    assert event == RdMsr(0x12345, 2)
    assert isinstance(event, RdMsr)
    assert page.u8[32] == 1
    event.reply(0x1_0000_0002)
    assert (page.u8[32], page.u64[6]) == (0, 0x1_0000_0002)
    event.reject()
    assert page.u8[32] == 1


def test_msr_writes_are_taken_until_they_are_rejected(page: RunPage) -> None:
    page.u8[32] = 1
    event = filled(page, 30, msr__index=0x12345, msr__reason=4, msr__data=7, msr__error=1)
    assert event == WrMsr(0x12345, 7, 4)
    assert isinstance(event, WrMsr)
    assert page.u8[32] == 0
    event.reject()
    assert page.u8[32] == 1
    event.reply()
    assert page.u8[32] == 0


def test_emulation_failures_carry_the_instruction(page: RunPage) -> None:
    run = struct_of(page)
    run.exit_reason = 17
    run.internal.suberror, run.internal.ndata = 1, 4
    run.internal.data[0] = 1
    ctypes.memmove(ctypes.addressof(run) + 48, b"\x03\x0f\x01\xd9", 4)
    del run
    event = decode(page)
    assert isinstance(event, InternalError)
    assert (event.suberror, event.name, event.instruction) == (1, "EMULATION", b"\x0f\x01\xd9")
    assert len(event.data) == 4
    page.u8[48] = 200
    assert len(decode(page).instruction) == 15  # type: ignore[attr-defined]
    page.u64[5] = 0  # the flag that says that the bytes are there
    assert decode(page).instruction == b""  # type: ignore[attr-defined]


def test_internal_errors_of_other_kinds_carry_their_data(page: RunPage) -> None:
    event = filled(page, 17, internal__suberror=3, internal__ndata=2, internal__data=(5, 6))
    assert event == InternalError(3, (5, 6))
    assert isinstance(event, InternalError)
    assert event.name == "DELIVERY_EV"
    assert filled(page, 17, internal__suberror=77, internal__ndata=99).data == (5, 6, *[0] * 14)  # type: ignore[attr-defined]
    assert InternalError(77).name == "suberror 77"


def test_the_rest(page: RunPage) -> None:
    assert filled(page, 5) == Hlt()
    assert filled(page, 0, hw__hardware_exit_reason=9) == exits.UnknownHardwareExit(9)
    assert filled(page, 1, ex__exception=6, ex__error_code=7) == exits.ExceptionExit(6, 7)
    debug = {"exception": 1, "pc": 2, "dr6": 3, "dr7": 4}
    assert filled(page, 4, **{f"debug__arch__{name}": value for name, value in debug.items()}) == Debug(1, 2, 3, 4)
    entry = filled(page, 9, fail_entry__hardware_entry_failure_reason=0x8000_0021, fail_entry__cpu=3)
    assert entry == FailEntry(0x8000_0021, 3)
    assert filled(page, 10) == Interrupted(False)
    assert filled(page, 12, tpr_access__rip=5, tpr_access__is_write=1) == exits.TprAccess(5, True)
    event = filled(page, 24, system_event__type=2, system_event__ndata=1, system_event__data=(9,))
    assert event == SystemEvent(2, (9,))
    assert filled(page, 26, eoi__vector=0x40) == IoapicEoi(0x40)
    assert filled(page, 37, notify__flags=1) == Notify(1)
    event = filled(page, 39, memory_fault__flags=8, memory_fault__gpa=0x1000, memory_fault__size=0x2000)
    assert event == MemoryFault(0x1000, 0x2000, 8)


def test_hyperv_and_xen_exits_keep_their_bytes(page: RunPage) -> None:
    for reason in (27, 34):
        page.u8[40:44] = b"abcd"
        event = filled(page, reason)
        assert event.data[:4] == b"abcd"  # type: ignore[attr-defined]
        assert len(event.data) == 248  # type: ignore[attr-defined]


def test_flags_of_the_page(page: RunPage) -> None:
    assert not page.immediate_exit
    page.immediate_exit = True
    page.request_interrupt_window = True
    run = struct_of(page)
    assert (run.immediate_exit, run.request_interrupt_window) == (1, 1)
    run.ready_for_interrupt_injection, run.if_flag, run.flags = 1, 1, 3
    del run
    assert page.ready_for_interrupt_injection
    assert page.if_flag
    assert page.flags == 3
    page.immediate_exit = False
    assert page.u8[1] == 0


# Values


def test_exits_compare_hash_and_print_as_values() -> None:
    assert IoOut(0x3F8, b"A") == IoOut(0x3F8, b"A", 1, 1) != IoOut(0x3F8, b"B")
    assert IoOut(1, b"") != IoIn(1)
    assert Hlt() == Hlt()
    assert Hlt() != 5
    assert len({IoOut(1, b"A"), IoOut(1, b"A"), Hlt(), Hlt(), MmioRead(1, 4)}) == 3
    assert repr(IoOut(0x3F8, b"A")) == "IoOut(port=0x3f8, data=b'A', size=1, count=1)"
    assert repr(Interrupted(True)) == "Interrupted(timed_out=True)"
    assert repr(Hlt()) == "Hlt()"


def test_exits_match_by_position_and_keyword() -> None:
    match IoOut(0x3F8, b"A"):
        case IoOut(port=0x3F8, data=data):
            assert data == b"A"
        case _:
            pytest.fail("no match by keyword")
    match MmioRead(0x1000, 4):
        case MmioRead(address, size):
            assert (address, size) == (0x1000, 4)
        case _:
            pytest.fail("no match by position")


def test_exits_have_no_attributes_by_mistake() -> None:
    with pytest.raises(AttributeError):
        IoOut(1, b"").prot = 5  # type: ignore[attr-defined]
