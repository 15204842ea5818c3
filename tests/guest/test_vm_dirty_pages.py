"""Which pages a guest wrote: the dirty log, its manual clearing, and the dirty ring."""

from __future__ import annotations

import pytest

from bare_guest import CODE, RAM, empty_vm, enter, guest, next_exit, start
from kvmpy import MemoryRegion, Vcpu, Vm
from kvmpy.abi.capabilities import Cap
from kvmpy.errors import ClosedError, KvmError, UsageError
from kvmpy.exits import DirtyRingFull, Hlt
from kvmpy.kvm.dirty_ring import DirtyRing

PAGE = 0x1000
FAR = 0x100_0000
PAGES = 130  # not a multiple of 64


def write_to(*pages: int) -> str:
    return "; ".join(f"mov byte ptr [{FAR + page * PAGE + 9}], 1" for page in pages) + "; hlt"


def logged(vm: Vm) -> MemoryRegion:
    return vm.add_memory(MemoryRegion.anonymous(FAR, PAGES * PAGE), log_dirty=True)


def run(vcpu: Vcpu, *pages: int) -> None:
    enter(vcpu, write_to(*pages), 32)
    assert next_exit(vcpu) == Hlt()


def addresses(*pages: int) -> list[int]:
    return [FAR + page * PAGE for page in pages]


def bitmap(*pages: int) -> bytes:
    return sum(1 << page for page in pages).to_bytes((PAGES + 63) // 64 * 8, "little")


def test_the_dirty_log_names_the_pages_written_since_the_last_look() -> None:
    with guest("hlt", 32) as vcpu:
        region = logged(vcpu.vm)
        assert vcpu.vm.dirty_pages(region) == []
        run(vcpu, 0, 5, 63, 64, 129)
        assert vcpu.vm.dirty_bitmap(region) == bitmap(0, 5, 63, 64, 129)
        assert vcpu.vm.dirty_pages(region) == []
        run(vcpu, 5)
        assert vcpu.vm.dirty_pages(region) == addresses(5)


def test_writes_by_python_and_reads_by_the_guest_are_not_in_it() -> None:
    with guest(f"mov al, [{FAR}]; hlt", 32) as vcpu:
        region = logged(vcpu.vm)
        vcpu.vm.memory.write_u8(FAR + PAGE, 1)
        next_exit(vcpu)
        assert vcpu.vm.dirty_pages(region) == []


def test_logging_is_switched_on_and_off() -> None:
    with guest("hlt", 32) as vcpu:
        region = vcpu.vm.add_ram(FAR, size=PAGES * PAGE)
        with pytest.raises(KvmError, match="set_dirty_logging"):
            vcpu.vm.dirty_pages(region)
        run(vcpu, 1)
        vcpu.vm.set_dirty_logging(region)
        run(vcpu, 2)
        assert vcpu.vm.dirty_pages(region) == addresses(2)
        vcpu.vm.set_dirty_logging(region, False)
        run(vcpu, 3)
        with pytest.raises(KvmError):
            vcpu.vm.dirty_pages(region)


def test_a_log_that_is_cleared_by_hand_stays_until_then() -> None:
    with guest("hlt", 32) as vcpu:
        vcpu.vm.enable_manual_dirty_log()
        region = logged(vcpu.vm)
        run(vcpu, 1, 70)
        assert vcpu.vm.dirty_pages(region) == addresses(1, 70)
        assert vcpu.vm.dirty_pages(region) == addresses(1, 70)
        vcpu.vm.clear_dirty_bitmap(region, bitmap(1))
        assert vcpu.vm.dirty_pages(region) == addresses(70)
        run(vcpu, 1)
        assert vcpu.vm.dirty_pages(region) == addresses(1, 70)
        # The last 66 pages, which are no multiple of 64, from page 64 on.
        vcpu.vm.clear_dirty_bitmap(region, (1 << (70 - 64)).to_bytes(16, "little"), first_page=64)
        assert vcpu.vm.dirty_pages(region) == addresses(1)


def test_a_log_may_begin_with_everything_dirty() -> None:
    with guest("hlt", 32) as vcpu:
        if not vcpu.vm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2) & 2:
            pytest.skip("this host's KVM has no KVM_DIRTY_LOG_INITIALLY_SET")
        vcpu.vm.enable_manual_dirty_log(initially_set=True)
        region = logged(vcpu.vm)
        assert vcpu.vm.dirty_pages(region) == addresses(*range(PAGES))


