"""What KVM offers to guests that know of it: a C program uses it by the guest's header."""

from __future__ import annotations

import time

import pytest

from gnu_toolchain import compile_c
from kvmpy import Machine, MiB, Outcome
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit, Hypercall, HypercallChannel

pytestmark = pytest.mark.kvm

UNDERSTOOD, ABSENT = 0x10, 0x20
SLACK = 5_000_000
"""Nanoseconds. KVM's two ways to read the clock, by the guest and by KVM_GET_CLOCK, may differ a little."""


def run(source: str, *handlers: object) -> Outcome:
    """Run a program whose hypercalls 1, 2 ... are `handlers`."""
    with Machine(memory=4 * MiB) as machine:
        channel = machine.add(HypercallChannel())
        for number, handler in enumerate(handlers, 1):
            channel.on(number, handler)  # type: ignore[arg-type]
        machine.add(DebugExit())
        machine.load(ElfImage(compile_c(f"#include <kvmpy.h>\n#include <kvmpy/kvm_paravirt.h>\n{source}").elf))
        outcome = machine.run(timeout=20)
    if outcome.code == ABSENT << 1 | 1:
        pytest.skip("this host's KVM does not offer it in CPUID 0x40000001")
    return outcome


def understood(outcome: Outcome) -> bool:
    return outcome.code == UNDERSTOOD << 1 | 1


def test_the_clock_goes_forward_and_is_that_of_the_vm() -> None:
    source = f"""
        static volatile struct kvm_clock clock;

        void _start(void)
        {{
            if (!kvm_has(KVM_FEATURE_CLOCKSOURCE2))
                kvmpy_exit({ABSENT});
            kvm_clock_start(&clock);
            unsigned long before = kvm_clock_read(&clock), now;
            for (int i = 0; i < 200; i++, before = now)
                if ((now = kvm_clock_read(&clock)) < before)
                    kvmpy_exit(1);
            for (int i = 0; i < 3; i++) {{
                before = kvm_clock_read(&clock);
                unsigned long host = kvmpy_hypercall(1, 0, 0, 0);
                kvmpy_hypercall(2, before, host, kvm_clock_read(&clock));
            }}
            kvmpy_exit({UNDERSTOOD});
        }}
    """
    seen: list[tuple[int, ...]] = []

    def vm_clock(call: Hypercall) -> int:
        return int(machine.vm.get_clock().clock)

    def note(call: Hypercall) -> None:
        seen.append(call.arguments[:3])

    with Machine(memory=4 * MiB) as machine:
        channel = machine.add(HypercallChannel())
        channel.on(1, vm_clock)
        channel.on(2, note)
        machine.add(DebugExit())
        machine.load(ElfImage(compile_c(f"#include <kvmpy.h>\n#include <kvmpy/kvm_paravirt.h>\n{source}").elf))
        outcome = machine.run(timeout=20)
    if outcome.code == ABSENT << 1 | 1:
        pytest.skip("this host's KVM has no kvmclock")
    assert understood(outcome)
    assert len(seen) == 3
    for before, host, after in seen:
        assert before - SLACK <= host <= after + SLACK
        assert before < after


def test_the_wall_clock_is_the_time_of_day() -> None:
    seen: list[float] = []

    def note(call: Hypercall) -> None:
        seconds, nanoseconds, passed = call.arguments[:3]
        seen.append(seconds + (nanoseconds + passed) / 1e9)

    began = time.time()
    outcome = run(
        f"""
        static volatile struct kvm_clock clock;
        static volatile struct kvm_wall_clock wall;

        void _start(void)
        {{
            if (!kvm_has(KVM_FEATURE_CLOCKSOURCE2))
                kvmpy_exit({ABSENT});
            kvm_clock_start(&clock);
            kvm_wall_clock_read(&wall);
            kvmpy_hypercall(1, wall.seconds, wall.nanoseconds, kvm_clock_read(&clock));
            kvmpy_exit({UNDERSTOOD});
        }}
        """,
        note,
    )
    assert understood(outcome)
    assert began - 1 <= seen[0] <= time.time() + 1


