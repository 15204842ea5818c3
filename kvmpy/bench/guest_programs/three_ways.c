/*
 * The same work in one of three ways: print CHARACTERS, read BYTES from a disk, look TIMESTAMPS times at a clock, wait for
 * TICKS of a timer at 1 kHz, exchange MESSAGES with the host, 8 bytes each way.
 *
 *     WAY 1  emulated: a PC's old hardware. 16550, ATA disk, ACPI timer, PIT and PIC, a device with four ports
 *     WAY 2  paravirtual: virtio without batches, one request at a time; KVM's clock; local APIC timer; hypercalls
 *     WAY 3  cooperative: virtio with many requests for a notification, and an interrupt when the last one is done;
 *            KVM's clock; TSC deadline timer; messages in shared memory
 *
 * MARK gets the number of a job when it begins, and 0 when it ends: the host counts exits in between. At RESULT it leaves
 * the sum of the first 64 bits of each sector, and how many times the clock went backwards or an answer was wrong. The
 * disk's content is at DATA. The code that it exits with is 0, or the number of the check that failed.
 */

#include <kvmpy/exit.h>
#include <kvmpy/hypercall.h>
#include <kvmpy/kvm_paravirt.h>
#include <kvmpy/virtio_mmio.h>

#define EMULATED 1
#define PARAVIRTUAL 2
#define COOPERATIVE 3

#define LINE 80
#define LINES_AT_ONCE 50
#define SECTOR 512
#define REQUEST (WAY == PARAVIRTUAL ? 0x1000 : 0x10000)
#define REQUESTS_AT_ONCE 16
#define MESSAGES_AT_ONCE 500
#define SIZE 64
#define CONSOLE_IRQ 5
#define DISK_IRQ 6
#define RING_IRQ 7
#define APIC 0xfee00000UL
#define APIC_VECTOR 0x40

static volatile uint64_t *const result = (uint64_t *)RESULT;
static unsigned char *const data = (unsigned char *)DATA;
static char text[CHARACTERS + 1];
static volatile unsigned ticks;

static void check(int holds, unsigned number)
{
    if (!holds)
        kvmpy_exit(number);
}

/* --- interrupts, by the first 8259A or by the local APIC -------------------------------------------------------------- */

/* SDM vol. 3, "64-Bit Mode IDT". */
static struct {
    uint16_t offset_low, selector, type, offset_middle;
    uint32_t offset_high, reserved;
} idt[APIC_VECTOR + 1];

struct interrupt_frame;

static void end_of_interrupt(void)
{
    kvmpy_out8(0x20, 0x20);
}

__attribute__((interrupt)) static void pit_ticked(struct interrupt_frame *frame)
{
    (void)frame;
    ticks++;
    end_of_interrupt();
}

static volatile uint32_t *apic(unsigned offset)
{
    return (volatile uint32_t *)(APIC + offset);
}

__attribute__((interrupt)) static void apic_ticked(struct interrupt_frame *frame)
{
    (void)frame;
    ticks++;
    *apic(0xb0) = 0;
}

static void set_gate(unsigned vector, void (*handler)(struct interrupt_frame *))
{
    uintptr_t address = (uintptr_t)handler;
    uint16_t code;

    __asm__("movw %%cs, %0" : "=r"(code));
    idt[vector].offset_low = (uint16_t)address;
    idt[vector].selector = code;
    idt[vector].type = 0x8e00; /* present, ring 0, interrupt gate */
    idt[vector].offset_middle = (uint16_t)(address >> 16);
    idt[vector].offset_high = (uint32_t)(address >> 32);
}

static void set_up_interrupts(unsigned lines)
{
    struct __attribute__((packed)) {
        uint16_t limit;
        void *base;
    } pointer = {sizeof idt - 1, idt};

    __asm__ volatile("lidt %0" : : "m"(pointer), "m"(idt));
    kvmpy_out8(0x20, 0x11); /* vectors from 0x20 on */
    kvmpy_out8(0x21, 0x20);
    kvmpy_out8(0x21, 0x04);
    kvmpy_out8(0x21, 0x01);
    kvmpy_out8(0x21, (unsigned char)~lines);
}

