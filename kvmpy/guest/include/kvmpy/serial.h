/* Text on the first serial port, which kvmpy shows as the console. */

#ifndef KVMPY_SERIAL_H
#define KVMPY_SERIAL_H

#include <kvmpy/ports.h>

#define KVMPY_COM1 0x3f8

/* No wait for the transmitter: kvmpy's 16550 is always ready. A real one wants bit 5 of port 0x3fd. */
static inline void kvmpy_put(char character)
{
    kvmpy_out8(KVMPY_COM1, (unsigned char)character);
}

static inline void kvmpy_print(const char *text)
{
    while (*text)
        kvmpy_put(*text++);
}

static inline void kvmpy_print_unsigned(unsigned long number)
{
    char digits[24];
    unsigned count = 0;

    do {
        digits[count++] = (char)('0' + number % 10);
        number /= 10;
    } while (number);
    while (count)
        kvmpy_put(digits[--count]);
}

static inline void kvmpy_print_hex(unsigned long number)
{
    unsigned shift = 8 * sizeof number;

    kvmpy_print("0x");
    while (shift > 4 && !(number >> (shift - 4)))
        shift -= 4;
    while (shift) {
        shift -= 4;
        kvmpy_put("0123456789abcdef"[number >> shift & 15]);
    }
}

#endif
