/*
 * A station on an Ethernet, by the virtio network device at ADDRESS.
 *
 *     WANTED    feature bits to accept
 *     WORK      STATION: answer who asks for the address OWN_IP (ARP) and who pings it, until COUNT pings are answered.
 *               PING: find PEER_IP (ARP), and ping it COUNT times with SIZE bytes; OWN_IP is the own address.
 *               LEASE: get an address by DHCP, then send COUNT UDP datagrams of SIZE bytes to port PORT of the gateway
 *               and wait for the answer to each, which has all bits the other way round.
 *     Addresses are numbers, such as 0xc0000201 for 192.0.2.1.
 *
 * The code that it exits with is 0, or the number of the check that failed. `leased` is the address of a lease.
 */

#include <kvmpy/exit.h>
#include <kvmpy/virtio_mmio.h>

#define STATION 0
#define PING 1
#define LEASE 2

#define ENTRIES 16
#define HEADER 12
#define ROOM 1526

static char receive_memory[KVMPY_VIRTQ_BYTES(ENTRIES)] __attribute__((aligned(4096)));
static char transmit_memory[KVMPY_VIRTQ_BYTES(ENTRIES)] __attribute__((aligned(4096)));
static struct kvmpy_virtio_mmio device;
static struct kvmpy_virtq receive_queue, transmit_queue;
static unsigned char buffers[ENTRIES][ROOM] __attribute__((aligned(64)));
static unsigned char out[ROOM]; /* header and frame */
static unsigned char *const frame = out + HEADER;
static unsigned char *buffer_of[ENTRIES]; /* by the number of its request */
static unsigned char mac[6], peer[6];
static uint32_t own_ip = OWN_IP;
volatile uint32_t leased;

static void check(int holds, unsigned number)
{
    if (!holds)
        kvmpy_exit(number);
}

static unsigned get16(const unsigned char *at)
{
    return (unsigned)at[0] << 8 | at[1];
}

static uint32_t get32(const unsigned char *at)
{
    return (uint32_t)get16(at) << 16 | get16(at + 2);
}

static void put16(unsigned char *at, unsigned value)
{
    at[0] = (unsigned char)(value >> 8);
    at[1] = (unsigned char)value;
}

static void put32(unsigned char *at, uint32_t value)
{
    put16(at, value >> 16);
    put16(at + 2, value & 0xffff);
}

static void copy(unsigned char *to, const unsigned char *from, unsigned length)
{
    while (length--)
        *to++ = *from++;
}

static void fill(unsigned char *to, unsigned char value, unsigned length)
{
    while (length--)
        *to++ = value;
}

/* The Internet checksum (RFC 1071). */
static unsigned checksum(const unsigned char *data, unsigned length)
{
    uint32_t sum = 0;

    for (unsigned at = 0; at + 1 < length; at += 2)
        sum += get16(data + at);
    if (length & 1)
        sum += (unsigned)data[length - 1] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return ~sum & 0xffff;
}

/* --- frames ------------------------------------------------------------------------------------------------------ */

static void offer(unsigned char *buffer)
{
    struct kvmpy_buffer room = {buffer, ROOM};
    int number = kvmpy_virtq_add(&receive_queue, 0, 0, &room, 1);

    check(number >= 0, 10);
    buffer_of[number] = buffer;
    kvmpy_virtq_publish(&receive_queue);
    kvmpy_virtio_mmio_notify(&device, &receive_queue);
}

/* A copy of the next frame, in `into`; its length, or 0 when nothing came for `polls` looks. */
static unsigned receive(unsigned char *into, unsigned polls)
{
    uint32_t length;
    int number;

    while ((number = kvmpy_virtq_take(&receive_queue, &length)) < 0) {
        if (!polls--)
            return 0;
        kvmpy_relax();
    }
    check(length > HEADER && length <= ROOM, 11);
    check(buffer_of[number][10] == 1 && buffer_of[number][11] == 0, 12); /* one buffer */
    copy(into, buffer_of[number] + HEADER, length - HEADER);
    offer(buffer_of[number]);
    return length - HEADER;
}

/* Send `length` bytes of `frame`. */
static void send(unsigned length)
{
    struct kvmpy_buffer parts[2] = {{out, HEADER}, {frame, length}};

    check(kvmpy_virtq_add(&transmit_queue, parts, 2, 0, 0) >= 0, 13);
    kvmpy_virtq_publish(&transmit_queue);
    kvmpy_virtio_mmio_notify(&device, &transmit_queue);
    while (kvmpy_virtq_take(&transmit_queue, 0) < 0)
        kvmpy_relax();
}

