/* I/O ports, for freestanding x86 programs. */

#ifndef KVMPY_PORTS_H
#define KVMPY_PORTS_H

static inline void kvmpy_out8(unsigned short port, unsigned char value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void kvmpy_out32(unsigned short port, unsigned value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline unsigned char kvmpy_in8(unsigned short port)
{
    unsigned char value;

    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline unsigned kvmpy_in32(unsigned short port)
{
    unsigned value;

    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

#endif
