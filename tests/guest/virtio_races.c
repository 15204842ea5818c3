/*
 * Two processors that agree on nothing drive the device at ADDRESS: the first makes requests without end, the second
 * does what may be done to a device while it works, and what may not. Neither ends; `made` and `done` count.
 *
 *     DEVICE_ID, QUEUES   of the device
 *     STORM               1: the second only notifies, and the first checks that each request comes back
 */

#include <kvmpy/exit.h>
#include <kvmpy/virtio_mmio.h>

#define SIZE 16
#define PLACES 2

static char memory[PLACES][QUEUES][KVMPY_VIRTQ_BYTES(SIZE)] __attribute__((aligned(4096)));
static struct kvmpy_virtio_mmio device = {(volatile char *)ADDRESS, 0};
static struct {
    uint32_t type, reserved;
    uint64_t sector;
    char more[48];
} headers[SIZE];
static unsigned char buffers[SIZE][4096] __attribute__((aligned(4096)));
static volatile unsigned char statuses[SIZE];
volatile unsigned made, done;

static void write(unsigned offset, uint32_t value)
{
    kvmpy_virtio_mmio_write(&device, offset, value);
}

#if STORM

static void check(int holds, unsigned number)
{
    if (!holds)
        kvmpy_exit(number);
}

__attribute__((section(".text.entry"))) void _start(void)
{
    struct kvmpy_virtq queue;

    check(kvmpy_virtio_mmio_find(&device, ADDRESS, DEVICE_ID), 1);
    check(kvmpy_virtio_mmio_negotiate(&device, ~0ULL), 2);
    check(kvmpy_virtio_mmio_queue(&device, 0, &queue, memory[0][0], SIZE), 3);
    kvmpy_virtio_mmio_start(&device);
    for (;;) {
        struct kvmpy_buffer header = {&headers[0], 16}, parts[2] = {{buffers[0], 512}, {(void *)&statuses[0], 1}};

        headers[0].type = 0;
        headers[0].sector = done % 64;
        statuses[0] = 0xff;
        check(kvmpy_virtq_add(&queue, &header, 1, parts, 2) >= 0, 4);
        made++;
        kvmpy_virtq_publish(&queue);
        kvmpy_virtio_mmio_notify(&device, &queue);
        while (kvmpy_virtq_take(&queue, 0) < 0)
            kvmpy_relax();
        check(statuses[0] == 0, 5);
        check(*(volatile uint64_t *)buffers[0] == done % 64, 6);
        done++;
    }
}

void second(void)
{
    for (;;)
        write(KVMPY_VIRTIO_MMIO_QUEUE_NOTIFY, 0);
}

#else

static uint32_t any(uint32_t *state)
{
    return (*state = *state * 1664525 + 1013904223) >> 8;
}

/* Set all up, with the rings in one of two places, and do not care whether it works. */
static void begin(unsigned place)
{
    struct kvmpy_virtq queue;

    write(KVMPY_VIRTIO_MMIO_STATUS, 0);
    for (unsigned tries = 0; kvmpy_virtio_mmio_read(&device, KVMPY_VIRTIO_MMIO_STATUS) && tries < 1000; tries++)
        kvmpy_relax();
    write(KVMPY_VIRTIO_MMIO_STATUS, KVMPY_VIRTIO_ACKNOWLEDGE | KVMPY_VIRTIO_DRIVER);
    kvmpy_virtio_mmio_negotiate(&device, place ? ~0ULL : 0);
    for (unsigned number = 0; number < QUEUES; number++)
        kvmpy_virtio_mmio_queue(&device, number, &queue, memory[place][number], SIZE);
    kvmpy_virtio_mmio_start(&device);
}

/* A request somewhere in the rings: right ones mostly, but descriptors of the others may be its own, too. */
static void request(struct kvmpy_virtq *queue, uint32_t *chance)
{
    unsigned slot = any(chance) % (SIZE / 4) * 4, wrong = any(chance) % 64;

    headers[slot].type = any(chance) % 16;
    headers[slot].sector = any(chance) % 64;
    queue->desc[slot].address = (uintptr_t)&headers[slot];
    queue->desc[slot].length = any(chance) % 8 ? 16 : any(chance) % 64;
    queue->desc[slot].flags = KVMPY_VIRTQ_NEXT | (any(chance) % 8 ? 0 : KVMPY_VIRTQ_WRITE);
    queue->desc[slot].next = (uint16_t)(slot + 1);
    queue->desc[slot + 1].address = wrong ? (uintptr_t)buffers[slot] : any(chance) % 2 ? ADDRESS : ~0ULL;
    queue->desc[slot + 1].length = any(chance) % 8 ? 512 : any(chance) % 4096;
    queue->desc[slot + 1].flags = KVMPY_VIRTQ_NEXT | (headers[slot].type & 1 ? 0 : KVMPY_VIRTQ_WRITE);
    queue->desc[slot + 1].next = (uint16_t)(wrong == 1 ? slot : slot + 2);
    queue->desc[slot + 2].address = (uintptr_t)&statuses[slot];
    queue->desc[slot + 2].length = 1;
    queue->desc[slot + 2].flags = KVMPY_VIRTQ_WRITE;
    queue->avail->ring[queue->avail->index % SIZE] = (uint16_t)(wrong == 2 ? any(chance) : slot);
    kvmpy_compiler_barrier();
    queue->avail->index += wrong == 3 ? any(chance) : 1;
    made++;
}

__attribute__((section(".text.entry"))) void _start(void)
{
    uint32_t chance = 1;
    struct kvmpy_virtq queues[PLACES][QUEUES];

    for (unsigned place = 0; place < PLACES; place++)
        for (unsigned number = 0; number < QUEUES; number++)
            kvmpy_virtq_init(&queues[place][number], memory[place][number], SIZE, number, 0);
    begin(0);
    for (;;) {
        unsigned number = any(&chance) % QUEUES;

        for (unsigned count = any(&chance) % 4; count; count--)
            request(&queues[any(&chance) % PLACES][number], &chance);
        write(KVMPY_VIRTIO_MMIO_QUEUE_NOTIFY, number);
        done++;
    }
}

void second(void)
{
    uint32_t chance = 2;

    for (;;)
        switch (any(&chance) % 12) {
        case 0:
        case 1: begin(any(&chance) % PLACES); break;
        case 2: write(KVMPY_VIRTIO_MMIO_QUEUE_SEL, any(&chance) % (QUEUES + 1)); break;
        case 3: write(KVMPY_VIRTIO_MMIO_QUEUE_RESET, 1); break;
        case 4: write(KVMPY_VIRTIO_MMIO_QUEUE_READY, any(&chance) % 2); break;
        case 5: /* elsewhere, live */
            kvmpy_virtio_mmio_write64(&device, KVMPY_VIRTIO_MMIO_QUEUE_DESC,
                                      memory[any(&chance) % PLACES][any(&chance) % QUEUES]);
            break;
        case 6: write(KVMPY_VIRTIO_MMIO_QUEUE_NUM, 1U << any(&chance) % 6); break;
        case 7: write(KVMPY_VIRTIO_MMIO_STATUS, any(&chance) % 16 | 1); break;
        case 8: kvmpy_virtio_mmio_acknowledge(&device); break;
        case 9: write(KVMPY_VIRTIO_MMIO_CONFIG + any(&chance) % 64, any(&chance)); break;
        default: write(KVMPY_VIRTIO_MMIO_QUEUE_NOTIFY, any(&chance) % QUEUES); break;
        }
}

#endif
