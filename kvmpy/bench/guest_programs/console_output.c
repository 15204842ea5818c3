/*
 * Prints on the virtio console at CONSOLE (virtio-mmio): REQUESTS buffers of BYTES characters each, DEPTH of them under
 * way at any time. It polls, as Linux does when it prints. The result is the ticks of the TSC, 0 without a console.
 */

#include "ring3_rom.h"

#include <kvmpy/virtio_mmio.h>

#define SIZE 64
#define TRANSMIT 1 /* the queue of port 0 by which characters go to the host (section 5.3.2) */

static char memory[KVMPY_VIRTQ_BYTES(SIZE)] __attribute__((aligned(4096)));
static char text[DEPTH][BYTES];
static unsigned short slot_of[SIZE];
static struct kvmpy_virtio_mmio device;
static struct kvmpy_virtq queue;

static void print(unsigned slot)
{
    struct kvmpy_buffer buffer = {text[slot], BYTES};

    slot_of[kvmpy_virtq_add(&queue, &buffer, 1, 0, 0)] = (unsigned short)slot;
}

static void print_all(unsigned requests)
{
    unsigned begun = 0;

    while (begun < DEPTH && begun < requests)
        print(begun++);
    for (unsigned done = 0; done < requests;) {
        kvmpy_virtq_publish(&queue);
        kvmpy_virtio_mmio_notify(&device, &queue);
        while (!kvmpy_virtq_has_used(&queue))
            kvmpy_relax();
        for (int head; (head = kvmpy_virtq_take(&queue, 0)) >= 0; done++)
            if (begun < requests) {
                print(slot_of[head]);
                begun++;
            }
    }
}

void work(void)
{
    unsigned start;

    for (unsigned slot = 0; slot < DEPTH; slot++)
        for (unsigned at = 0; at < BYTES; at++)
            text[slot][at] = at + 1 < BYTES ? '.' : '\n';
    if (!kvmpy_virtio_mmio_find(&device, CONSOLE, 3) ||
        !kvmpy_virtio_mmio_negotiate(&device, 1ULL << KVMPY_VIRTIO_F_EVENT_IDX) ||
        !kvmpy_virtio_mmio_queue(&device, TRANSMIT, &queue, memory, SIZE))
        end(0);
    kvmpy_virtio_mmio_start(&device);
    kvmpy_virtq_want_interrupt(&queue, 0);
    print_all(2 * DEPTH); /* so that all memory is there */
    start = ticks();
    print_all(REQUESTS);
    end(ticks() - start);
}