/* Interrupts are off but for the time in HLT: one that comes between a look and HLT wakes it. */
static void wait_for_interrupt(void)
{
    __asm__ volatile("sti; hlt; cli" ::: "memory");
}

/* --- virtio ------------------------------------------------------------------------------------------------------------- */

static struct kvmpy_virtio_mmio console, disk;
static struct kvmpy_virtq console_queue, disk_queue;
static char console_memory[KVMPY_VIRTQ_BYTES(SIZE)] __attribute__((aligned(16)));
static char disk_memory[KVMPY_VIRTQ_BYTES(SIZE)] __attribute__((aligned(16)));
static volatile unsigned console_interrupts, disk_interrupts, ring_interrupts;

__attribute__((interrupt)) static void console_interrupted(struct interrupt_frame *frame)
{
    (void)frame;
    console_interrupts += kvmpy_virtio_mmio_acknowledge(&console) != 0;
    end_of_interrupt();
}

__attribute__((interrupt)) static void disk_interrupted(struct interrupt_frame *frame)
{
    (void)frame;
    disk_interrupts += kvmpy_virtio_mmio_acknowledge(&disk) != 0;
    end_of_interrupt();
}

__attribute__((interrupt)) static void ring_interrupted(struct interrupt_frame *frame)
{
    (void)frame;
    ring_interrupts++;
    end_of_interrupt();
}

static void set_up(struct kvmpy_virtio_mmio *device, uintptr_t address, unsigned id, struct kvmpy_virtq *queue,
                   unsigned number, void *memory)
{
    check(kvmpy_virtio_mmio_find(device, address, id), 10 * id);
    check(kvmpy_virtio_mmio_negotiate(device, 1ULL << KVMPY_VIRTIO_F_EVENT_IDX), 10 * id + 1);
    check(kvmpy_virtio_mmio_queue(device, number, queue, memory, SIZE), 10 * id + 2);
    kvmpy_virtio_mmio_start(device);
}

/* Send what was added, `count` requests, and return when the last one is done. */
static void do_requests(struct kvmpy_virtio_mmio *device, struct kvmpy_virtq *queue, unsigned count,
                        volatile unsigned *interrupts)
{
    unsigned before = *interrupts;

    kvmpy_virtq_want_interrupt(queue, count);
    kvmpy_virtq_publish(queue);
    kvmpy_virtio_mmio_notify(device, queue);
    if (WAY == COOPERATIVE) {
        while (*interrupts == before)
            wait_for_interrupt();
    } else {
        while (!kvmpy_virtq_has_used(queue))
            kvmpy_relax();
        kvmpy_virtio_mmio_acknowledge(device);
    }
    for (unsigned number = 0; number < count; number++)
        check(kvmpy_virtq_take(queue, 0) >= 0, 3);
}

/* --- the work ------------------------------------------------------------------------------------------------------------ */

static void print(void)
{
#if WAY == EMULATED
    for (unsigned at = 0; at < CHARACTERS; at++) {
        while (!(kvmpy_in8(0x3fd) & 0x20)) /* line status: the transmitter is empty */
            ;
        kvmpy_out8(0x3f8, (unsigned char)text[at]);
    }
#else
    unsigned most = WAY == PARAVIRTUAL ? 1 : LINES_AT_ONCE, count = 0;

    for (unsigned at = 0; at < CHARACTERS; at += LINE) {
        struct kvmpy_buffer line = {text + at, CHARACTERS - at < LINE ? CHARACTERS - at : LINE};

        check(kvmpy_virtq_add(&console_queue, &line, 1, 0, 0) >= 0, 4);
        if (++count == most || at + LINE >= CHARACTERS) {
            do_requests(&console, &console_queue, count, &console_interrupts);
            count = 0;
        }
    }
#endif
}

