/* Two mistakes for broken_kernel.py to show: a wrong expectation, and a table of which the end was forgotten. */

#include <kvmpy/ktap.h>

#include "../kernel/interrupts.h"

static void two_and_two_are_five(void)
{
    KTAP_EXPECT_EQUAL(2 + 2, 5);
}

static void the_table_is_complete(void)
{
    struct __attribute__((packed)) {
        unsigned short limit;
        unsigned long base;
    } pointer;

    interrupts_set_up();
    __asm__ volatile("sidt %0" : "=m"(pointer));
    pointer.limit = INVALID_OPCODE * 16 - 1; /* this cuts off gate 6, for invalid opcodes, and all behind it */
    __asm__ volatile("lidt %0" : : "m"(pointer));
    __asm__ volatile("ud2");
}

static const struct ktap_test mistakes[] = {
    KTAP_TEST(two_and_two_are_five),
    KTAP_TEST(the_table_is_complete),
    { },
};
static const struct ktap_suite suites[] = { { "mistakes", mistakes }, { } };

void _start(void)
{
    kvmpy_exit(ktap_run(suites));
}
