/*
 * Split virtqueues for a guest's driver (OASIS virtio 1.2, section 2.7). Plain C, no libc, no start-up code, and no
 * assumption but one: physical addresses are the program's addresses, as in the guests that kvmpy starts.
 *
 * A driver adds buffers, publishes them, notifies the device if that wants it, and takes back what was used:
 *
 *     static char memory[KVMPY_VIRTQ_BYTES(64)] __attribute__((aligned(4096)));
 *     struct kvmpy_virtq queue;
 *     ... kvmpy_virtio_mmio_queue(&device, 0, &queue, memory, 64); see <kvmpy/virtio_mmio.h>
 *
 *     struct kvmpy_buffer answer = {bytes, sizeof bytes};
 *     kvmpy_virtq_add(&queue, 0, 0, &answer, 1);
 *     kvmpy_virtq_publish(&queue);
 *     kvmpy_virtio_mmio_notify(&device, &queue);
 *     while (kvmpy_virtq_take(&queue, &length) < 0)
 *         kvmpy_relax();
 */

#ifndef KVMPY_VIRTIO_H
#define KVMPY_VIRTIO_H

#include <stdint.h>

/* Feature bits (section 6), by number. */
#define KVMPY_VIRTIO_F_INDIRECT_DESC 28
#define KVMPY_VIRTIO_F_EVENT_IDX 29
#define KVMPY_VIRTIO_F_VERSION_1 32
#define KVMPY_VIRTIO_F_IN_ORDER 35
#define KVMPY_VIRTIO_F_RING_RESET 40

/* Device status (section 2.1). */
#define KVMPY_VIRTIO_ACKNOWLEDGE 1
#define KVMPY_VIRTIO_DRIVER 2
#define KVMPY_VIRTIO_DRIVER_OK 4
#define KVMPY_VIRTIO_FEATURES_OK 8
#define KVMPY_VIRTIO_NEEDS_RESET 64
#define KVMPY_VIRTIO_FAILED 128

