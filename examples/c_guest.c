/* A guest in C, started by c_guest.py in 64-bit mode with a stack and page tables: no libc, no start-up code. */

#define COM1 0x3f8
#define DEBUG_EXIT 0xf4

static void out8(unsigned short port, unsigned char value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void print(const char *text)
{
    for (; *text; text++)
        out8(COM1, *text);
}

static void print_number(unsigned number)
{
    if (number >= 10)
        print_number(number / 10);
    out8(COM1, '0' + number % 10);
}

static unsigned char composite[50]; /* in .bss: the loader clears it */

void _start(void)
{
    unsigned count = 0;

    print("Primes below 50:");
    for (unsigned number = 2; number < sizeof composite; number++) {
        if (composite[number])
            continue;
        count++;
        print(" ");
        print_number(number);
        for (unsigned multiple = 2 * number; multiple < sizeof composite; multiple += number)
            composite[multiple] = 1;
    }
    print("\n");
    out8(DEBUG_EXIT, count);
    for (;;) /* never reached: the write ends the run */
        __asm__ volatile("hlt");
}
