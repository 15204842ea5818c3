"""Exits of real guests: what they carry, what answers they take, and what comes when nobody answers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from bare_guest import CODE, DATA, MMIO, PATIENCE, RAM, bytes_out, empty_vm, guest, next_exit, run_to_hlt, start
from kvmpy import Kvm, Vcpu
from kvmpy.abi.exit_reasons import (
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_UNKNOWN,
)
from kvmpy.errors import KvmError, ReplyError
from kvmpy.exits import (
    Hlt,
    InternalError,
    Interrupted,
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    RdMsr,
    Shutdown,
    WrMsr,
)
from kvmpy.kvm.msr_filter import MsrFilterRange

UNKNOWN_MSR = 0x12345
FS_BASE, KERNEL_GS_BASE = 0xC000_0100, 0xC000_0102


def io_in(vcpu: Vcpu) -> IoIn:
    event = next_exit(vcpu)
    assert isinstance(event, IoIn)
    return event


# Ports


@pytest.mark.parametrize(("register", "size"), [("al", 1), ("ax", 2), ("eax", 4)])
def test_out_of_each_size(register: str, size: int) -> None:
    with guest(f"mov eax, 0x44332211; mov dx, 0x3f8; out dx, {register}; hlt") as vcpu:
        event = next_exit(vcpu)
        assert event == IoOut(0x3F8, bytes([0x11, 0x22, 0x33, 0x44][:size]), size, 1)
        assert isinstance(event, IoOut)
        assert event.value == 0x4433_2211 & (1 << 8 * size) - 1
        assert next_exit(vcpu) == Hlt()


@pytest.mark.parametrize(("register", "size"), [("al", 1), ("ax", 2), ("eax", 4)])
def test_in_of_each_size_answered_by_int_or_bytes(register: str, size: int) -> None:
    with guest(f"mov dx, 0x60; 1: mov eax, 0; in {register}, dx; hlt; jmp 1b") as vcpu:
        for reply in (bytes(range(1, size + 1)), int.from_bytes(bytes(range(1, size + 1)), "little")):
            event = io_in(vcpu)
            assert event == IoIn(0x60, size, 1)
            event.reply(reply)
            assert next_exit(vcpu) == Hlt()
            assert vcpu.regs.rax == 0x0403_0201 & (1 << 8 * size) - 1


def test_an_in_that_nobody_answers_gives_all_ones() -> None:
    with guest("in eax, 0x60; hlt") as vcpu:
        io_in(vcpu)
        next_exit(vcpu)
        assert vcpu.regs.rax == 0xFFFF_FFFF


@pytest.mark.parametrize("reply", [-1, 0x100, 1 << 64, b"", b"ab", "a", None, 1.0])
def test_an_answer_of_the_wrong_size_or_kind_is_refused(reply: int) -> None:
    with guest("in al, 0x60; hlt") as vcpu:
        event = io_in(vcpu)
        with pytest.raises(ReplyError):
            event.reply(reply)
        event.reply(0x7F)  # the right one is still taken
        next_exit(vcpu)
        assert vcpu.regs.rax & 0xFF == 0x7F


def test_an_answer_that_comes_late_is_refused() -> None:
    with guest("in al, 0x60; in al, 0x61; hlt") as vcpu:
        first, second = io_in(vcpu), io_in(vcpu)
        with pytest.raises(ReplyError, match="run on"):
            first.reply(1)
        second.reply(2)
        next_exit(vcpu)
        with pytest.raises(ReplyError, match="run on"):
            second.reply(3)
        assert vcpu.regs.rax & 0xFF == 2


def test_an_answer_after_close_is_refused() -> None:
    with guest("in al, 0x60; hlt") as vcpu:
        event = io_in(vcpu)
    with pytest.raises(ReplyError):
        event.reply(1)


def test_the_last_answer_counts() -> None:
    with guest("in al, 0x60; hlt") as vcpu:
        event = io_in(vcpu)
        event.reply(1)
        event.reply(2)
        next_exit(vcpu)
        assert vcpu.regs.rax & 0xFF == 2


@pytest.mark.parametrize(("letter", "size"), [("b", 1), ("w", 2), ("d", 4)])
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_rep_outs_writes_every_element_in_order(letter: str, size: int, down: bool) -> None:
    count = 24
    data = bytes(range(count * size))
    start_at = DATA + (count - 1) * size if down else DATA
    source = f"{'std' if down else 'cld'}; mov si, {start_at}; mov cx, {count}; mov dx, 0x20; rep outs{letter}; hlt"
    with guest(source) as vcpu:
        vcpu.vm.memory.write(DATA, data)
        seen = run_to_hlt(vcpu)
        assert all(isinstance(event, IoOut) and (event.port, event.size) == (0x20, size) for event in seen)
        assert all(isinstance(event, IoOut) and len(event.data) == event.size * event.count for event in seen)
        written = b"".join(event.data for event in seen if isinstance(event, IoOut))
        elements = [data[at : at + size] for at in range(0, len(data), size)]
        assert written == b"".join(reversed(elements) if down else elements)
        assert vcpu.regs.rcx == 0


@pytest.mark.parametrize(("letter", "size"), [("b", 1), ("w", 2), ("d", 4)])
def test_rep_ins_reads_every_element_in_order(letter: str, size: int) -> None:
    count = 24
    with guest(f"cld; mov di, {DATA}; mov cx, {count}; mov dx, 0x20; rep ins{letter}; hlt") as vcpu:
        source = bytes(range(1, count * size + 1))
        given = 0
        for event in run_to_hlt_answering(vcpu, size, source):
            given += event.count * event.size
        assert given == len(source)
        assert vcpu.vm.memory.read(DATA, len(source) + 1) == source + b"\0"
        assert vcpu.regs.rdi == DATA + len(source)


def run_to_hlt_answering(vcpu: Vcpu, size: int, source: bytes) -> Iterator[IoIn]:
    at = 0
    while (event := next_exit(vcpu)) != Hlt():
        assert isinstance(event, IoIn)
        assert event.size == size
        length = event.size * event.count
        event.reply(source[at : at + length])
        at += length
        yield event


def test_ins_downwards_stores_backwards() -> None:
    with guest(f"std; mov di, {DATA + 6}; mov cx, 4; mov dx, 0x20; rep insw; hlt") as vcpu:
        list(run_to_hlt_answering(vcpu, 2, b"AABBCCDD"))
        assert vcpu.vm.memory.read(DATA, 8) == b"DDCCBBAA"


def test_strings_across_a_page_are_whole() -> None:
    edge = DATA + 0x1000 - 5
    source = f"cld; mov si, {edge}; mov cx, 10; mov dx, 0x20; rep outsb; mov di, {edge}; mov cx, 10; rep insb; hlt"
    with guest(source) as vcpu:
        vcpu.vm.memory.write(edge, b"0123456789")
        written, at = b"", 0
        while (event := next_exit(vcpu)) != Hlt():
            if isinstance(event, IoOut):
                written += event.data
            else:
                assert isinstance(event, IoIn)
                length = event.size * event.count
                event.reply(b"abcdefghij"[at : at + length])
                at += length
        assert written == b"0123456789"
        assert vcpu.vm.memory.read(edge, 10) == b"abcdefghij"


def test_a_word_across_a_page_is_whole() -> None:
    with guest(f"mov si, {DATA + 0xFFF}; mov dx, 0x20; outsw; hlt") as vcpu:
        vcpu.vm.memory.write_u16(DATA + 0xFFF, 0xBEEF)
        assert next_exit(vcpu) == IoOut(0x20, b"\xef\xbe", 2, 1)


# Memory that is not there


@pytest.mark.parametrize(("register", "size"), [("al", 1), ("ax", 2), ("eax", 4), ("rax", 8)])
def test_mmio_write_and_read_of_each_size(register: str, size: int) -> None:
    source = f"mov rax, 0x8877665544332211; mov [{MMIO + 8}], {register}; xor eax, eax; mov {register}, [{MMIO}]; hlt"
    with guest(source, 64) as vcpu:
        event = next_exit(vcpu)
        assert event == MmioWrite(MMIO + 8, bytes.fromhex("1122334455667788")[:size])
        assert isinstance(event, MmioWrite)
        assert (event.size, event.value) == (size, 0x8877_6655_4433_2211 & (1 << 8 * size) - 1)
        event = next_exit(vcpu)
        assert event == MmioRead(MMIO, size)
        assert isinstance(event, MmioRead)
        event.reply(bytes(range(0xF0, 0xF0 + size)))
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rax == int.from_bytes(bytes(range(0xF0, 0xF0 + size)), "little")


def test_an_mmio_read_that_nobody_answers_gives_all_ones() -> None:
    with guest(f"mov rax, [{MMIO}]; hlt", 64) as vcpu:
        assert next_exit(vcpu) == MmioRead(MMIO, 8)
        next_exit(vcpu)
        assert vcpu.regs.rax == (1 << 64) - 1


@pytest.mark.parametrize("reply", [b"abc", b"abcde", 1 << 32, -1])
def test_an_mmio_answer_of_the_wrong_size_is_refused(reply: int | bytes) -> None:
    with guest(f"mov eax, [{MMIO}]; hlt", 64) as vcpu:
        event = next_exit(vcpu)
        assert isinstance(event, MmioRead)
        with pytest.raises(ReplyError):
            event.reply(reply)


def test_sixteen_bytes_come_as_fragments() -> None:
    source = f"movups xmm0, [{MMIO + 4}]; movups [{MMIO + 0x20}], xmm0; movups [{DATA}], xmm0; hlt"
    value = bytes(range(0x30, 0x40))
    with guest(source, 64, cpuid=True) as vcpu:
        written = bytearray(16)
        reads = 0
        while (event := next_exit(vcpu)) != Hlt():
            if isinstance(event, MmioRead):
                reads += 1
                at = event.address - MMIO - 4
                event.reply(value[at : at + event.size])
            else:
                assert isinstance(event, MmioWrite)
                at = event.address - MMIO - 0x20
                written[at : at + event.size] = event.data
        assert reads >= 2
        assert written == value
        assert vcpu.vm.memory.read(DATA, 16) == value


def test_an_access_that_straddles_the_end_of_ram_is_split() -> None:
    with guest(f"mov rax, [{RAM - 4}]; hlt", 64) as vcpu:
        vcpu.vm.memory.write_u32(RAM - 4, 0x4433_2211)
        event = next_exit(vcpu)
        assert event == MmioRead(RAM, 4)
        assert isinstance(event, MmioRead)
        event.reply(b"\x55\x66\x77\x88")
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rax == 0x8877_6655_4433_2211


def test_read_modify_write_reads_then_writes() -> None:
    with guest(f"inc dword ptr [{MMIO}]; hlt", 64) as vcpu:
        event = next_exit(vcpu)
        assert isinstance(event, MmioRead)
        event.reply(0xFF)
        assert next_exit(vcpu) == MmioWrite(MMIO, b"\0\1\0\0")
        assert next_exit(vcpu) == Hlt()


# How guests stop


def test_hlt_leaves_rip_behind_it() -> None:
    with guest("nop; hlt") as vcpu:
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rip == CODE + 2


def test_a_triple_fault_is_a_shutdown() -> None:
    with guest("ud2", 32) as vcpu:  # protected mode with an empty IDT
        assert next_exit(vcpu) == Shutdown()


def test_an_instruction_that_kvm_cannot_emulate_comes_with_its_bytes() -> None:
    with guest("nop; popcnt rax, rbx; hlt", 64, cpuid=True) as vcpu:
        vcpu.regs.rbx = 0xFF
        event = next_exit(vcpu)
        if event == Hlt():
            assert vcpu.regs.rax == 8
            pytest.skip("this host runs popcnt in ring 0 itself")
        assert isinstance(event, InternalError)
        assert (event.suberror, event.name) == (1, "EMULATION")
        assert event.instruction.startswith(bytes.fromhex("f3480fb8c3"))
        assert vcpu.regs.rip == CODE + 1
        vcpu.regs.rip += 5  # do it for the guest
        vcpu.regs.rax = 8
        assert next_exit(vcpu) == Hlt()


def test_code_where_there_is_no_memory_is_an_internal_error() -> None:
    with guest("nop") as vcpu:
        vcpu.set_protected_mode(entry=0x2000_0000)
        event = next_exit(vcpu)
        assert isinstance(event, InternalError)
        assert event.suberror == 1


def test_a_vm_without_any_memory_says_so() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        vcpu.set_real_mode(entry=0x1000)
        try:
            event = vcpu.run(timeout=PATIENCE)
        except KvmError as refused:
            error = refused
        else:
            assert isinstance(event, InternalError)
            pytest.skip("this host lets the guest run into the emptiness")
    assert error.ioctl == "KVM_RUN"
    assert "add_ram" in str(error)


# MSRs


def test_an_unknown_msr_is_an_exit_and_the_answer_reaches_edx_eax() -> None:
    with guest(f"mov ecx, {UNKNOWN_MSR}; rdmsr; hlt", 64) as vcpu:
        vcpu.vm.exit_on_msrs(KVM_MSR_EXIT_REASON_UNKNOWN)
        event = next_exit(vcpu)
        assert event == RdMsr(UNKNOWN_MSR, KVM_MSR_EXIT_REASON_UNKNOWN)
        assert isinstance(event, RdMsr)
        event.reply(0x1122_3344_5566_7788)
        assert next_exit(vcpu) == Hlt()
        assert (vcpu.regs.rdx, vcpu.regs.rax) == (0x1122_3344, 0x5566_7788)


GP_HANDLER = f"""
    jmp go
    handler: mov al, 0x6D; out 0x66, al; hlt
    go: xor ax, ax
    mov ds, ax
    mov word ptr [13 * 4], offset handler
    mov word ptr [13 * 4 + 2], 0
    mov ecx, {UNKNOWN_MSR}
