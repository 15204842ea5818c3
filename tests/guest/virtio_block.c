/*
 * Works with the disk at ADDRESS, whose sectors each hold their own number in all of their 64-bit words, and checks.
 *
 *     WANTED     feature bits to accept
 *     INTERRUPT  0: poll; 1: wait for IRQ 5 after each batch
 *     WORK       CHECK: one request of each kind. BATCHES: ROUNDS times BATCH requests of KIND (0 reads, 1 writes) with
 *                BYTES each. FLUSHED: writes SEED + n into sectors n = 1, 3, 5, ... 63, flushes, says so at port 0xe0,
 *                and waits for its end.
 *
 * The code that it exits with is 0, or the number of the check that failed. `interrupts` counts those that came.
 */

#include <kvmpy/exit.h>
#include <kvmpy/interrupts.h>
#include <kvmpy/ports.h>
#include <kvmpy/virtio_mmio.h>

#define CHECK 0
#define BATCHES 1
#define FLUSHED 2

#define SIZE 256
#define IRQ 5
#define SECTOR 512
#define WORDS (SECTOR / 8)
enum { IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13 };
enum { OK = 0, IOERR = 1, UNSUPP = 2 };

static char memory[KVMPY_VIRTQ_BYTES(SIZE)] __attribute__((aligned(4096)));
static struct kvmpy_virtio_mmio device;
static struct kvmpy_virtq queue;
static struct {
    uint32_t type, reserved;
    uint64_t sector;
} headers[SIZE];
static volatile unsigned char statuses[SIZE];
static uint64_t data[BATCH][BYTES / 8] __attribute__((aligned(4096)));
volatile unsigned interrupts;

__attribute__((interrupt)) static void interrupted(struct kvmpy_interrupt_frame *frame)
{
    (void)frame;
    if (kvmpy_virtio_mmio_acknowledge(&device))
        interrupts++;
    kvmpy_end_of_interrupt();
}

static void check(int holds, unsigned number)
{
    if (!holds)
        kvmpy_exit(number);
}

static void add(unsigned slot, uint32_t type, uint64_t sector, void *buffer, uint32_t length)
{
    int out = type != IN && type != GET_ID;
    struct kvmpy_buffer parts[3] = {{&headers[slot], sizeof headers[0]}};
    unsigned count = 1;

    headers[slot].type = type;
    headers[slot].sector = sector;
    statuses[slot] = 0xff;
    if (length)
        parts[count++] = (struct kvmpy_buffer){buffer, length};
    parts[count++] = (struct kvmpy_buffer){(const void *)&statuses[slot], 1};
    check(kvmpy_virtq_add(&queue, parts, out ? count - 1 : 1, parts + (out ? count - 1 : 1), out ? 1 : count - 1) >= 0,
          10);
}

/* Have `count` requests done, and wait for all of them: from now on the buffers are the driver's again. */
static void finish(unsigned count, unsigned round)
{
    kvmpy_virtq_want_interrupt(&queue, INTERRUPT ? count : 0);
    kvmpy_virtq_publish(&queue);
    kvmpy_virtio_mmio_notify(&device, &queue);
#if INTERRUPT
    while (interrupts <= round)
        kvmpy_wait_for_interrupt();
#else
    (void)round;
#endif
    for (unsigned left = count; left; left--) {
        while (!kvmpy_virtq_has_used(&queue))
            kvmpy_relax();
        check(kvmpy_virtq_take(&queue, 0) >= 0, 11);
    }
}

static unsigned request(uint32_t type, uint64_t sector, void *buffer, uint32_t length)
{
    static unsigned round;

    add(0, type, sector, buffer, length);
    finish(1, round++);
    return statuses[0];
}

static int holds(const uint64_t *words, uint64_t first, unsigned sectors)
{
    for (unsigned at = 0; at < sectors * WORDS; at++)
        if (words[at] != first + at / WORDS)
            return 0;
    return 1;
}

