/*
 * Uses the virtio-9p device at FOLDER (virtio-mmio): REQUESTS requests about the file "file", DEPTH of them under way at
 * any time. With BYTES they read as many bytes each, one after the other through FILE_BYTES, with 0 they ask for the
 * file's attributes. It polls. The result is the ticks of the TSC, 0 if a request failed.
 */

#include "ring3_rom.h"

#include <kvmpy/virtio_mmio.h>

#define SIZE 64
#define WHOLE 0xffffffff

enum { RLERROR = 7, TLOPEN = 12, TGETATTR = 24, TVERSION = 100, TATTACH = 104, TWALK = 110, TREAD = 116 };

struct message {
    unsigned length;
    unsigned char content[64]; /* size[4] type[1] tag[2] and what belongs to the type */
};

static char memory[KVMPY_VIRTQ_BYTES(SIZE)] __attribute__((aligned(4096)));
static struct message messages[DEPTH];
static unsigned char answers[DEPTH][BYTES ? 11 : 160]; /* of an Rread what comes before its data */
static unsigned char data[DEPTH][BYTES ? BYTES : 1] __attribute__((aligned(4096)));
static unsigned short slot_of[SIZE];
static struct kvmpy_virtio_mmio device;
static struct kvmpy_virtq queue;

static void put(struct message *message, uint64_t value, unsigned bytes)
{
    for (unsigned byte = 0; byte < bytes; byte++)
        message->content[message->length++] = (unsigned char)(value >> 8 * byte);
}

static void put_text(struct message *message, const char *text)
{
    unsigned length = 0;

    while (text[length])
        length++;
    put(message, length, 2);
    for (unsigned at = 0; at < length; at++)
        put(message, (unsigned char)text[at], 1);
}

/* Begin a message, in the place of a slot, whose number is its tag. */
static struct message *begin(unsigned slot, unsigned type)
{
    struct message *message = &messages[slot];

    message->length = 4;
    put(message, type, 1);
    put(message, type == TVERSION ? 0xffff : slot, 2);
    return message;
}

static void send(unsigned slot)
{
    struct message *message = &messages[slot];
    struct kvmpy_buffer out = {message->content, message->length};
    struct kvmpy_buffer into[2] = {{answers[slot], sizeof answers[0]}, {data[slot], sizeof data[0]}};

    message->content[0] = (unsigned char)message->length;
    slot_of[kvmpy_virtq_add(&queue, &out, 1, into, 2)] = (unsigned short)slot;
}

static void send_next(unsigned slot, uint64_t *offset)
{
    struct message *message = begin(slot, BYTES ? TREAD : TGETATTR);

    put(message, 1, 4);
    if (BYTES) {
        put(message, *offset, 8);
        put(message, BYTES, 4);
        *offset = (*offset + BYTES) % FILE_BYTES;
    } else {
        put(message, 0x7ff, 8); /* P9_GETATTR_BASIC */
    }
    send(slot);
}

/* Notify, and wait for the next answer; which slot it is for. */
static void wait(void)
{
    kvmpy_virtq_publish(&queue);
    kvmpy_virtio_mmio_notify(&device, &queue);
    while (!kvmpy_virtq_has_used(&queue))
        kvmpy_relax();
}

static void check(unsigned slot)
{
    if (answers[slot][4] == RLERROR)
        end(0);
    if (BYTES && answers[slot][4] == TREAD + 1)
        for (unsigned byte = 0; byte < 4; byte++)
            if (answers[slot][7 + byte] != (unsigned char)(BYTES >> 8 * byte))
                end(0);
}

static void ask(void)
{
    send(0);
    wait();
    kvmpy_virtq_take(&queue, 0);
    check(0);
}

static void open_file(void)
{
    struct message *message = begin(0, TVERSION);

    put(message, BYTES + 4096, 4);
    put_text(message, "9P2000.L");
    ask();
    message = begin(0, TATTACH);
    put(message, 0, 4);
    put(message, WHOLE, 4);
    put_text(message, "");
    put_text(message, "");
    put(message, 0, 4);
    ask();
    message = begin(0, TWALK);
    put(message, 0, 4);
    put(message, 1, 4);
    put(message, 1, 2);
    put_text(message, "file");
    ask();
    message = begin(0, TLOPEN);
    put(message, 1, 4);
    put(message, 0, 4);
    ask();
}

static void do_all(unsigned requests)
{
    uint64_t offset = 0;
    unsigned begun = 0;

    while (begun < DEPTH && begun < requests)
        send_next(begun++, &offset);
    for (unsigned done = 0; done < requests;) {
        wait();
        for (int head; (head = kvmpy_virtq_take(&queue, 0)) >= 0; done++) {
            check(slot_of[head]);
            if (begun < requests) {
                send_next(slot_of[head], &offset);
                begun++;
            }
        }
    }
}

void work(void)
{
    unsigned start;

    if (!kvmpy_virtio_mmio_find(&device, FOLDER, 9) ||
        !kvmpy_virtio_mmio_negotiate(&device, 1ULL << KVMPY_VIRTIO_F_EVENT_IDX) ||
        !kvmpy_virtio_mmio_queue(&device, 0, &queue, memory, SIZE))
        end(0);
    kvmpy_virtio_mmio_start(&device);
    kvmpy_virtq_want_interrupt(&queue, 0);
    open_file();
    do_all(2 * DEPTH); /* so that all memory is there */
    start = ticks();
    do_all(REQUESTS);
    end(ticks() - start);
}
