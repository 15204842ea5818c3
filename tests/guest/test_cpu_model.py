"""What a machine's processors are: guests ask CPUID, MSRs and the local APIC."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import pytest

from cpu_topology_decoding import (
    Cpuid,
    Place,
    by_amd_leaves,
    by_extended_topology,
    by_leaf_4,
    caches,
    initial_apic_id,
    processors_of_package,
)
from gnu_toolchain import assemble
from kvmpy import End, Kvm, KvmError, Machine, MiB, UsageError
from kvmpy.boot import FlatImage, MultibootKernel
from kvmpy.cli import guest_probe
from kvmpy.machine.firmware_settings import mtrr_values
from kvmpy.machine.hypercall_probe import hypercalls_return
from kvmpy.x86.cpu_templates import CpuTemplate, cpu_template
from kvmpy.x86.cpuid import CpuidEntry, CpuidTable
from kvmpy.x86.msrs import Msr, mtrr_variable
from multiboot_files import Header1, elf_kernel

KIB = 1024
CODE, QUESTIONS, ANSWERS, ROOM = 0x1000, 0x3000, 0x5000, 0x800

# What SI points at: leaf and subleaf, up to leaf -1. The answers go where DI points.
ASK_CPUID = """
1:  mov eax, [si]
    cmp eax, -1
    je 2f
    mov ecx, [si + 4]
    cpuid
    mov [di], eax
    mov [di + 4], ebx
    mov [di + 8], ecx
    mov [di + 12], edx
    add si, 8
    add di, 16
    jmp 1b
2:  cli
    hlt