static void ethernet(const unsigned char *to, unsigned type)
{
    copy(frame, to, 6);
    copy(frame + 6, mac, 6);
    put16(frame + 12, type);
}

/* RFC 826 */
static void send_arp(unsigned operation, const unsigned char *to, const unsigned char *target, uint32_t target_ip)
{
    ethernet(to, 0x0806);
    put16(frame + 14, 1);
    put16(frame + 16, 0x0800);
    frame[18] = 6;
    frame[19] = 4;
    put16(frame + 20, operation);
    copy(frame + 22, mac, 6);
    put32(frame + 28, own_ip);
    copy(frame + 32, target, 6);
    put32(frame + 38, target_ip);
    send(42);
}

/* An IPv4 header before `length` bytes at frame + 34, and off it goes. */
static void send_ip(const unsigned char *to, unsigned protocol, uint32_t target_ip, unsigned length)
{
    unsigned char *header = frame + 14;

    ethernet(to, 0x0800);
    fill(header, 0, 20);
    header[0] = 0x45;
    put16(header + 2, 20 + length);
    header[8] = 64;
    header[9] = (unsigned char)protocol;
    put32(header + 12, own_ip);
    put32(header + 16, target_ip);
    put16(header + 10, checksum(header, 20));
    send(34 + length);
}

static void send_echo(const unsigned char *to, unsigned type, uint32_t target_ip, unsigned length)
{
    frame[34] = (unsigned char)type;
    frame[35] = 0;
    put16(frame + 36, 0);
    put16(frame + 36, checksum(frame + 34, length));
    send_ip(to, 1, target_ip, length);
}

/* The checksum is left out, as RFC 768 allows. */
static void send_udp(const unsigned char *to, uint32_t target_ip, unsigned source, unsigned target, unsigned length)
{
    put16(frame + 34, source);
    put16(frame + 36, target);
    put16(frame + 38, 8 + length);
    put16(frame + 40, 0);
    send_ip(to, 17, target_ip, 8 + length);
}