/* Section 2.7.5: what a buffer is made of. */
struct kvmpy_virtq_desc {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

#define KVMPY_VIRTQ_NEXT 1
#define KVMPY_VIRTQ_WRITE 2
#define KVMPY_VIRTQ_INDIRECT 4

/* Section 2.7.6: what the driver offers; used_event comes after the ring. */
struct kvmpy_virtq_avail {
    uint16_t flags;
    uint16_t index;
    uint16_t ring[];
};

/* Section 2.7.8: what the device has used; avail_event comes after the ring. */
struct kvmpy_virtq_used {
    uint16_t flags;
    uint16_t index;
    struct {
        uint32_t id;
        uint32_t length;
    } ring[];
};

/* How much memory a queue of `size` entries, a power of 2, takes. */
#define KVMPY_VIRTQ_AVAIL_AT(size) (16UL * (size))
#define KVMPY_VIRTQ_USED_AT(size) ((KVMPY_VIRTQ_AVAIL_AT(size) + 6 + 2UL * (size) + 3) & ~3UL)
#define KVMPY_VIRTQ_BYTES(size) ((KVMPY_VIRTQ_USED_AT(size) + 6 + 8UL * (size) + 7) & ~7UL)

struct kvmpy_virtq {
    volatile struct kvmpy_virtq_desc *desc;
    volatile struct kvmpy_virtq_avail *avail;
    volatile struct kvmpy_virtq_used *used;
    volatile uint16_t *used_event;  /* written by the driver, with EVENT_IDX */
    volatile uint16_t *avail_event; /* written by the device, with EVENT_IDX */
    unsigned size, number;
    int event_index;
    uint16_t next_avail; /* what was added, published or not */
    uint16_t published;
    uint16_t next_used;  /* what was taken back */
    unsigned free_count;
    uint16_t free_head; /* descriptors that are free hang together by `next` */
};

/* Part of a request. */
struct kvmpy_buffer {
    const void *data;
    uint32_t length;
};

static inline void kvmpy_relax(void)
{
    __asm__ volatile("pause" ::: "memory");
}

/* x86 keeps stores in order, and loads; only a store and a later load need this. */
static inline void kvmpy_full_barrier(void)
{
    __asm__ volatile("mfence" ::: "memory");
}

static inline void kvmpy_compiler_barrier(void)
{
    __asm__ volatile("" ::: "memory");
}

/* Lay a queue out in `memory`, KVMPY_VIRTQ_BYTES(size) of it, aligned to 16 bytes. */
static inline void kvmpy_virtq_init(struct kvmpy_virtq *queue, void *memory, unsigned size, unsigned number,
                                    int event_index)
{
    char *base = memory;

    for (unsigned long at = 0; at < KVMPY_VIRTQ_BYTES(size); at += 8)
        *(volatile uint64_t *)(base + at) = 0;
    queue->desc = (void *)base;
    queue->avail = (void *)(base + KVMPY_VIRTQ_AVAIL_AT(size));
    queue->used = (void *)(base + KVMPY_VIRTQ_USED_AT(size));
    queue->used_event = (volatile uint16_t *)(base + KVMPY_VIRTQ_AVAIL_AT(size) + 4 + 2UL * size);
    queue->avail_event = (volatile uint16_t *)(base + KVMPY_VIRTQ_USED_AT(size) + 4 + 8UL * size);
    queue->size = size;
    queue->number = number;
    queue->event_index = event_index;
    queue->next_avail = queue->published = queue->next_used = 0;
    queue->free_count = size;
    queue->free_head = 0;
    for (unsigned index = 0; index < size; index++)
        queue->desc[index].next = (uint16_t)(index + 1);
}

/*
 * Make a request of buffers that the device reads and, after them, of buffers that it writes. Answers its number, by
 * which it comes back, or -1 when there is no room. The device sees it after kvmpy_virtq_publish.
 */
static inline int kvmpy_virtq_add(struct kvmpy_virtq *queue, const struct kvmpy_buffer *out, unsigned out_count,
                                  const struct kvmpy_buffer *in, unsigned in_count)
{
    unsigned count = out_count + in_count;
    uint16_t head = queue->free_head, index = head;

    if (count == 0 || count > queue->free_count)
        return -1;
    for (unsigned number = 0; number < count; number++) {
        const struct kvmpy_buffer *buffer = number < out_count ? &out[number] : &in[number - out_count];
        volatile struct kvmpy_virtq_desc *desc = &queue->desc[index];

        desc->address = (uintptr_t)buffer->data;
        desc->length = buffer->length;
        desc->flags = (uint16_t)((number + 1 < count ? KVMPY_VIRTQ_NEXT : 0) |
                                 (number < out_count ? 0 : KVMPY_VIRTQ_WRITE));
        index = desc->next;
    }
    queue->free_head = index;
    queue->free_count -= count;
    queue->avail->ring[queue->next_avail % queue->size] = head;
    queue->next_avail++;
    return head;
}

/*
 * The same with an indirect table (section 2.7.5.3, feature INDIRECT_DESC): the request takes one descriptor of the
 * queue, however many buffers it has. `table`, with an entry for each buffer, stays the request's until it comes back.
 */
static inline int kvmpy_virtq_add_indirect(struct kvmpy_virtq *queue, struct kvmpy_virtq_desc *table,
                                           const struct kvmpy_buffer *out, unsigned out_count,
                                           const struct kvmpy_buffer *in, unsigned in_count)
{
    unsigned count = out_count + in_count;
    uint16_t head = queue->free_head;

    if (count == 0 || queue->free_count == 0)
        return -1;
    for (unsigned number = 0; number < count; number++) {
        const struct kvmpy_buffer *buffer = number < out_count ? &out[number] : &in[number - out_count];

        table[number].address = (uintptr_t)buffer->data;
        table[number].length = buffer->length;
        table[number].flags = (uint16_t)((number + 1 < count ? KVMPY_VIRTQ_NEXT : 0) |
                                         (number < out_count ? 0 : KVMPY_VIRTQ_WRITE));
        table[number].next = (uint16_t)(number + 1);
    }
    queue->desc[head].address = (uintptr_t)table;
    queue->desc[head].length = (uint32_t)(count * sizeof *table);
    queue->desc[head].flags = KVMPY_VIRTQ_INDIRECT;
    queue->free_head = queue->desc[head].next;
    queue->free_count--;
    queue->avail->ring[queue->next_avail % queue->size] = head;
    queue->next_avail++;
    return head;
}

/* Show the device all that was added: one index for many requests. */
static inline void kvmpy_virtq_publish(struct kvmpy_virtq *queue)
{
    kvmpy_compiler_barrier(); /* section 2.7.13.3: the entries before the index */
    queue->avail->index = queue->next_avail;
}

/* Whether the device wants to be notified of what was published since the last call (section 2.7.10). */
static inline int kvmpy_virtq_must_notify(struct kvmpy_virtq *queue)
{
    uint16_t now = queue->next_avail, before = queue->published;

    queue->published = now;
    kvmpy_full_barrier(); /* section 2.7.13.4.1: the index before the question */
    if (queue->event_index)
        return (uint16_t)(now - *queue->avail_event - 1) < (uint16_t)(now - before);
    return now != before && !(queue->used->flags & 1);
}

/* Whether something was used that kvmpy_virtq_take has not answered yet. */
static inline int kvmpy_virtq_has_used(const struct kvmpy_virtq *queue)
{
    return queue->used->index != queue->next_used;
}

/* The next request that the device has used, and how many bytes it wrote; -1: none. Its descriptors are free again. */
static inline int kvmpy_virtq_take(struct kvmpy_virtq *queue, uint32_t *length)
{
    uint32_t head, last;
    unsigned count = 1;

    if (!kvmpy_virtq_has_used(queue))
        return -1;
    kvmpy_compiler_barrier();
    head = queue->used->ring[queue->next_used % queue->size].id;
    if (length)
        *length = queue->used->ring[queue->next_used % queue->size].length;
    queue->next_used++;
    for (last = head; queue->desc[last].flags & KVMPY_VIRTQ_NEXT; count++)
        last = queue->desc[last].next;
    queue->desc[last].next = queue->free_head;
    queue->free_head = (uint16_t)head;
    queue->free_count += count;
    return (int)head;
}

/*
 * Ask for an interrupt when `count` more requests are used than were taken back, or for none (0). Answers whether so
 * many are there already: then there may be no interrupt, so look again (section 2.7.7). Without EVENT_IDX it is one
 * for each request, or none.
 */
static inline int kvmpy_virtq_want_interrupt(struct kvmpy_virtq *queue, unsigned count)
{
    if (queue->event_index)
        *queue->used_event = (uint16_t)(queue->next_used + count - 1);
    else
        queue->avail->flags = count == 0;
    kvmpy_full_barrier();
    return count != 0 && (uint16_t)(queue->used->index - queue->next_used) >= count;
}

#endif