#if WAY == EMULATED
static void read_sectors(unsigned sector, unsigned count, unsigned char *into)
{
    kvmpy_out8(0x1f6, (unsigned char)(0xe0 | sector >> 24)); /* device 0, LBA */
    kvmpy_out8(0x1f2, (unsigned char)count);                 /* 0: 256 */
    kvmpy_out8(0x1f3, (unsigned char)sector);
    kvmpy_out8(0x1f4, (unsigned char)(sector >> 8));
    kvmpy_out8(0x1f5, (unsigned char)(sector >> 16));
    kvmpy_out8(0x1f7, 0x20); /* READ SECTORS */
    while (count--) {
        unsigned words = SECTOR / 2, status;

        do
            status = kvmpy_in8(0x1f7);
        while (status & 0x80); /* BSY */
        check((status & 0x09) == 0x08, 5); /* DRQ, and not ERR */
        __asm__ volatile("rep insw" : "+D"(into), "+c"(words) : "d"(0x1f0) : "memory");
    }
}
#else
static struct {
    uint32_t type, reserved;
    uint64_t sector;
} headers[REQUESTS_AT_ONCE];
static volatile unsigned char statuses[REQUESTS_AT_ONCE];
#endif

static void read_disk(void)
{
    uint64_t sum = 0;

#if WAY == EMULATED
    for (unsigned sector = 0; sector < BYTES / SECTOR; sector += 128)
        read_sectors(sector, 128, data + (unsigned long)sector * SECTOR);
#else
    unsigned most = WAY == PARAVIRTUAL ? 1 : REQUESTS_AT_ONCE, count = 0;

    for (unsigned long at = 0; at < BYTES; at += REQUEST) {
        struct kvmpy_buffer header = {&headers[count], sizeof headers[0]};
        struct kvmpy_buffer into[2] = {{data + at, REQUEST}, {(const void *)&statuses[count], 1}};

        headers[count].sector = at / SECTOR;
        statuses[count] = 0xff;
        check(kvmpy_virtq_add(&disk_queue, &header, 1, into, 2) >= 0, 6);
        if (++count == most || at + REQUEST >= BYTES) {
            do_requests(&disk, &disk_queue, count, &disk_interrupts);
            while (count)
                check(statuses[--count] == 0, 7);
        }
    }
#endif
    for (unsigned long at = 0; at < BYTES; at += SECTOR)
        sum += *(uint64_t *)(data + at);
    result[0] = sum;
}

static void take_timestamps(void)
{
    uint64_t last = 0, backwards = 0;
#if WAY == EMULATED
    /* ACPI's timer: 3.58 MHz, 32 bits. */
    for (unsigned count = 0; count < TIMESTAMPS; count++) {
        uint32_t now = kvmpy_in32(0x608);

        backwards += count != 0 && (int32_t)(now - (uint32_t)last) < 0;
        last = now;
    }
#else
    static volatile struct kvm_clock clock;

    check(kvm_has(KVM_FEATURE_CLOCKSOURCE2), 8);
    kvm_clock_start(&clock);
    for (unsigned count = 0; count < TIMESTAMPS; count++) {
        uint64_t now = kvm_clock_read(&clock);

        backwards += now < last;
        last = now;
    }
#endif
    result[1] = backwards;
}

static void wait_for_ticks(void)
{
#if WAY == EMULATED
    kvmpy_out8(0x43, 0x34); /* counter 0, rate generator */
    kvmpy_out8(0x40, 1193 & 0xff);
    kvmpy_out8(0x40, 1193 >> 8);
    while (ticks < TICKS)
        wait_for_interrupt();
    kvmpy_out8(0x21, 0xff);
#elif WAY == PARAVIRTUAL
    *apic(0xf0) = 0x1ff;                 /* on */
    *apic(0x3e0) = 0xb;                  /* divide by 1 */
    *apic(0x320) = 1 << 17 | APIC_VECTOR; /* periodic */
    *apic(0x380) = 1000000;              /* KVM's APIC counts nanoseconds */
    while (ticks < TICKS)
        wait_for_interrupt();
    *apic(0x320) = 1 << 16;
#else
    unsigned ebx, ecx, edx;
    uint64_t due;

    kvm_cpuid(1, &ebx, &ecx, &edx);
    check(ecx >> 24 & 1, 9); /* TSC deadline */
    *apic(0xf0) = 0x1ff;
    *apic(0x320) = 2 << 17 | APIC_VECTOR;
    due = kvm_timestamp();
    for (unsigned next = 1; next <= TICKS; next++) {
        due += TSC_KHZ;
        kvm_write_msr(0x6e0, due);
        while (ticks < next)
            wait_for_interrupt();
    }
    *apic(0x320) = 1 << 16;
#endif
}