"""


def test_an_msr_read_that_is_unanswered_or_rejected_is_a_gp() -> None:
    for reject in (False, True):
        with guest(GP_HANDLER + "rdmsr; hlt") as vcpu:
            vcpu.vm.exit_on_msrs(KVM_MSR_EXIT_REASON_UNKNOWN)
            event = next_exit(vcpu)
            assert isinstance(event, RdMsr)
            if reject:
                event.reply(5)
                event.reject()
            assert bytes_out(vcpu) == b"\x6d"


def test_an_msr_write_is_taken_unless_it_is_rejected() -> None:
    for reject, output in ((False, b""), (True, b"\x6d")):
        with guest(GP_HANDLER + "mov eax, 0x55667788; mov edx, 0x11223344; wrmsr; hlt") as vcpu:
            vcpu.vm.exit_on_msrs(KVM_MSR_EXIT_REASON_UNKNOWN)
            event = next_exit(vcpu)
            assert event == WrMsr(UNKNOWN_MSR, 0x1122_3344_5566_7788, KVM_MSR_EXIT_REASON_UNKNOWN)
            assert isinstance(event, WrMsr)
            event.reply()
            if reject:
                event.reject()
            assert bytes_out(vcpu) == output


def test_a_filtered_msr_is_an_exit_and_others_are_not() -> None:
    source = f"""
        mov eax, 7
        xor edx, edx
        mov ecx, {FS_BASE}
        wrmsr
        mov ecx, {KERNEL_GS_BASE}
        wrmsr
        rdmsr
        hlt
    """
    with guest(source, 64, cpuid=True) as vcpu:
        vcpu.vm.exit_on_msrs(KVM_MSR_EXIT_REASON_FILTER)
        vcpu.vm.set_msr_filter([MsrFilterRange(KERNEL_GS_BASE, reads=False)])
        event = next_exit(vcpu)
        assert isinstance(event, WrMsr)
        assert (event.index, event.cause) == (KERNEL_GS_BASE, KVM_MSR_EXIT_REASON_FILTER)
        event.reply()
        assert next_exit(vcpu) == Hlt()  # reading is allowed, and finds that nothing was written
        assert vcpu.regs.rax == 0


def test_a_filter_denies_all_but_what_it_allows() -> None:
    source = f"mov ecx, {KERNEL_GS_BASE}; rdmsr; inc ecx; rdmsr; dec ecx; dec ecx; rdmsr; hlt"
    with guest(source, 64, cpuid=True) as vcpu:
        vcpu.vm.exit_on_msrs(KVM_MSR_EXIT_REASON_FILTER)
        vcpu.vm.set_msr_filter([MsrFilterRange(KERNEL_GS_BASE - 2, 100, allow=[KERNEL_GS_BASE])])
        seen = []
        while (event := next_exit(vcpu)) != Hlt():
            assert isinstance(event, RdMsr)
            event.reply(0)
            seen.append(event.index)
        assert seen == [KERNEL_GS_BASE + 1, KERNEL_GS_BASE - 1]


# EINTR


def test_a_timeout_is_an_interruption_that_says_so() -> None:
    with guest("1: jmp 1b") as vcpu:
        for timeout in (0, 0.001, 0.03, 0.12):
            started = time.monotonic()
            assert vcpu.run(timeout=timeout) == Interrupted(True)
            assert time.monotonic() - started >= timeout


def test_a_timeout_works_in_a_thread() -> None:
    with guest("1: jmp 1b") as vcpu:
        results: list[object] = []
        thread = threading.Thread(target=lambda: results.extend(vcpu.run(timeout=t) for t in (0.001, 0.12, 0, 0.01)))
        thread.start()
        thread.join(PATIENCE)
        assert results == [Interrupted(True)] * 4


def test_timeouts_do_not_disturb_later_runs() -> None:
    with guest("1: in al, 0x10; mov ecx, 2000; 2: dec ecx; jnz 2b; jmp 1b") as vcpu:
        for _ in range(100):
            assert isinstance(vcpu.run(timeout=PATIENCE), IoIn)
            assert isinstance(vcpu.run(timeout=0.0001), (IoIn, Interrupted))
        while vcpu.run(timeout=PATIENCE).reason != 2:
            pytest.fail("an interruption without a reason")


def test_a_guest_survives_many_timeouts() -> None:
    with guest("xor eax, eax; mov ecx, 200000; 1: inc eax; dec ecx; jnz 1b; hlt", 32) as vcpu:
        while (event := vcpu.run(timeout=0.0005)) != Hlt():
            assert event == Interrupted(True)
        assert vcpu.regs.rax == 200_000


def test_a_signal_with_a_handler_of_its_own_is_an_interruption() -> None:
    calls = []
    done = threading.Event()

    def send() -> None:
        # More than one: a signal that comes together with a tick of the timer is taken for the tick.
        while not done.wait(0.007):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))
    sender = threading.Thread(target=send)
    try:
        with guest("1: jmp 1b") as vcpu:
            sender.start()
            assert vcpu.run(timeout=PATIENCE) == Interrupted(False)
            assert calls
    finally:
        done.set()
        sender.join()
        signal.signal(signal.SIGUSR1, previous)


def test_a_handler_that_kicks_ends_the_run_whichever_thread_got_the_signal() -> None:
    with guest("1: jmp 1b") as vcpu:
        previous = signal.signal(signal.SIGUSR1, lambda *_: vcpu.kick())
        done = threading.Event()
        other = threading.Thread(target=done.wait)
        try:
            other.start()
            threading.Timer(0.05, signal.pthread_kill, (other.ident or 0, signal.SIGUSR1)).start()
            assert vcpu.run(timeout=PATIENCE) == Interrupted(False)
        finally:
            done.set()
            other.join()
            signal.signal(signal.SIGUSR1, previous)


def test_a_handler_that_raises_ends_run_and_nothing_is_lost() -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    previous = signal.signal(signal.SIGUSR1, stop)
    try:
        with guest("mov al, 1; out 0x10, al; 1: jmp 1b") as vcpu:
            assert next_exit(vcpu) == IoOut(0x10, b"\1")
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(Stop):
                vcpu.run(timeout=PATIENCE)
            assert vcpu.run(timeout=0.01) == Interrupted(True)
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_exits_goes_on_for_ever() -> None:
    with guest("1: inc al; out 0x10, al; jmp 1b") as vcpu:
        values = []
        for event in vcpu.exits(timeout=PATIENCE):
            assert isinstance(event, IoOut)
            values.append(event.value)
            if len(values) == 300:
                break
        assert values == [number & 0xFF for number in range(1, 301)]
        assert vcpu.last_exit is event


def test_settle_without_a_handler_keeps_what_it_meets_for_the_next_run() -> None:
    with guest(f"movups [{MMIO}], xmm0; hlt", 64, cpuid=True) as vcpu:
        assert next_exit(vcpu) == MmioWrite(MMIO, bytes(8))
        vcpu.settle()
        assert next_exit(vcpu) == MmioWrite(MMIO + 8, bytes(8))
        assert next_exit(vcpu) == Hlt()


def test_settle_is_harmless_when_nothing_is_pending() -> None:
    with guest("mov al, 1; out 0x10, al; hlt") as vcpu:
        vcpu.settle()
        assert vcpu.regs.rip == CODE
        assert next_exit(vcpu) == IoOut(0x10, b"\1")
        vcpu.settle()
        vcpu.settle()
        assert next_exit(vcpu) == Hlt()


def test_two_vcpus_of_one_vm_take_turns() -> None:
    with empty_vm() as vm:
        first = start(vm, "1: inc al; out 0x10, al; jmp 1b")
        second = vm.create_vcpu()
        second.set_real_mode(entry=CODE)
        second.regs.rax = 100
        for number in range(1, 20):
            assert next_exit(first) == IoOut(0x10, bytes([number]))
            assert next_exit(second) == IoOut(0x10, bytes([number + 100]))
