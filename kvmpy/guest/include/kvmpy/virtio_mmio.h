/*
 * A virtio device behind virtio-mmio, as its driver sees it (OASIS virtio 1.2, sections 3.1.1 and 4.2). Plain C, no libc.
 *
 *     struct kvmpy_virtio_mmio device;
 *     if (!kvmpy_virtio_mmio_find(&device, 0xd0000000, 4) || !kvmpy_virtio_mmio_negotiate(&device, wanted))
 *         ...
 *     kvmpy_virtio_mmio_queue(&device, 0, &queue, memory, 64);
 *     kvmpy_virtio_mmio_start(&device);
 */

#ifndef KVMPY_VIRTIO_MMIO_H
#define KVMPY_VIRTIO_MMIO_H

#include <kvmpy/virtio.h>

enum {
    KVMPY_VIRTIO_MMIO_MAGIC = 0x00,
    KVMPY_VIRTIO_MMIO_VERSION = 0x04,
    KVMPY_VIRTIO_MMIO_DEVICE_ID = 0x08,
    KVMPY_VIRTIO_MMIO_DEVICE_FEATURES = 0x10,
    KVMPY_VIRTIO_MMIO_DEVICE_FEATURES_SEL = 0x14,
    KVMPY_VIRTIO_MMIO_DRIVER_FEATURES = 0x20,
    KVMPY_VIRTIO_MMIO_DRIVER_FEATURES_SEL = 0x24,
    KVMPY_VIRTIO_MMIO_QUEUE_SEL = 0x30,
    KVMPY_VIRTIO_MMIO_QUEUE_NUM_MAX = 0x34,
    KVMPY_VIRTIO_MMIO_QUEUE_NUM = 0x38,
    KVMPY_VIRTIO_MMIO_QUEUE_READY = 0x44,
    KVMPY_VIRTIO_MMIO_QUEUE_NOTIFY = 0x50,
    KVMPY_VIRTIO_MMIO_INTERRUPT_STATUS = 0x60,
    KVMPY_VIRTIO_MMIO_INTERRUPT_ACK = 0x64,
    KVMPY_VIRTIO_MMIO_STATUS = 0x70,
    KVMPY_VIRTIO_MMIO_QUEUE_DESC = 0x80,
    KVMPY_VIRTIO_MMIO_QUEUE_DRIVER = 0x90,
    KVMPY_VIRTIO_MMIO_QUEUE_DEVICE = 0xa0,
    KVMPY_VIRTIO_MMIO_QUEUE_RESET = 0xc0,
    KVMPY_VIRTIO_MMIO_CONFIG_GENERATION = 0xfc,
    KVMPY_VIRTIO_MMIO_CONFIG = 0x100,
};

/* InterruptStatus */
#define KVMPY_VIRTIO_USED_BUFFER 1
#define KVMPY_VIRTIO_CONFIG_CHANGE 2

struct kvmpy_virtio_mmio {
    volatile char *registers;
    uint64_t features; /* what was negotiated */
};

static inline uint32_t kvmpy_virtio_mmio_read(const struct kvmpy_virtio_mmio *device, unsigned offset)
{
    return *(volatile uint32_t *)(device->registers + offset);
}

static inline void kvmpy_virtio_mmio_write(const struct kvmpy_virtio_mmio *device, unsigned offset, uint32_t value)
{
    *(volatile uint32_t *)(device->registers + offset) = value;
}

/* Whether there is a device of this kind (section 5) at `address`. It is reset, and told that it has a driver. */
static inline int kvmpy_virtio_mmio_find(struct kvmpy_virtio_mmio *device, uintptr_t address, uint32_t device_id)
{
    device->registers = (volatile char *)address;
    device->features = 0;
    if (kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_MAGIC) != 0x74726976 ||
        kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_VERSION) != 2 ||
        kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_DEVICE_ID) != device_id)
        return 0;
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_STATUS, 0);
    while (kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_STATUS) != 0) /* section 2.4.2 */
        kvmpy_relax();
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_STATUS, KVMPY_VIRTIO_ACKNOWLEDGE);
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_STATUS, KVMPY_VIRTIO_ACKNOWLEDGE | KVMPY_VIRTIO_DRIVER);
    return 1;
}

static inline uint64_t kvmpy_virtio_mmio_offered(const struct kvmpy_virtio_mmio *device)
{
    uint64_t low;

    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
    low = kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_DEVICE_FEATURES);
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    return low | (uint64_t)kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_DEVICE_FEATURES) << 32;
}

