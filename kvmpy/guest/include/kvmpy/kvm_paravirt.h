/*
 * What KVM offers to guests that know of it, for freestanding programs in ring 0: its clock, the time of day, time
 * stolen by the host, and ends of interrupts without an exit. KVM: Documentation/virt/kvm/x86/cpuid.rst and msr.rst.
 *
 * Ask kvm_has(feature) first. Addresses are physical ones, and here those of C.
 */

#ifndef KVMPY_KVM_PARAVIRT_H
#define KVMPY_KVM_PARAVIRT_H

/* Bits of CPUID 0x40000001, EAX. */
#define KVM_FEATURE_CLOCKSOURCE2 3
#define KVM_FEATURE_STEAL_TIME 5
#define KVM_FEATURE_PV_EOI 6

#define MSR_KVM_WALL_CLOCK_NEW 0x4b564d00
#define MSR_KVM_SYSTEM_TIME_NEW 0x4b564d01
#define MSR_KVM_STEAL_TIME 0x4b564d03
#define MSR_KVM_PV_EOI_EN 0x4b564d04

static inline unsigned kvm_cpuid(unsigned leaf, unsigned *ebx, unsigned *ecx, unsigned *edx)
{
    unsigned eax;

    __asm__ volatile("cpuid" : "=a"(eax), "=b"(*ebx), "=c"(*ecx), "=d"(*edx) : "0"(leaf), "2"(0));
    return eax;
}

static inline int kvm_has(unsigned feature)
{
    unsigned ebx, ecx, edx;

    kvm_cpuid(0x40000000, &ebx, &ecx, &edx);
    if (ebx != 0x4b4d564b || ecx != 0x564b4d56 || edx != 0x4d) /* "KVMKVMKVM" */
        return 0;
    return kvm_cpuid(0x40000001, &ebx, &ecx, &edx) >> feature & 1;
}

static inline void kvm_write_msr(unsigned msr, unsigned long long value)
{
    __asm__ volatile("wrmsr" : : "c"(msr), "a"((unsigned)value), "d"((unsigned)(value >> 32)) : "memory");
}

static inline unsigned long long kvm_timestamp(void)
{
    unsigned low, high;

    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (unsigned long long)high << 32 | low;
}

/* The clock: nanoseconds since the VM was made, the same on all processors; no exit. One of these for each processor. */
struct kvm_clock {
    unsigned version; /* odd while KVM writes */
    unsigned pad;
    unsigned long long tsc_timestamp;
    unsigned long long system_time;
    unsigned tsc_to_system_mul;
    signed char tsc_shift;
    unsigned char flags;
    unsigned char pad2[2];
} __attribute__((aligned(32)));

static inline void kvm_clock_start(volatile struct kvm_clock *clock)
{
    kvm_write_msr(MSR_KVM_SYSTEM_TIME_NEW, (unsigned long)clock | 1);
}

static inline unsigned long long kvm_clock_read(const volatile struct kvm_clock *clock)
{
    unsigned long long passed, time;
    unsigned version, factor;

    do {
        version = clock->version;
        __asm__ volatile("" : : : "memory");
        passed = kvm_timestamp() - clock->tsc_timestamp;
        if (clock->tsc_shift < 0)
            passed >>= -clock->tsc_shift;
        else
            passed <<= clock->tsc_shift;
        factor = clock->tsc_to_system_mul; /* passed * factor >> 32, of which the product has 96 bits */
        time = clock->system_time + (passed >> 32) * factor + ((passed & 0xffffffff) * factor >> 32);
        __asm__ volatile("" : : : "memory");
    } while (version & 1 || version != clock->version);
    return time;
}

/* The time of day at which the clock was 0. Written once, at the call. */
struct kvm_wall_clock {
    unsigned version;
    unsigned seconds;
    unsigned nanoseconds;
} __attribute__((aligned(16)));

static inline void kvm_wall_clock_read(volatile struct kvm_wall_clock *wall)
{
    kvm_write_msr(MSR_KVM_WALL_CLOCK_NEW, (unsigned long)wall);
}

/* Nanoseconds for which this processor would have run, had the host not run something else. One for each processor. */
struct kvm_steal_time {
    unsigned long long steal;
    unsigned version;
    unsigned flags;
    unsigned char preempted;
    unsigned char pad[47];
} __attribute__((aligned(64)));

static inline void kvm_steal_time_start(volatile struct kvm_steal_time *steal)
{
    kvm_write_msr(MSR_KVM_STEAL_TIME, (unsigned long)steal | 1);
}

/* Ends of interrupts: KVM sets bit 0 of `flag` when clearing it is enough, and the register need not be written. */
static inline void kvm_eoi_start(volatile unsigned *flag)
{
    kvm_write_msr(MSR_KVM_PV_EOI_EN, (unsigned long)flag | 1);
}

/* 1: the interrupt is ended. 0: write the local APIC's EOI register. */
static inline int kvm_eoi(volatile unsigned *flag)
{
    unsigned char was_set;

    __asm__ volatile("btrl $0, %0; setc %1" : "+m"(*flag), "=q"(was_set) : : "memory", "cc");
    return was_set;
}

#endif
