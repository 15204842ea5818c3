/*
 * Reads from the virtio disk at DISK (virtio-mmio): REQUESTS requests of BYTES each, DEPTH of them under way at any time,
 * each STRIDE requests further on than the one before. It polls. The result is the ticks of the TSC, 0 if a read failed.
 */

#include "ring3_rom.h"

#include <kvmpy/virtio_mmio.h>

#define SIZE 128

static char memory[KVMPY_VIRTQ_BYTES(SIZE)] __attribute__((aligned(4096)));
static unsigned char data[DEPTH][BYTES] __attribute__((aligned(4096)));
static volatile unsigned char statuses[DEPTH];
static struct {
    uint32_t type, reserved;
    uint64_t sector;
} headers[DEPTH];
static unsigned short slot_of[SIZE];
static struct kvmpy_virtio_mmio device;
static struct kvmpy_virtq queue;

static void read_next(unsigned slot, uint64_t *sector, uint64_t capacity)
{
    struct kvmpy_buffer header = {&headers[slot], sizeof headers[0]};
    struct kvmpy_buffer into[2] = {{data[slot], BYTES}, {(const void *)&statuses[slot], 1}};

    headers[slot].sector = *sector;
    *sector = (*sector + STRIDE * (BYTES / 512)) % capacity; /* which is a multiple of BYTES */
    statuses[slot] = 0xff;
    slot_of[kvmpy_virtq_add(&queue, &header, 1, into, 2)] = (unsigned short)slot;
}

static void read_all(unsigned requests, uint64_t capacity)
{
    uint64_t sector = 0;
    unsigned begun = 0;

    while (begun < DEPTH && begun < requests)
        read_next(begun++, &sector, capacity);
    for (unsigned done = 0; done < requests;) {
        kvmpy_virtq_publish(&queue);
        kvmpy_virtio_mmio_notify(&device, &queue);
        while (!kvmpy_virtq_has_used(&queue))
            kvmpy_relax();
        for (int head; (head = kvmpy_virtq_take(&queue, 0)) >= 0; done++) {
            if (statuses[slot_of[head]] != 0)
                end(0);
            if (begun < requests) {
                read_next(slot_of[head], &sector, capacity);
                begun++;
            }
        }
    }
}

void work(void)
{
    uint64_t capacity;
    unsigned start;

    if (!kvmpy_virtio_mmio_find(&device, DISK, 2) ||
        !kvmpy_virtio_mmio_negotiate(&device, 1ULL << KVMPY_VIRTIO_F_EVENT_IDX) ||
        !kvmpy_virtio_mmio_queue(&device, 0, &queue, memory, SIZE))
        end(0);
    kvmpy_virtio_mmio_start(&device);
    kvmpy_virtq_want_interrupt(&queue, 0);
    capacity = kvmpy_virtio_mmio_config64(&device, 0);
    read_all(2 * DEPTH, capacity); /* so that all memory is there */
    start = ticks();
    read_all(REQUESTS, capacity);
    end(ticks() - start);
}