static int same(const void *buffer, const char *text, unsigned length)
{
    for (unsigned at = 0; at < length; at++)
        if (((const char *)buffer)[at] != text[at])
            return 0;
    return 1;
}

static void check_each_kind(void)
{
    uint64_t *words = data[0], capacity = kvmpy_virtio_mmio_config64(&device, 0);
    struct {
        uint64_t sector;
        uint32_t count, flags;
    } range = {20, 2, 0};

    check(request(IN, 0, words, SECTOR) == OK && holds(words, 0, 1), 20);
    check(request(IN, capacity - 4, words, 4 * SECTOR) == OK && holds(words, capacity - 4, 4), 21);
    check(request(IN, capacity - 3, words, 4 * SECTOR) == IOERR, 22);
    check(request(GET_ID, 0, words, 20) == OK && same(words, "freestanding\0\0\0\0\0\0\0\0", 20), 23);
    for (unsigned at = 0; at < WORDS; at++)
        words[at] = 0x1111;
    check(request(OUT, 10, words, SECTOR) == OK, 24);
    check(request(FLUSH, 0, 0, 0) == OK, 25);
    check(request(IN, 9, words, 3 * SECTOR) == OK, 26);
    check(holds(words, 9, 1) && holds(words + WORDS, 0x1111, 1) && holds(words + 2 * WORDS, 11, 1), 27);
    check(request(WRITE_ZEROES, 0, &range, sizeof range) == OK, 28);
    range.sector = 40;
    check(request(DISCARD, 0, &range, sizeof range) == OK, 29);
    check(request(IN, 19, words, 4 * SECTOR) == OK, 30);
    check(holds(words, 19, 1) && holds(words + WORDS, 0, 1) && holds(words + 3 * WORDS, 22, 1), 31);
    check(request(99, 0, 0, 0) == UNSUPP, 32);
}

static void do_batches(void)
{
    uint64_t sector = 0, sectors = BYTES / SECTOR, capacity = kvmpy_virtio_mmio_config64(&device, 0);

    for (unsigned round = 0; round < ROUNDS; round++) {
        uint64_t first = sector;

        for (unsigned number = 0; number < BATCH; number++) {
            data[number][0] = KIND == OUT ? sector : ~0ULL;
            data[number][BYTES / 8 - 1] = KIND == OUT ? sector + sectors - 1 : ~0ULL;
            add(number, KIND, sector, data[number], BYTES);
            sector = (sector + sectors) % (capacity - sectors + 1);
        }
        finish(BATCH, round);
        for (unsigned number = 0; number < BATCH; number++) {
            check(statuses[number] == OK, 40);
            check(data[number][0] == first && data[number][BYTES / 8 - 1] == first + sectors - 1, 41);
            first = (first + sectors) % (capacity - sectors + 1);
        }
    }
}

static void write_and_flush(void)
{
    for (unsigned sector = 1; sector < 64; sector += 2) {
        for (unsigned at = 0; at < WORDS; at++)
            data[0][at] = SEED + sector;
        check(request(OUT, sector, data[0], SECTOR) == OK, 50);
    }
    check(request(FLUSH, 0, 0, 0) == OK, 51);
    kvmpy_out8(0xe0, 1);
    for (;;)
        kvmpy_relax();
}

__attribute__((section(".text.entry"))) void _start(void)
{
    check(kvmpy_virtio_mmio_find(&device, ADDRESS, 2), 1);
    check(kvmpy_virtio_mmio_negotiate(&device, WANTED), 2);
    check(kvmpy_virtio_mmio_queue(&device, 0, &queue, memory, SIZE), 3);
    if (INTERRUPT) {
        kvmpy_set_gate(KVMPY_IRQ_VECTOR + IRQ, interrupted);
        kvmpy_take_interrupts(1 << IRQ);
    }
    kvmpy_virtio_mmio_start(&device);
    if (WORK == CHECK)
        check_each_kind();
    else if (WORK == BATCHES)
        do_batches();
    else
        write_and_flush();
    kvmpy_exit(0);
}
