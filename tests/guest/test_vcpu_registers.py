"""Live registers: what is set reaches the guest, what the guest does is seen, and nothing is ever stale."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bare_guest import CODE, DATA, bytes_out, guest, next_exit, run_to_hlt
from kvmpy import Kvm, Vcpu
from kvmpy.abi.structs import kvm_regs, kvm_sregs
from kvmpy.errors import EntryRefusedError, RegisterValueError, UsageError
from kvmpy.exits import Hlt, IoIn, IoOut
from kvmpy.x86.flags import Cr0
from kvmpy.x86.registers import GENERAL_REGISTERS, DescriptorTable, Registers, Segment, SystemRegisters

GENERAL = [name for name in GENERAL_REGISTERS if name not in ("rip", "rflags", "rsp")]


@pytest.fixture(params=[True, False], ids=["sync_regs", "ioctls"])
def sync_regs(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def vcpu(sync_regs: bool) -> Iterator[Vcpu]:
    with guest("1: in al, 0x10; out 0x11, al; jmp 1b", sync_regs=sync_regs) as vcpu:
        yield vcpu


def raw_regs(vcpu: Vcpu) -> kvm_regs:
    regs = kvm_regs()
    vcpu.ioctl("KVM_GET_REGS", regs)
    return regs


def raw_sregs(vcpu: Vcpu) -> kvm_sregs:
    sregs = kvm_sregs()
    vcpu.ioctl("KVM_GET_SREGS", sregs)
    return sregs


def test_every_general_register_goes_into_the_guest_and_back(sync_regs: bool) -> None:
    # The guest turns every register over, so that a value which never left Python would be seen.
    source = "; ".join(f"not {name}" for name in [*GENERAL, "rsp"]) + "; hlt"
    with guest(source, 64, sync_regs=sync_regs) as vcpu:
        values = {name: 0x0123_4567_89AB_CD00 + index for index, name in enumerate([*GENERAL, "rsp"])}
        for name, value in values.items():
            setattr(vcpu.regs, name, value)
        assert next_exit(vcpu) == Hlt()
        for name, value in values.items():
            assert getattr(vcpu.regs, name) == value ^ 0xFFFF_FFFF_FFFF_FFFF, name


def test_rip_and_rflags_go_into_the_guest_and_back(sync_regs: bool) -> None:
    with guest("hlt; stc; std; hlt", sync_regs=sync_regs) as vcpu:
        vcpu.regs.rip = CODE + 1
        vcpu.regs.rflags = 0x42  # ZF
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rip == CODE + 4
        assert vcpu.regs.rflags & 0x441 == 0x441  # DF, ZF, CF


def test_the_registers_of_a_fresh_vcpu_are_those_of_reset() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        assert vcpu.regs.rip == 0xFFF0
        assert vcpu.sregs.cs.selector == 0xF000
        assert vcpu.sregs.cs.base == 0xFFFF_0000


@pytest.mark.parametrize("name", ["ds", "es", "fs", "gs"])
def test_a_segment_reaches_the_guest(name: str, sync_regs: bool) -> None:
    with guest(f"mov ax, {name}; mov bl, {name}:[0]; hlt", sync_regs=sync_regs) as vcpu:
        vcpu.vm.memory.write_u8(DATA + 0x123, 0x5A)
        setattr(vcpu.sregs, name, Segment(0x0777, DATA + 0x123, 0xFFFF, type=3))
        assert next_exit(vcpu) == Hlt()
        assert vcpu.regs.rax & 0xFFFF == 0x0777
        assert vcpu.regs.rbx & 0xFF == 0x5A
        assert getattr(vcpu.sregs, name).base == DATA + 0x123


def test_segments_that_the_guest_loads_are_seen(sync_regs: bool) -> None:
    with guest("mov ax, 0x234; mov es, ax; hlt; mov ax, 0x345; mov es, ax; hlt", sync_regs=sync_regs) as vcpu:
        next_exit(vcpu)
        assert (vcpu.sregs.es.selector, vcpu.sregs.es.base) == (0x234, 0x2340)
        next_exit(vcpu)
        assert (vcpu.sregs.es.selector, vcpu.sregs.es.base) == (0x345, 0x3450)


def test_tables_and_control_registers_go_in_and_out(sync_regs: bool) -> None:
    source = f"sgdt [{DATA}]; sidt [{DATA + 16}]; mov rax, cr0; mov rbx, cr2; mov rcx, cr3; mov rdx, cr4; hlt"
    with guest(source, 64, sync_regs=sync_regs) as vcpu:
        before = vcpu.sregs.copy()
        vcpu.sregs.gdt = DescriptorTable(0xFFFF_8000_1234_5000, 0x1237)
        vcpu.sregs.idt = DescriptorTable(0x4_5000, 0x0FFF)
        vcpu.sregs.cr2 = 0x1234_5678_9ABC
        vcpu.sregs.cr0 |= Cr0.TS
        next_exit(vcpu)
        memory = vcpu.vm.memory
        assert (memory.read_u16(DATA), memory.read_u64(DATA + 2)) == (0x1237, 0xFFFF_8000_1234_5000)
        assert (memory.read_u16(DATA + 16), memory.read_u64(DATA + 18)) == (0x0FFF, 0x4_5000)
        assert vcpu.regs.rax == before.cr0 | Cr0.TS == vcpu.sregs.cr0
        assert vcpu.regs.rbx == 0x1234_5678_9ABC == vcpu.sregs.cr2
        assert vcpu.regs.rcx == before.cr3
        assert vcpu.regs.rdx == before.cr4


@pytest.mark.parametrize("value", [-1, 1 << 64, 1 << 100, 1.5, "1", None, b"\1"])
def test_a_value_that_does_not_fit_is_refused_and_changes_nothing(vcpu: Vcpu, value: int) -> None:
    vcpu.regs.rax = 5
    with pytest.raises(RegisterValueError, match="rax is 64 bits wide"):
        vcpu.regs.rax = value
    with pytest.raises(RegisterValueError, match="cr3"):
        vcpu.sregs.cr3 = value
    assert vcpu.regs.rax == 5


def test_the_largest_value_fits(vcpu: Vcpu) -> None:
    vcpu.regs.r15 = (1 << 64) - 1
    assert raw_regs(vcpu).r15 == (1 << 64) - 1


@pytest.mark.parametrize(
    "segment",
    [
        Segment(base=1 << 64), Segment(limit=1 << 32), Segment(0x10000), Segment(type=16), Segment(dpl=4),
        Segment(present=2), Segment(g=-1), Segment(s=2),
    ],
)  # fmt: skip
def test_a_segment_field_that_does_not_fit_is_refused(vcpu: Vcpu, segment: Segment) -> None:
    with pytest.raises(RegisterValueError, match=r"fs\."):
        vcpu.sregs.fs = segment
    assert vcpu.sregs.fs.limit == 0xFFFF


@pytest.mark.parametrize("value", [0, None, (1, 2), DescriptorTable()])
def test_a_segment_register_takes_only_a_segment(vcpu: Vcpu, value: Segment) -> None:
    with pytest.raises(UsageError, match="cs takes a"):
        vcpu.sregs.cs = value


def test_a_table_register_takes_only_a_fitting_table(vcpu: Vcpu) -> None:
    with pytest.raises(RegisterValueError, match=r"gdt\.limit"):
        vcpu.sregs.gdt = DescriptorTable(0, 0x1_0000)
    with pytest.raises(RegisterValueError, match=r"idt\.base"):
        vcpu.sregs.idt = DescriptorTable(-1, 0)
    with pytest.raises(UsageError, match="gdt takes a"):
        vcpu.sregs.gdt = Segment()


@pytest.mark.parametrize("name", ["eax", "pc", "rp", "cs", "_cells2"])
def test_a_misspelt_register_is_an_error(vcpu: Vcpu, name: str) -> None:
    with pytest.raises(AttributeError, match="no register"):
        setattr(vcpu.regs, name, 1)
    with pytest.raises(AttributeError, match="no register"):
        setattr(vcpu.sregs, name if name != "cs" else "cr1", 1)


def test_an_assignment_that_fails_half_way_changes_nothing(vcpu: Vcpu) -> None:
    before = vcpu.sregs.copy()
    wrong = SystemRegisters()
    wrong.cs = Segment(0x4321)
    wrong.idt = DescriptorTable(0, 1 << 16)  # checked after the segments
    with pytest.raises(RegisterValueError):
        vcpu.sregs.assign(wrong)
    assert vcpu.sregs.copy() == before
    registers = Registers(rax=1)
    registers.r15 = -1
    with pytest.raises(RegisterValueError):
        vcpu.regs.assign(registers)
    assert vcpu.regs.rax == 0


def test_a_copy_does_not_change_any_more(vcpu: Vcpu) -> None:
    regs, sregs = vcpu.regs.copy(), vcpu.sregs.copy()
    vcpu.regs.rbx = 77
    vcpu.sregs.cr2 = 77
    assert (regs.rbx, sregs.cr2) == (0, 0)
    regs.rcx = 5
    assert vcpu.regs.rcx == 0


def test_set_registers_reach_other_ioctls_first(vcpu: Vcpu) -> None:
    vcpu.regs.rip = 0x1234
    vcpu.sregs.cr2 = 0x777
    vcpu.get_msrs([0x10])
    assert raw_regs(vcpu).rip == 0x1234
    assert raw_sregs(vcpu).cr2 == 0x777


def test_registers_set_behind_the_live_objects_are_seen(vcpu: Vcpu) -> None:
    assert vcpu.regs.rax == 0
    assert vcpu.sregs.cr2 == 0
    regs, sregs = raw_regs(vcpu), raw_sregs(vcpu)
    regs.rax, sregs.cr2 = 0x55, 0x66
    vcpu.ioctl("KVM_SET_REGS", regs)
    vcpu.ioctl("KVM_SET_SREGS", sregs)
    assert (vcpu.regs.rax, vcpu.sregs.cr2) == (0x55, 0x66)


def test_an_msr_that_is_also_a_register_is_seen(vcpu: Vcpu) -> None:
    assert vcpu.sregs.fs.base == CODE >> 4 & 0  # real mode, segment 0
    vcpu.set_msr(0xC000_0100, 0x7_0000)  # FS.BASE
    assert vcpu.sregs.fs.base == 0x7_0000


def test_registers_are_right_in_a_handler_and_after_it(vcpu: Vcpu) -> None:
    for number in range(1, 50):
        event = next_exit(vcpu)
        assert isinstance(event, IoIn)
        assert vcpu.regs.rip == CODE  # an `in` completes only with the next run
        event.reply(number)
        vcpu.regs.rbx = number << 8
        event = next_exit(vcpu)
        assert event == IoOut(0x11, bytes([number]))
        assert vcpu.regs.rax & 0xFF == number
        assert vcpu.regs.rbx == number << 8
        assert vcpu.regs.rip == CODE + 4


def test_settle_completes_the_access_and_the_registers_show_it(vcpu: Vcpu) -> None:
    event = next_exit(vcpu)
    assert isinstance(event, IoIn)
    event.reply(0x42)
    vcpu.settle()
    assert vcpu.regs.rip == CODE + 2
    assert vcpu.regs.rax & 0xFF == 0x42
    assert raw_regs(vcpu).rip == CODE + 2


def test_system_registers_written_between_runs_without_ever_being_read(sync_regs: bool) -> None:
    with guest("1: mov al, [0]; out 0x10, al; jmp 1b", sync_regs=sync_regs) as vcpu:
        for base, value in ((DATA, 1), (DATA + 0x100, 2), (DATA, 1)):
            vcpu.vm.memory.write_u8(base, value)
            sregs = SystemRegisters()
            sregs.ds = Segment(base >> 4, base)
            sregs.cr0 = 0x10
            vcpu.sregs.assign(sregs)
            vcpu.regs.rip = CODE
            assert next_exit(vcpu) == IoOut(0x10, bytes([value]))


def test_the_pending_interrupt_is_a_register(sync_regs: bool) -> None:
    with guest("sti; nop; hlt", sync_regs=sync_regs) as vcpu:
        assert vcpu.sregs.interrupt is None
        vcpu.interrupt(0x21)
        assert vcpu.sregs.interrupt == 0x21
        with pytest.raises(RegisterValueError):
            vcpu.sregs.interrupt = 256


def test_registers_print_with_names_and_flags(vcpu: Vcpu) -> None:
    vcpu.regs.rax = 0xDEAD_BEEF
    vcpu.regs.rflags = 0x46
    text = str(vcpu.regs).lower()
    assert "deadbeef" in text
    assert "rip" in text
    assert "zf" in text
    assert "pe" in str(vcpu.sregs).lower()
    assert "rip=0x1000" in repr(vcpu.regs)
    assert "cr0" in repr(vcpu.sregs)


def test_a_refused_state_names_the_rule_and_can_be_put_right(vcpu: Vcpu) -> None:
    vcpu.sregs.cr0 |= Cr0.PG
    with pytest.raises(EntryRefusedError, match=r"kvm\.cr0\.pg") as refused:
        next_exit(vcpu)
    assert [violation.rule for violation in refused.value.violations] == ["kvm.cr0.pg"]
    with pytest.raises(EntryRefusedError):  # still there, and still wrong
        vcpu.get_events()
    vcpu.sregs.cr0 &= ~Cr0.PG
    assert isinstance(next_exit(vcpu), IoIn)


def test_a_refused_change_in_the_midst_of_a_run_does_not_lose_its_values(vcpu: Vcpu) -> None:
    assert isinstance(next_exit(vcpu), IoIn)
    assert vcpu.sregs.cr2 == 0  # from now on KVM copies system registers out at every exit
    assert isinstance(next_exit(vcpu), IoOut)
    vcpu.sregs.cr2 = 0x99
    vcpu.sregs.cr4 = 1 << 63
    with pytest.raises(EntryRefusedError, match=r"kvm\.cr4\.bits"):
        next_exit(vcpu)
    assert (vcpu.sregs.cr2, vcpu.sregs.cr4) == (0x99, 1 << 63)
    vcpu.sregs.cr4 = 0
    assert isinstance(next_exit(vcpu), IoIn)
    assert raw_sregs(vcpu).cr2 == 0x99


def test_both_ways_to_move_registers_see_the_same_guest() -> None:
    source = """
        mov cx, 20
    1:  add ax, cx
        xor bx, ax
        out 0x10, ax
        loop 1b
        hlt
    """
    traces = []
    for sync_regs in (True, False):
        with guest(source, sync_regs=sync_regs) as vcpu:
            trace = []
            for _ in range(21):
                event = next_exit(vcpu)
                trace.append((event, str(vcpu.regs), str(vcpu.sregs)))
                vcpu.regs.rdx += 1
            traces.append(trace)
    assert traces[0] == traces[1]
    assert traces[0][-1][0] == Hlt()


def test_modes_can_be_changed_from_run_to_run() -> None:
    from bare_guest import enter

    with guest("mov al, 1; out 0x10, al; hlt", cpuid=True) as vcpu:
        assert bytes_out(vcpu) == b"\1"
        enter(vcpu, "mov eax, 0x22222222; out 0x10, eax; hlt", 32)
        assert bytes_out(vcpu) == b"\x22" * 4
        enter(vcpu, "mov r8, 0x3333333344444444; shr r8, 32; mov eax, r8d; out 0x10, eax; hlt", 64)
        assert bytes_out(vcpu) == b"\x33" * 4
        enter(vcpu, "mov al, 4; out 0x10, al; hlt")
        assert bytes_out(vcpu) == b"\4"


def test_setting_a_mode_wakes_a_processor_that_halted_inside_kvm() -> None:
    from bare_guest import empty_vm, enter, run_until_halted, start

    with empty_vm() as vm:
        vm.create_irqchip()
        vcpu = start(vm, "cli; hlt")
        run_until_halted(vcpu)
        enter(vcpu, "out 0x10, al; hlt")
        assert next_exit(vcpu) == IoOut(0x10, b"\0")


def test_set_long_mode_wants_exactly_one_kind_of_tables(vcpu: Vcpu) -> None:
    with pytest.raises(UsageError, match="cr3="):
        vcpu.set_long_mode(entry=CODE)
    with pytest.raises(UsageError, match="cr3="):
        vcpu.set_long_mode(entry=CODE, cr3=0x2000, tables=0x4000)


def test_ring_3_of_long_mode_runs_and_may_use_ports() -> None:
    with guest("mov eax, 0x77; out 0x10, al; jmp .", 64, ring=3, cpuid=True) as vcpu:
        assert next_exit(vcpu) == IoOut(0x10, b"\x77")
        assert vcpu.sregs.cs.dpl == 3


def test_run_to_hlt_sees_the_registers_of_the_end() -> None:
    with guest("mov cx, 5; 1: inc ax; loop 1b; hlt") as vcpu:
        assert run_to_hlt(vcpu) == []
        assert (vcpu.regs.rax, vcpu.regs.rcx) == (5, 0)