def test_clearing_from_an_odd_page_is_refused() -> None:
    with guest("hlt", 32) as vcpu:
        vcpu.vm.enable_manual_dirty_log()
        region = logged(vcpu.vm)
        with pytest.raises(KvmError, match="KVM_CLEAR_DIRTY_LOG"):
            vcpu.vm.clear_dirty_bitmap(region, bytes(8), first_page=3)


# The ring


def ringed(vm: Vm, entries: int = 256) -> tuple[Vcpu, DirtyRing, MemoryRegion]:
    if not vm.check_extension(Cap.DIRTY_LOG_RING):
        pytest.skip("this host's KVM has no dirty ring")
    vm.enable_dirty_ring(entries * 16)
    region = logged(vm)
    vcpu = start(vm, "hlt", 32)
    return vcpu, DirtyRing(vcpu), region


def test_the_ring_names_pages_in_the_order_of_writing() -> None:
    with empty_vm() as vm:
        vcpu, ring, region = ringed(vm)
        slot = vm.slot_number(region)
        assert ring.collect() == []
        run(vcpu, 7, 3, 7, 100)
        seen = ring.collect()
        assert list(dict.fromkeys(seen)) == [(slot, 7), (slot, 3), (slot, 100)]
        assert ring.collect() == []
        assert vm.reset_dirty_rings() == len(seen)
        assert vm.reset_dirty_rings() == 0
        run(vcpu, 3)
        assert ring.collect() == [(slot, 3)]


def test_the_ring_wraps_round() -> None:
    with empty_vm() as vm:
        vcpu, ring, region = ringed(vm)
        slot = vm.slot_number(region)
        for round in range(60):
            pages = [(round * 7 + index) % PAGES for index in range(9)]
            run(vcpu, *pages)
            assert ring.collect() == [(slot, page) for page in pages]
            vm.reset_dirty_rings()


def test_a_full_ring_is_an_exit() -> None:
    with empty_vm() as vm:
        if not vm.check_extension(Cap.DIRTY_LOG_RING):
            pytest.skip("this host's KVM has no dirty ring")
        vm.enable_dirty_ring(0x1000)
        count = 1000
        region = vm.add_memory(MemoryRegion.anonymous(FAR, count * PAGE), log_dirty=True)
        # Slowly: a KVM that emulates looks at its ring every 1024 instructions only, and it has 64 entries in reserve.
        source = f"""
            mov edi, {FAR}
            mov ecx, {count}
        1:  mov byte ptr [edi], 1
            add edi, {PAGE}
            mov eax, 20
        2:  dec eax
            jnz 2b
            loop 1b
            hlt
        """
        vcpu = start(vm, source, 32)
        ring = DirtyRing(vcpu)
        seen: list[tuple[int, int]] = []
        full = 0
        while (event := next_exit(vcpu)) != Hlt():
            assert event == DirtyRingFull()
            full += 1
            assert full < 100
            seen += ring.collect()
            vm.reset_dirty_rings()
        seen += ring.collect()
        assert full > 1
        assert seen == [(vm.slot_number(region), page) for page in range(count)]


def test_with_a_ring_there_is_no_log() -> None:
    with empty_vm() as vm:
        _, _, region = ringed(vm)
        with pytest.raises(KvmError, match="read the ring"):
            vm.dirty_bitmap(region)


def test_a_ring_comes_before_the_first_vcpu() -> None:
    with guest("hlt") as vcpu:
        with pytest.raises(UsageError, match="before the first"):
            vcpu.vm.enable_dirty_ring(0x1000)
        with pytest.raises(UsageError, match="no dirty rings"):
            DirtyRing(vcpu)


def test_a_ring_is_closed_with_its_vcpu() -> None:
    with empty_vm() as vm:
        _, ring, _ = ringed(vm)
    with pytest.raises(ClosedError):
        ring.collect()


def test_a_ring_of_an_impossible_size_is_refused() -> None:
    with empty_vm() as vm:
        if not vm.check_extension(Cap.DIRTY_LOG_RING):
            pytest.skip("this host's KVM has no dirty ring")
        with pytest.raises(KvmError):
            vm.enable_dirty_ring(1000)
        assert vm.dirty_ring_size == 0


def test_the_program_itself_is_not_in_the_log() -> None:
    with guest("hlt", 32) as vcpu:
        region = logged(vcpu.vm)
        assert CODE < RAM < region.address
        next_exit(vcpu)
        assert vcpu.vm.dirty_pages(region) == []