static uint64_t message_of(unsigned number)
{
    return 0x9e3779b97f4a7c15 * (number + 1);
}

/* What the host answers. */
static int is_answer(uint64_t answer, unsigned number)
{
    return answer == ~message_of(number);
}

static void exchange_messages(void)
{
    uint64_t wrong = 0;
#if WAY == EMULATED
    for (unsigned number = 0; number < MESSAGES; number++) {
        uint64_t answer;

        kvmpy_out32(MESSAGE_PORT, (uint32_t)message_of(number));
        kvmpy_out32(MESSAGE_PORT + 4, (uint32_t)(message_of(number) >> 32));
        answer = kvmpy_in32(MESSAGE_PORT);
        answer |= (uint64_t)kvmpy_in32(MESSAGE_PORT + 4) << 32;
        wrong += !is_answer(answer, number);
    }
#elif WAY == PARAVIRTUAL
    for (unsigned number = 0; number < MESSAGES; number++)
        wrong += !is_answer((uint64_t)kvmpy_hypercall(1, message_of(number), 0, 0), number);
#else
    volatile struct {
        uint64_t count;
        uint64_t messages[MESSAGES_AT_ONCE]; /* the host puts its answers here */
    } *ring = (void *)RING;

    for (unsigned number = 0; number < MESSAGES;) {
        unsigned before = ring_interrupts, count = MESSAGES - number;

        if (count > MESSAGES_AT_ONCE)
            count = MESSAGES_AT_ONCE;
        for (unsigned at = 0; at < count; at++)
            ring->messages[at] = message_of(number + at);
        ring->count = count;
        kvmpy_out32(MESSAGE_PORT, 0);
        while (ring_interrupts == before)
            wait_for_interrupt();
        for (unsigned at = 0; at < count; at++, number++)
            wrong += !is_answer(ring->messages[at], number);
    }
#endif
    result[2] = wrong;
}

static void measure(unsigned number, void (*job)(void))
{
    kvmpy_out32(MARK, number);
    job();
    kvmpy_out32(MARK, 0);
}

__attribute__((section(".text.entry"))) void _start(void)
{
    for (unsigned at = 0, letter = 0, column = 0; at < CHARACTERS; at++) {
        text[at] = column == LINE - 1 ? '\n' : (char)('a' + letter);
        letter = letter == 25 ? 0 : letter + 1;
        column = column == LINE - 1 ? 0 : column + 1;
    }
    set_gate(0x20, pit_ticked);
    set_gate(0x20 + CONSOLE_IRQ, console_interrupted);
    set_gate(0x20 + DISK_IRQ, disk_interrupted);
    set_gate(0x20 + RING_IRQ, ring_interrupted);
    set_gate(APIC_VECTOR, apic_ticked);
    set_up_interrupts(WAY == EMULATED      ? 1 << 0
                      : WAY == COOPERATIVE ? 1 << CONSOLE_IRQ | 1 << DISK_IRQ | 1 << RING_IRQ
                                           : 0);
    if (WAY != EMULATED) {
        set_up(&console, CONSOLE, 3, &console_queue, 1, console_memory);
        set_up(&disk, DISK, 2, &disk_queue, 0, disk_memory);
    }
    check(WAY != PARAVIRTUAL || kvmpy_has_hypercalls(), 11);
    measure(1, print);
    measure(2, read_disk);
    measure(3, take_timestamps);
    measure(4, wait_for_ticks);
    measure(5, exchange_messages);
    kvmpy_exit(0);
}