def test_stolen_time_is_counted_in_the_guests_memory() -> None:
    seen: list[tuple[int, ...]] = []

    def note(call: Hypercall) -> None:
        seen.append(call.arguments[:3])
        if len(seen) == 1:
            time.sleep(0.01)  # not stolen: the processor is outside of the guest by its own wish

    outcome = run(
        f"""
        static volatile struct kvm_steal_time steal;

        void _start(void)
        {{
            if (!kvm_has(KVM_FEATURE_STEAL_TIME))
                kvmpy_exit({ABSENT});
            kvm_steal_time_start(&steal);
            for (int i = 0; i < 2; i++)
                kvmpy_hypercall(1, steal.version, steal.steal, steal.flags);
            kvmpy_exit({UNDERSTOOD});
        }}
        """,
        note,
    )
    assert understood(outcome)
    (version, stolen, _), (later_version, later_stolen, _) = seen
    assert version % 2 == later_version % 2 == 0  # odd while KVM writes
    assert later_version > 0
    assert stolen <= later_stolen


def test_interrupts_end_without_a_write_to_the_local_apic() -> None:
    seen: list[tuple[int, ...]] = []

    def note(call: Hypercall) -> None:
        seen.append(call.arguments[:2])

    outcome = run(
        f"""
        #define APIC(offset) (*(volatile unsigned *)(0xfee00000UL + (offset)))
        enum {{ VECTOR = 0x40, TIMES = 20 }};

        static volatile unsigned flag, handled, cheap;
        static struct {{ unsigned short low, selector, kind, middle; unsigned high, zero; }} idt[256];
        struct frame;

        __attribute__((interrupt)) static void handler(struct frame *frame)
        {{
            (void)frame;
            handled++;
            if (kvm_eoi(&flag))
                cheap++;
            else
                APIC(0xb0) = 0;
        }}

        void _start(void)
        {{
            if (!kvm_has(KVM_FEATURE_PV_EOI))
                kvmpy_exit({ABSENT});
            unsigned long address = (unsigned long)handler;
            unsigned short cs;
            __asm__ volatile("mov %%cs, %0" : "=r"(cs));
            idt[VECTOR].low = address;
            idt[VECTOR].selector = cs;
            idt[VECTOR].kind = 0x8e00;
            idt[VECTOR].middle = address >> 16;
            idt[VECTOR].high = address >> 32;
            struct {{ unsigned short limit; unsigned long base; }} __attribute__((packed)) table = {{
                sizeof idt - 1, (unsigned long)idt }};
            __asm__ volatile("lidt %0" : : "m"(table));
            APIC(0xf0) = 0x1ff;
            kvm_eoi_start(&flag);
            __asm__ volatile("sti");
            for (unsigned i = 0; i < TIMES; i++) {{
                APIC(0x300) = 0x40000 | VECTOR; /* to itself */
                for (unsigned spins = 0; handled == i && spins < 10000000; spins++)
                    __asm__ volatile("pause");
            }}
            kvmpy_hypercall(1, handled, cheap, 0);
            kvmpy_exit({UNDERSTOOD});
        }}
        """,
        note,
    )
    assert understood(outcome)
    handled, cheap = seen[0]
    assert handled == 20
    if not cheap:
        pytest.skip("this host's KVM offers it, but never says that clearing the flag is enough; the guest went on")


def test_async_page_faults_are_off_until_a_guest_asks() -> None:
    with Machine(memory=1 * MiB) as machine:
        for msr in (0x4B56_4D02, 0x4B56_4D06):  # MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT
            try:
                value = machine.vcpus[0].get_msr(msr)
            except OSError:
                continue  # this KVM has none
            assert value == 0