"""
LEAVES = (
    (0, 0), (1, 0), (7, 0), (0xD, 0), (0x15, 0), (0x4000_0000, 0), (0x4000_0001, 0), (0x4000_0010, 0),
    *((0x8000_0000 + number, 0) for number in range(9)), (0x8000_001E, 0),
    *((leaf, subleaf) for leaf in (0x4, 0xB, 0x1F, 0x8000_001D) for subleaf in range(5)),
)  # fmt: skip


def seen(machine: Machine) -> list[Cpuid]:
    """What CPUID answers on each processor of a machine, in real mode."""
    questions = b"".join(struct.pack("<2I", *leaf) for leaf in LEAVES) + b"\xff" * 4
    machine.load(FlatImage(assemble(ASK_CPUID, bits=16, address=CODE), address=CODE, mode="real"))
    machine.memory.write(QUESTIONS, questions)
    for number, vcpu in enumerate(machine.vcpus):
        vcpu.set_real_mode(CODE)
        vcpu.regs.rsi, vcpu.regs.rdi = QUESTIONS, ANSWERS + number * ROOM
    assert machine.run(timeout=20).end is End.HALTED

    def processor(number: int) -> Cpuid:
        answers = {
            leaf: struct.unpack("<4I", machine.memory.read(ANSWERS + number * ROOM + 16 * place, 16))
            for place, leaf in enumerate(LEAVES)
        }
        return lambda leaf, subleaf: answers.get((leaf, subleaf), (0, 0, 0, 0))

    return [processor(number) for number in range(len(machine.vcpus))]


def of_amd(cpuid: Cpuid) -> bool:
    return cpuid(0, 0)[1] == 0x6874_7541


def machine_with(cpu: str | CpuTemplate | Mapping[str, Any] | CpuidTable, vcpus: int = 1, **options: Any) -> Machine:
    return Machine(memory=64 * KIB, vcpus=vcpus, cpu=cpu, **options)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_guests_find_out_how_many_processors_there_are_and_which_they_run_on(count: int) -> None:
    with machine_with("host", count) as machine:
        cpus = seen(machine)
    cores = [Place(0, number, 0) for number in range(count)]
    assert [initial_apic_id(cpu) for cpu in cpus] == list(range(count))
    if of_amd(cpus[0]):
        assert [by_amd_leaves(cpu) for cpu in cpus] == cores
        leaf = 0x8000_001D
    else:
        assert [by_leaf_4(cpu) for cpu in cpus] == cores
        leaf = 0x4
    assert count <= processors_of_package(cpus[0]) < 2 * count
    if cpus[0](0, 0)[0] >= 0xB:
        assert [by_extended_topology(cpu) for cpu in cpus] == cores
    for number in range(count):
        for cache in caches(cpus[number], leaf, number):
            assert cache.shared_by == (number if cache.level < 3 else 0)


def test_guests_are_told_the_frequencies_of_their_clocks() -> None:
    with machine_with("host") as machine:
        (cpu,) = seen(machine)
        khz = machine.vcpus[0].get_tsc_khz()
    if not cpu(0x8000_0007, 0)[3] >> 8 & 1:
        pytest.skip("this host's TSC is not invariant")
    tsc, apic, _, _ = cpu(0x4000_0010, 0)
    assert abs(tsc - khz) <= khz // 1000
    assert apic == 1_000_000
    assert cpu(0x4000_0000, 0)[0] == 0x4000_0010


def test_hypercalls_are_asked_for_only_where_they_return() -> None:
    with Kvm() as kvm:
        cpuid = kvm.supported_cpuid()
        answers = guest_probe.hypercalls(kvm, cpuid)
        amd = cpuid.vendor in ("AuthenticAMD", "HygonGenuine")
        returns = hypercalls_return(kvm, amd)
    assert returns == (answers["vmmcall" if amd else "vmcall"] == "answered")
    features = {"kvm_pv_unhalt", "kvm_pv_send_ipi", "kvm_pv_sched_yield"}
    for count in (1, 2):
        with machine_with("host", count) as machine:
            found = machine.vcpus[0].get_cpuid().features()
        assert found & features == (cpuid.features() & features if returns and count > 1 else set())
        assert "kvmclock" in found


def test_plain_hides_what_is_in_leaves_of_its_own() -> None:
    with machine_with("plain") as machine:
        (cpu,) = seen(machine)
    assert cpu(0xD, 0)[0] == 0
    assert cpu(0, 0)[0] == 0xC
    assert not cpu(0x8000_0001, 0)[2] >> 5 & 1  # LZCNT, which KVM's emulator takes for BSR
    assert not cpu(1, 0)[2] >> 13 & 1  # CMPXCHG16B
    if of_amd(cpu):
        assert cpu(7, 0) == (0, 0, 0, 0)
    assert not cpu(7, 0)[1]


def test_a_dict_says_what_the_processor_is() -> None:
    template = {"base": "plain", "vendor": "GenuineIntel", "brand": "kvmpy", "features": {"nx": False}}
    with machine_with(template) as machine:
        (cpu,) = seen(machine)
    assert struct.pack("<3I", cpu(0, 0)[1], cpu(0, 0)[3], cpu(0, 0)[2]) == b"GenuineIntel"
    assert struct.pack("<4I", *cpu(0x8000_0002, 0)).rstrip(b"\0") == b"kvmpy"
    assert not cpu(0x8000_0001, 0)[3] >> 20 & 1


def test_msrs_of_a_template_are_set_on_every_processor() -> None:
    with machine_with({"msrs": {"SYSENTER_EIP": 0x1234, "PAT": 0x0007_0406_0007_0406}}, 2) as machine:
        for vcpu in machine.vcpus:
            assert vcpu.get_msr(Msr.SYSENTER_EIP) == 0x1234


def test_an_msr_that_kvm_does_not_have_is_named() -> None:
    with pytest.raises(KvmError, match="MSR 0x12345678"):
        machine_with({"msrs": {0x1234_5678: 1}})


def test_what_is_no_template_is_refused_before_anything_is_opened() -> None:
    with pytest.raises(UsageError, match="no CPU template is named 'hots'"):
        machine_with("hots")
    with pytest.raises(UsageError, match="is a name, a dict or a CpuTemplate, not None"):
        Machine(cpu=None)  # type: ignore[arg-type]


def test_a_table_is_taken_as_it_is_but_for_apic_ids() -> None:
    with Kvm() as kvm:
        table = kvm.supported_cpuid()
    table.put(CpuidEntry(0x8000_0005, eax=0x1234))
    table.put(CpuidEntry(0xB, 0, ebx=7, ecx=0x100, flags=1))
    with machine_with(table, 2) as machine:
        for number, vcpu in enumerate(machine.vcpus):
            given = vcpu.get_cpuid()
            assert given.find(0x8000_0005) == CpuidEntry(0x8000_0005, eax=0x1234)
            assert given.find(0xB, 0) == CpuidEntry(0xB, 0, ebx=7, ecx=0x100, edx=number, flags=1)
            assert len(given) == len(table)


def test_without_an_irqchip_there_is_no_local_apic() -> None:
    with machine_with("host", irqchip=False) as machine:
        table = machine.vcpus[0].get_cpuid()
    assert not table.features() & {"x2apic", "tsc_deadline_timer", "kvm_pv_eoi", "kvm_asyncpf_int"}


def test_a_template_that_was_saved_here_makes_the_same_processor() -> None:
    with Kvm() as kvm:
        table = cpu_template("portable").table(kvm.supported_cpuid())
    with machine_with("portable", 2) as one, machine_with(CpuTemplate.of_table("kept", table), 2) as other:
        assert one.vcpus[1].get_cpuid() == other.vcpus[1].get_cpuid()


# As a firmware leaves it

MSRS = (
    Msr.MTRR_CAP, Msr.MTRR_DEF_TYPE, Msr.MTRR_FIX64K_00000, Msr.MTRR_FIX16K_A0000, Msr.MTRR_FIX4K_F8000,
    mtrr_variable(0, "base"), mtrr_variable(0, "mask"), Msr.PAT, Msr.APIC_BASE,
)  # fmt: skip
LOCAL_APIC = (0xF0, 0x350, 0x360)
FOUND = 0x20_0000


def kernel(code: str) -> MultibootKernel:
    """A Multiboot kernel: 32-bit code, and no firmware before it."""
    header = Header1().to_bytes()
    return MultibootKernel(elf_kernel(header, assemble(code, bits=32, address=0x10_0010)))


def test_a_kernel_finds_memory_types_and_virtual_wire_mode() -> None:
    lines = [f"mov edi, {FOUND}"]
    for number in MSRS:
        lines.append(f"mov ecx, {int(number)}; rdmsr; mov [edi], eax; mov [edi + 4], edx; add edi, 8")
    for register in LOCAL_APIC:
        lines.append(f"mov eax, [0xfee00000 + {register}]; mov [edi], eax; add edi, 4")
    with Machine(memory=4 * MiB, vcpus=2) as machine:
        machine.load(kernel("\n".join([*lines, "cli; hlt"])))
        assert machine.run(timeout=20).end is End.HALTED
        values = struct.unpack(f"<{len(MSRS)}Q", machine.memory.read(FOUND, 8 * len(MSRS)))
        apic = struct.unpack("<3I", machine.memory.read(FOUND + 8 * len(MSRS), 12))
        second = machine.vcpus[1].get_msrs(MSRS[1:-1])
        untouched = bytes(machine.vcpus[1].get_lapic())
        sizes = machine.vcpus[0].get_cpuid().find(0x8000_0008)
    found = dict(zip(MSRS, values, strict=True))
    assert found[Msr.MTRR_DEF_TYPE] == 0xC06  # on, fixed ranges on, write-back
    assert found[Msr.MTRR_FIX64K_00000] == 0x0606_0606_0606_0606
    assert found[Msr.MTRR_FIX16K_A0000] == 0
    assert found[mtrr_variable(0, "base")] == 0xC000_0000  # uncached
    mask = found[mtrr_variable(0, "mask")]
    assert mask >> 11 & 1
    assert sizes is not None
    assert mask >> 12 << 12 == (1 << (sizes.eax & 0xFF)) - 0x4000_0000
    assert found[Msr.PAT] == 0x0007_0406_0007_0406
    assert found[Msr.APIC_BASE] & 0xFFFF_F900 == 0xFEE0_0900
    assert second == {number: found[number] for number in MSRS[1:-1]}
    spurious, lint0, lint1 = apic
    assert spurious & 0x100
    assert lint0 & 0x1_0700 == 0x700
    assert lint1 & 0x1_0700 == 0x400
    assert int.from_bytes(untouched[0x350:0x354], "little") & 0x1_0000


def test_interrupts_of_the_pics_reach_a_kernel_that_leaves_the_local_apic_alone() -> None:
    code = """
        mov eax, offset handler
        mov word ptr [idt + 0x20 * 8], ax
        mov word ptr [idt + 0x20 * 8 + 2], cs
        mov word ptr [idt + 0x20 * 8 + 4], 0x8e00
        shr eax, 16
        mov word ptr [idt + 0x20 * 8 + 6], ax
        lidt [pointer]
        mov esp, 0x180000
        mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al
        mov al, 0xfe; out 0x21, al
        mov al, 0x34; out 0x43, al; xor al, al; out 0x40, al; mov al, 0x10; out 0x40, al
        sti
        1: hlt; jmp 1b
    handler:
        mov byte ptr [0x200000], 1
        cli
        hlt
    pointer:
        .word 0x21 * 8 - 1
        .long idt
        .balign 8
    idt:
        .fill 0x21, 8, 0
    """
    with Machine(memory=4 * MiB) as machine:
        machine.load(kernel(code))
        assert machine.run(timeout=20).end is End.HALTED
        assert machine.memory.read_u8(0x20_0000) == 1


def test_a_flat_image_starts_as_after_a_reset() -> None:
    with Machine(memory=64 * KIB) as machine:
        machine.load(FlatImage(b"\xf4"))
        assert machine.vcpus[0].get_msr(Msr.MTRR_DEF_TYPE) == 0


def test_linux_finds_no_fault_in_how_the_tsc_of_amds_processors_counts() -> None:
    with Machine(memory=4 * MiB, cpu={"vendor": "AuthenticAMD"}) as machine:
        try:  # KVM knows the bit from Linux 6.8 on
            machine.vcpus[0].set_msr(Msr.HWCR, 1 << 24)
        except KvmError:
            pytest.skip("this KVM refuses HWCR.TscFreqSel")
        machine.vcpus[0].set_msr(Msr.HWCR, 0)
        machine.load(kernel("cli; hlt"))
        assert machine.vcpus[0].get_msr(Msr.HWCR) == 1 << 24


def test_what_a_template_says_of_a_memory_type_stays() -> None:
    with Machine(memory=4 * MiB, cpu={"msrs": {"MTRR_DEF_TYPE": "0xc00"}}) as machine:
        machine.load(kernel("cli; hlt"))
        assert machine.vcpus[0].get_msr(Msr.MTRR_DEF_TYPE) == 0xC00


def test_a_processor_without_fixed_or_variable_ranges_gets_none() -> None:
    assert mtrr_values(0, 36) == [(Msr.MTRR_DEF_TYPE, 0x806)]
    assert dict(mtrr_values(2, 36)) == {0x200: 0xC000_0000, 0x201: 0xF_C000_0800, Msr.MTRR_DEF_TYPE: 0x806}
    assert dict(mtrr_values(0x100, 36))[Msr.MTRR_DEF_TYPE] == 0xC06
