/*
 * Sends ROUNDS x BATCH requests to the virtio device of kind DEVICE_ID at ADDRESS, and checks what comes back.
 * Each asks for 16 bytes in two buffers; the device fills them with a byte that is not zero.
 *
 *     WANTED     feature bits to accept
 *     INTERRUPT  0: poll; 1: wait for IRQ 5 each round, even if everything is there already
 *
 * The code that it exits with is 0, or the number of the check that failed. At RESULT it leaves three 64-bit numbers:
 * the ticks of the TSC that the rounds took, the interrupts that came, and the spurious ones, which had no cause.
 */

#include <kvmpy/exit.h>
#include <kvmpy/ports.h>
#include <kvmpy/virtio_mmio.h>

#define SIZE 64
#define IRQ 5

static char memory[KVMPY_VIRTQ_BYTES(SIZE)] __attribute__((aligned(16)));
static struct kvmpy_virtio_mmio device;
static struct kvmpy_virtq queue;
static struct kvmpy_virtq_desc tables[SIZE][2];
static unsigned char answers[SIZE][16];
static volatile uint64_t *const result = (uint64_t *)RESULT;
static volatile uint64_t interrupts, spurious;

/* SDM vol. 3, "64-Bit Mode IDT". */
static struct {
    uint16_t offset_low, selector, type, offset_middle;
    uint32_t offset_high, reserved;
} idt[0x30];

struct interrupt_frame;

__attribute__((interrupt)) static void interrupted(struct interrupt_frame *frame)
{
    (void)frame;
    if (kvmpy_virtio_mmio_acknowledge(&device))
        interrupts++;
    else
        spurious++;
    kvmpy_out8(0x20, 0x20); /* end of interrupt */
}

static void take_interrupts(void)
{
    struct __attribute__((packed)) {
        uint16_t limit;
        void *base;
    } pointer = {sizeof idt - 1, idt};
    uintptr_t handler = (uintptr_t)interrupted;
    uint16_t code;

    __asm__("movw %%cs, %0" : "=r"(code));
    idt[0x20 + IRQ].offset_low = (uint16_t)handler;
    idt[0x20 + IRQ].selector = code;
    idt[0x20 + IRQ].type = 0x8e00; /* present, ring 0, interrupt gate */
    idt[0x20 + IRQ].offset_middle = (uint16_t)(handler >> 16);
    idt[0x20 + IRQ].offset_high = (uint32_t)(handler >> 32);
    __asm__ volatile("lidt %0" : : "m"(pointer), "m"(idt));
    kvmpy_out8(0x20, 0x11); /* the first 8259A: vectors from 0x20 on, all masked but one */
    kvmpy_out8(0x21, 0x20);
    kvmpy_out8(0x21, 0x04);
    kvmpy_out8(0x21, 0x01);
    kvmpy_out8(0x21, (unsigned char)~(1 << IRQ));
}

static uint64_t ticks(void)
{
    uint32_t low, high;

    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return low | (uint64_t)high << 32;
}

static void check(int holds, unsigned number)
{
    if (!holds)
        kvmpy_exit(number);
}

static void wait_for(unsigned round)
{
#if INTERRUPT
    /* Interrupts are off from the look on until HLT waits: an interrupt in between wakes it. */
    while (interrupts <= round)
        __asm__ volatile("sti; hlt; cli" ::: "memory");
#else
    (void)round;
#endif
    while (!kvmpy_virtq_has_used(&queue))
        kvmpy_relax();
}

__attribute__((section(".text.entry"))) void _start(void)
{
    check(kvmpy_virtio_mmio_find(&device, ADDRESS, DEVICE_ID), 1);
    check(kvmpy_virtio_mmio_negotiate(&device, WANTED), 2);
    check(kvmpy_virtio_mmio_queue(&device, 0, &queue, memory, SIZE), 3);
    if (INTERRUPT)
        take_interrupts();
    kvmpy_virtio_mmio_start(&device);
    result[0] = ticks();
    for (unsigned round = 0; round < ROUNDS; round++) {
        for (unsigned number = 0; number < BATCH; number++) {
            struct kvmpy_buffer halves[2] = {{answers[number], 8}, {answers[number] + 8, 8}};

            answers[number][0] = answers[number][15] = 0;
            if (device.features >> KVMPY_VIRTIO_F_INDIRECT_DESC & 1)
                check(kvmpy_virtq_add_indirect(&queue, tables[number], 0, 0, halves, 2) >= 0, 4);
            else
                check(kvmpy_virtq_add(&queue, 0, 0, halves, 2) >= 0, 4);
        }
        kvmpy_virtq_want_interrupt(&queue, INTERRUPT ? BATCH : 0);
        kvmpy_virtq_publish(&queue);
        kvmpy_virtio_mmio_notify(&device, &queue);
        for (unsigned left = BATCH; left; left--) {
            uint32_t length = 0;

            wait_for(round);
            check(kvmpy_virtq_take(&queue, &length) >= 0 && length == sizeof answers[0], 5);
        }
        for (unsigned number = 0; number < BATCH; number++)
            check(answers[number][0] != 0 && answers[number][15] != 0, 6);
    }
    result[0] = ticks() - result[0];
    result[1] = interrupts;
    result[2] = spurious;
    kvmpy_exit(0);
}