static const unsigned char nobody[6], everybody[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
static unsigned char in[ROOM];

/* Answer a frame that asks for our address; 1: it was a ping. */
static int answer(unsigned length)
{
    if (length >= 42 && get16(in + 12) == 0x0806 && get16(in + 20) == 1 && get32(in + 38) == own_ip) {
        send_arp(2, in + 6, in + 22, get32(in + 28));
    } else if (length >= 42 && get16(in + 12) == 0x0800 && in[23] == 1 && get32(in + 30) == own_ip && in[34] == 8) {
        unsigned data = get16(in + 16) - 20;

        check(checksum(in + 14, 20) == 0 && checksum(in + 34, data) == 0, 20);
        copy(frame + 34, in + 34, data);
        send_echo(in + 6, 0, get32(in + 26), data);
        return 1;
    }
    return 0;
}

/* Ask for the Ethernet address of `ip`, until there is an answer. */
static void find(uint32_t ip)
{
    for (;;) {
        send_arp(1, everybody, nobody, ip);
        for (unsigned length; (length = receive(in, 20000)) != 0;) {
            if (length >= 42 && get16(in + 12) == 0x0806 && get16(in + 20) == 2 && get32(in + 28) == ip) {
                copy(peer, in + 22, 6);
                return;
            }
            answer(length);
        }
    }
}

/* --- what there is to do ----------------------------------------------------------------------------------------- */

static void be_a_station(void)
{
    for (unsigned answered = 0; answered < COUNT;)
        answered += (unsigned)answer(receive(in, ~0u));
}

static void ping(uint32_t ip)
{
    find(ip);
    for (unsigned number = 0; number < COUNT; number++) {
        unsigned length;

        put16(frame + 38, 0x4b56); /* identifier */
        put16(frame + 40, number);
        for (unsigned at = 0; at < SIZE; at++)
            frame[42 + at] = (unsigned char)(at * 7 + number);
        send_echo(peer, 8, ip, 8 + SIZE);
        do
            length = receive(in, ~0u);
        while (!(length >= 42 && get16(in + 12) == 0x0800 && in[23] == 1 && in[34] == 0 && get16(in + 38) == 0x4b56));
        check(length == 42 + SIZE || length == 60, 30); /* short frames may be padded */
        check(get16(in + 40) == number && checksum(in + 34, 8 + SIZE) == 0, 31);
        for (unsigned at = 0; at < SIZE; at++)
            check(in[42 + at] == (unsigned char)(at * 7 + number), 32);
    }
}

/* RFC 2131; where option `wanted` is in the message in `in`, or 0. */
static const unsigned char *dhcp_option(unsigned length, unsigned wanted)
{
    for (unsigned at = 42 + 240; at + 1 < length && in[at] != 255; at += in[at] ? 2u + in[at + 1] : 1u)
        if (in[at] == wanted)
            return in + at + 2;
    return 0;
}

/* Send a message of `kind`, until there is an answer of the kind `expected`; its length. */
static unsigned ask(unsigned kind, unsigned expected, uint32_t wish, uint32_t server)
{
    unsigned char *message = frame + 42, *option;
    const unsigned char *type;

    for (;;) {
        fill(message, 0, 300);
        message[0] = 1;
        message[1] = 1;
        message[2] = 6;
        put32(message + 4, 0x6b766d70);
        copy(message + 28, mac, 6);
        put32(message + 236, 0x63825363);
        option = message + 240;
        *option++ = 53, *option++ = 1, *option++ = (unsigned char)kind;
        if (wish) {
            *option++ = 50, *option++ = 4, put32(option, wish), option += 4;
            *option++ = 54, *option++ = 4, put32(option, server), option += 4;
        }
        *option++ = 255;
        send_udp(everybody, 0xffffffff, 68, 67, 300);
        for (unsigned length; (length = receive(in, 20000)) != 0;)
            if (length >= 42 + 244 && get16(in + 12) == 0x0800 && in[23] == 17 && get16(in + 36) == 68 &&
                get32(in + 46) == 0x6b766d70 && (type = dhcp_option(length, 53)) != 0 && *type == expected)
                return length;
    }
}

static void lease(void)
{
    unsigned length;
    const unsigned char *server, *router;
    uint32_t offered, gateway;

    own_ip = 0;
    length = ask(1, 2, 0, 0); /* discover, offer */
    server = dhcp_option(length, 54);
    check(server != 0, 40);
    offered = get32(in + 42 + 16);
    length = ask(3, 5, offered, get32(server)); /* request, acknowledged */
    router = dhcp_option(length, 3);
    check(router != 0, 41);
    check(get32(in + 42 + 16) == offered, 42);
    gateway = get32(router);
    leased = own_ip = offered;
    find(gateway);
    for (unsigned number = 0; number < COUNT; number++) {
        for (unsigned at = 0; at < SIZE; at++)
            frame[42 + at] = (unsigned char)(at * 5 + number);
        send_udp(peer, gateway, 2000, PORT, SIZE);
        do {
            length = receive(in, ~0u);
            answer(length);
        } while (!(length >= 42 + SIZE && get16(in + 12) == 0x0800 && in[23] == 17 && get16(in + 36) == 2000));
        check(get32(in + 26) == gateway && get16(in + 34) == PORT && get16(in + 38) == 8 + SIZE, 43);
        for (unsigned at = 0; at < SIZE; at++)
            check(in[42 + at] == (unsigned char)~(at * 5 + number), 44);
    }
}

__attribute__((section(".text.entry"))) void _start(void)
{
    check(kvmpy_virtio_mmio_find(&device, ADDRESS, 1), 1);
    check(kvmpy_virtio_mmio_negotiate(&device, WANTED), 2);
    check(kvmpy_virtio_mmio_queue(&device, 0, &receive_queue, receive_memory, ENTRIES), 3);
    check(kvmpy_virtio_mmio_queue(&device, 1, &transmit_queue, transmit_memory, ENTRIES), 4);
    kvmpy_virtio_mmio_start(&device);
    for (unsigned at = 0; at < 6; at++)
        mac[at] = *(volatile unsigned char *)(device.registers + KVMPY_VIRTIO_MMIO_CONFIG + at);
    check(device.registers[KVMPY_VIRTIO_MMIO_CONFIG + 6] & 1, 5); /* the link is up */
    for (unsigned number = 0; number < ENTRIES; number++)
        offer(buffers[number]);
    if (WORK == STATION)
        be_a_station();
    else if (WORK == PING)
        ping(PEER_IP);
    else
        lease();
    kvmpy_exit(0);
}
