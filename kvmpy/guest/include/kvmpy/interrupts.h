/*
 * Interrupts of lines 0 to 7, for freestanding 64-bit programs in ring 0: the IDT, and the first of the two 8259A.
 *
 *     __attribute__((interrupt)) static void came(struct kvmpy_interrupt_frame *frame)
 *     {
 *         (void)frame;
 *         ...
 *         kvmpy_end_of_interrupt();
 *     }
 *
 *     kvmpy_set_gate(KVMPY_IRQ_VECTOR + 5, came);
 *     kvmpy_take_interrupts(1 << 5);
 *     while (!done)
 *         kvmpy_wait_for_interrupt();
 *
 * Interrupts are off but for the time in kvmpy_wait_for_interrupt: one that comes between the look and HLT wakes it.
 */

#ifndef KVMPY_INTERRUPTS_H
#define KVMPY_INTERRUPTS_H

#ifdef __x86_64__

#include <kvmpy/ports.h>
#include <stdint.h>

/* Of line 0, as kvmpy_take_interrupts sets it. */
#define KVMPY_IRQ_VECTOR 0x20

struct kvmpy_interrupt_frame;

/* SDM vol. 3, "64-Bit Mode IDT". */
struct kvmpy_gate {
    uint16_t offset_low, selector, type, offset_middle;
    uint32_t offset_high, reserved;
};

static inline struct kvmpy_gate *kvmpy_idt(void)
{
    static struct kvmpy_gate idt[256];

    return idt;
}

/* The handler of a vector: a function with __attribute__((interrupt)). */
static inline void kvmpy_set_gate(unsigned vector, void (*handler)(struct kvmpy_interrupt_frame *))
{
    uintptr_t address = (uintptr_t)handler;
    struct kvmpy_gate *gate = kvmpy_idt() + vector;
    uint16_t code;

    __asm__("movw %%cs, %0" : "=r"(code));
    gate->offset_low = (uint16_t)address;
    gate->selector = code;
    gate->type = 0x8e00; /* present, ring 0, interrupt gate */
    gate->offset_middle = (uint16_t)(address >> 16);
    gate->offset_high = (uint32_t)(address >> 32);
}

/* Load the IDT, and let the lines of which `lines` has a bit interrupt. */
static inline void kvmpy_take_interrupts(unsigned lines)
{
    struct __attribute__((packed)) {
        uint16_t limit;
        void *base;
    } pointer = {256 * sizeof(struct kvmpy_gate) - 1, kvmpy_idt()};

    __asm__ volatile("lidt %0" : : "m"(pointer) : "memory");
    kvmpy_out8(0x20, 0x11);
    kvmpy_out8(0x21, KVMPY_IRQ_VECTOR);
    kvmpy_out8(0x21, 0x04);
    kvmpy_out8(0x21, 0x01);
    kvmpy_out8(0x21, (unsigned char)~lines);
}

/* At the end of the handler of a line. */
static inline void kvmpy_end_of_interrupt(void)
{
    kvmpy_out8(0x20, 0x20);
}

static inline void kvmpy_wait_for_interrupt(void)
{
    __asm__ volatile("sti; hlt; cli" ::: "memory");
}

#endif

#endif
