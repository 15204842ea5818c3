/*
 * Does to the device at ADDRESS what no driver does: every width at every offset, notifications of queues that do not
 * exist, rings and buffers in the device's own registers and nowhere. After that a driver that keeps the rules is
 * served. Exits with 0, or the number of the check that failed.
 */

#include <kvmpy/exit.h>
#include <kvmpy/virtio_mmio.h>

#define SIZE 8

static char memory[KVMPY_VIRTQ_BYTES(SIZE)] __attribute__((aligned(16)));
static struct kvmpy_virtio_mmio device;
static struct kvmpy_virtq queue;
static unsigned char copy[0x200], answer[16];

static void check(int holds, unsigned number)
{
    if (!holds)
        kvmpy_exit(number);
}

static unsigned any(void)
{
    static unsigned state = 1;

    return (state = state * 1103515245 + 12345) >> 8;
}

static void begin(void)
{
    check(kvmpy_virtio_mmio_find(&device, ADDRESS, 4), 1);
    check(kvmpy_virtio_mmio_negotiate(&device, ~0ULL), 2);
    check(kvmpy_virtio_mmio_queue(&device, 0, &queue, memory, SIZE), 3);
    kvmpy_virtio_mmio_start(&device);
}

static void offer(const void *address, uint32_t length)
{
    struct kvmpy_buffer buffer = {address, length};

    kvmpy_virtq_add(&queue, 0, 0, &buffer, 1);
    kvmpy_virtq_publish(&queue);
    kvmpy_virtio_mmio_notify(&device, &queue);
}

/* The device refuses: it needs a reset, and the driver is told by an interrupt. */
static void expect_needs_reset(unsigned number)
{
    while (!(kvmpy_virtio_mmio_read(&device, KVMPY_VIRTIO_MMIO_STATUS) & KVMPY_VIRTIO_NEEDS_RESET))
        kvmpy_relax();
    check(kvmpy_virtio_mmio_acknowledge(&device) & KVMPY_VIRTIO_CONFIG_CHANGE, number);
}

__attribute__((section(".text.entry"))) void _start(void)
{
    void *from = (void *)ADDRESS, *to = copy;
    uint64_t count = sizeof copy;

    /* Everything at any width, aligned or not; no 0 for the status, which would only start it over. */
    for (unsigned number = 0; number < 200; number++) {
        unsigned offset = any() % 0x1f8;
        volatile char *place = (volatile char *)ADDRESS + offset;

        switch (any() % 8) {
        case 0: *(volatile uint8_t *)place = (uint8_t)any(); break;
        case 1: *(volatile uint16_t *)place = (uint16_t)any(); break;
        case 2: *(volatile uint32_t *)place = any(); break;
        case 3: *(volatile uint64_t *)place = any(); break;
        case 4: (void)*(volatile uint8_t *)place; break;
        case 5: (void)*(volatile uint16_t *)place; break;
        case 6: (void)*(volatile uint32_t *)place; break;
        case 7: (void)*(volatile uint64_t *)place; break;
        }
    }
    __asm__ volatile("rep movsb" : "+S"(from), "+D"(to), "+c"(count) : : "memory");
    check(copy[0] == 'v' && copy[3] == 't', 4);

    begin();
    for (unsigned number = 0; number < 4; number++)
        kvmpy_virtio_mmio_write(&device, KVMPY_VIRTIO_MMIO_QUEUE_NOTIFY, number);
    offer((void *)ADDRESS, 16); /* into its own registers */
    expect_needs_reset(5);
    begin();
    offer((void *)0x40000000, 16); /* where there is nothing */
    expect_needs_reset(6);
    begin();
    offer(answer, 0xffffffff); /* over the end of RAM */
    expect_needs_reset(7);
    begin();
    queue.avail->index = 1000;
    kvmpy_virtio_mmio_write(&device, KVMPY_VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    expect_needs_reset(8);

    begin();
    offer(answer, sizeof answer);
    while (kvmpy_virtq_take(&queue, 0) < 0)
        kvmpy_relax();
    check(answer[0] == 0x5a && answer[15] == 0x5a, 9);
    kvmpy_exit(0);
}