/* Agree on what of `wanted` (bits, not numbers) is offered, and on VERSION_1. Answers whether the device takes that. */
static inline int kvmpy_virtio_mmio_negotiate(struct kvmpy_virtio_mmio *device, uint64_t wanted)
{
    uint32_t status = KVMPY_VIRTIO_ACKNOWLEDGE | KVMPY_VIRTIO_DRIVER | KVMPY_VIRTIO_FEATURES_OK;

    device->features = kvmpy_virtio_mmio_offered(device) & (wanted | 1ULL << KVMPY_VIRTIO_F_VERSION_1);
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_DRIVER_FEATURES, (uint32_t)device->features);
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_DRIVER_FEATURES, (uint32_t)(device->features >> 32));
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_STATUS, status);
    return (kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_STATUS) & KVMPY_VIRTIO_FEATURES_OK) != 0;
}

static inline void kvmpy_virtio_mmio_write64(const struct kvmpy_virtio_mmio *device, unsigned offset,
                                             const volatile void *pointer)
{
    kvmpy_virtio_mmio_write(device, offset, (uint32_t)(uintptr_t)pointer);
    kvmpy_virtio_mmio_write(device, offset + 4, (uint32_t)((uint64_t)(uintptr_t)pointer >> 32));
}

/* Lay queue `number` out in `memory` (see kvmpy_virtq_init), and show it to the device. 0: it does not take it. */
static inline int kvmpy_virtio_mmio_queue(const struct kvmpy_virtio_mmio *device, unsigned number,
                                          struct kvmpy_virtq *queue, void *memory, unsigned size)
{
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_QUEUE_SEL, number);
    if (kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_QUEUE_NUM_MAX) < size)
        return 0;
    kvmpy_virtq_init(queue, memory, size, number, (int)(device->features >> KVMPY_VIRTIO_F_EVENT_IDX & 1));
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_QUEUE_NUM, size);
    kvmpy_virtio_mmio_write64(device, KVMPY_VIRTIO_MMIO_QUEUE_DESC, queue->desc);
    kvmpy_virtio_mmio_write64(device, KVMPY_VIRTIO_MMIO_QUEUE_DRIVER, queue->avail);
    kvmpy_virtio_mmio_write64(device, KVMPY_VIRTIO_MMIO_QUEUE_DEVICE, queue->used);
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_QUEUE_READY, 1);
    return (int)kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_QUEUE_READY);
}

/* All queues are set up: the device may use them. */
static inline void kvmpy_virtio_mmio_start(const struct kvmpy_virtio_mmio *device)
{
    uint32_t status = kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_STATUS);

    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_STATUS, status | KVMPY_VIRTIO_DRIVER_OK);
}

/* Notify the device of what was published, if it wants that. Answers whether it did. */
static inline int kvmpy_virtio_mmio_notify(const struct kvmpy_virtio_mmio *device, struct kvmpy_virtq *queue)
{
    if (!kvmpy_virtq_must_notify(queue))
        return 0;
    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_QUEUE_NOTIFY, queue->number);
    return 1;
}

/* In an interrupt handler: acknowledge, and answer what the interrupt was for. Look at the queues after that. */
static inline uint32_t kvmpy_virtio_mmio_acknowledge(const struct kvmpy_virtio_mmio *device)
{
    uint32_t causes = kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_INTERRUPT_STATUS);

    kvmpy_virtio_mmio_write(device, KVMPY_VIRTIO_MMIO_INTERRUPT_ACK, causes);
    return causes;
}

/* A part of the configuration space, 1, 2 or 4 bytes wide as the device says. */
static inline uint8_t kvmpy_virtio_mmio_config8(const struct kvmpy_virtio_mmio *device, unsigned offset)
{
    return *(volatile uint8_t *)(device->registers + KVMPY_VIRTIO_MMIO_CONFIG + offset);
}

static inline uint16_t kvmpy_virtio_mmio_config16(const struct kvmpy_virtio_mmio *device, unsigned offset)
{
    return *(volatile uint16_t *)(device->registers + KVMPY_VIRTIO_MMIO_CONFIG + offset);
}

static inline uint32_t kvmpy_virtio_mmio_config32(const struct kvmpy_virtio_mmio *device, unsigned offset)
{
    return kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_CONFIG + offset);
}

/* 64 bits, which cannot be read at once: read again until the generation has not changed meanwhile (section 2.5.1). */
static inline uint64_t kvmpy_virtio_mmio_config64(const struct kvmpy_virtio_mmio *device, unsigned offset)
{
    uint32_t before, low, high;

    do {
        before = kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_CONFIG_GENERATION);
        low = kvmpy_virtio_mmio_config32(device, offset);
        high = kvmpy_virtio_mmio_config32(device, offset + 4);
    } while (kvmpy_virtio_mmio_read(device, KVMPY_VIRTIO_MMIO_CONFIG_GENERATION) != before);
    return low | (uint64_t)high << 32;
}

#endif
