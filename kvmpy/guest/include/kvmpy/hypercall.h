/*
 * Calls to the host's program, which answers them with `HypercallChannel.on(number, handler)`:
 *
 *     #include <kvmpy/hypercall.h>
 *
 *     long written = kvmpy_hypercall(1, (unsigned long)text, length, 0);
 *
 * A negative result is an error of the host's program, or KVMPY_ENOSYS: nobody answers this number, or KVMPY_EFAULT:
 * an address is not in memory. Addresses are physical ones. Here they are those of C; a kernel that maps its memory
 * elsewhere defines KVMPY_PHYSICAL(pointer) before. In 64-bit programs results and arguments have 64 bits, in others
 * the upper half is 0.
 *
 * The port is for ring 0, or where the I/O permission bitmap allows it; the register in memory for whom it is mapped:
 * define KVMPY_HYPERCALL_REGISTER as its (virtual) address, which physically is KVMPY_HYPERCALL_ADDRESS.
 */

#ifndef KVMPY_HYPERCALL_H
#define KVMPY_HYPERCALL_H

#include <kvmpy/ports.h>

#define KVMPY_HYPERCALL_PORT 0x5c0
#define KVMPY_HYPERCALL_ADDRESS 0xfed80000UL
#define KVMPY_HYPERCALL_SIGNATURE 0x706d766bU /* "kvmp" */

#define KVMPY_ENOSYS (-38)
#define KVMPY_EFAULT (-14)

#ifndef KVMPY_PHYSICAL
#define KVMPY_PHYSICAL(pointer) ((unsigned long)(pointer))
#endif

struct kvmpy_call {
    unsigned long long number;
    unsigned long long arguments[6];
    long long result;
} __attribute__((aligned(64))); /* so it never crosses a page, whose successor may be elsewhere */

/* Whether the machine has such a channel. */
static inline int kvmpy_has_hypercalls(void)
{
    return kvmpy_in32(KVMPY_HYPERCALL_PORT) == KVMPY_HYPERCALL_SIGNATURE;
}

/* Make a call that has been filled in; its result is there when this returns. */
static inline long long kvmpy_call(struct kvmpy_call *call)
{
    unsigned long long block = KVMPY_PHYSICAL(call);

    call->result = KVMPY_ENOSYS; /* stays without a channel */
#ifdef KVMPY_HYPERCALL_REGISTER
    ((volatile unsigned *)(KVMPY_HYPERCALL_REGISTER))[1] = (unsigned)(block >> 32);
    __asm__ volatile("movl %1, %0" : "=m"(*(volatile unsigned *)(KVMPY_HYPERCALL_REGISTER)) : "r"((unsigned)block) : "memory");
#else
    if (block >> 32)
        kvmpy_out32(KVMPY_HYPERCALL_PORT + 4, (unsigned)(block >> 32));
    kvmpy_out32(KVMPY_HYPERCALL_PORT, (unsigned)block);
#endif
    return call->result;
}

static inline long kvmpy_hypercall(unsigned long number, unsigned long first, unsigned long second, unsigned long third)
{
    struct kvmpy_call call = { number, { first, second, third }, 0 };

    return (long)kvmpy_call(&call);
}

#endif
