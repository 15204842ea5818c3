#include <kvmpy/ktap.h>

#include "../kernel/interrupts.h"

static struct frame seen;
static unsigned times;

/* UD2 is two bytes long, and so are the two other instructions below that fault. */
static void go_on_behind(struct frame *frame)
{
    seen = *frame;
    times++;
    frame->rip += 2;
}

static void an_invalid_opcode_reaches_its_handler(void)
{
    times = 0;
    interrupts_handle(INVALID_OPCODE, go_on_behind);
    __asm__ volatile("ud2");
    KTAP_EXPECT_EQUAL(times, 1);
    KTAP_EXPECT_EQUAL(seen.vector, INVALID_OPCODE);
    KTAP_EXPECT_EQUAL(seen.error_code, 0);
}

static void a_division_by_zero_reaches_its_handler(void)
{
    unsigned quotient = 7, remainder = 0;

    times = 0;
    interrupts_handle(DIVIDE_ERROR, go_on_behind);
    __asm__ volatile("divl %2" : "+a"(quotient), "+d"(remainder) : "r"(0));
    KTAP_EXPECT_EQUAL(times, 1);
    KTAP_EXPECT_EQUAL(quotient, 7);
}

static void a_page_fault_says_where(void)
{
    unsigned long address = 0x123456789000, cr2;

    times = 0;
    interrupts_handle(PAGE_FAULT, go_on_behind);
    __asm__ volatile("movb %%al, (%0)" : : "b"(address) : "memory");
    __asm__ volatile("movq %%cr2, %0" : "=r"(cr2));
    KTAP_EXPECT_EQUAL(times, 1);
    KTAP_EXPECT_EQUAL(cr2, address);
    KTAP_EXPECT_EQUAL(seen.error_code, 2); /* a write, nothing mapped */
}

static void registers_survive(void)
{
    interrupts_handle(INVALID_OPCODE, go_on_behind);

    unsigned long rax = 1, rcx = 2, rdx = 3, rsi = 4, rdi = 5;
    register unsigned long r8 __asm__("r8") = 8, r11 __asm__("r11") = 11; /* only up to the next call */

    __asm__ volatile("ud2" : "+a"(rax), "+c"(rcx), "+d"(rdx), "+S"(rsi), "+D"(rdi), "+r"(r8), "+r"(r11));
    KTAP_EXPECT_EQUAL(rax + rcx + rdx + rsi + rdi + r8 + r11, 1 + 2 + 3 + 4 + 5 + 8 + 11);
    KTAP_EXPECT_EQUAL(seen.rcx, 2);
    KTAP_EXPECT_EQUAL(seen.r11, 11);
}

static void mend(struct frame *frame)
{
    frame->rax = 42;
    frame->rip += 2;
}

static void a_handler_may_change_registers(void)
{
    unsigned long value = 0;

    KTAP_EXPECT(interrupts_handle(INVALID_OPCODE, mend) == go_on_behind);
    __asm__ volatile("ud2" : "+a"(value));
    KTAP_EXPECT_EQUAL(value, 42);
    KTAP_EXPECT_EQUAL(interrupts_lost, 0);
}

static const struct ktap_test exceptions[] = {
    KTAP_TEST(an_invalid_opcode_reaches_its_handler),
    KTAP_TEST(a_division_by_zero_reaches_its_handler),
    KTAP_TEST(a_page_fault_says_where),
    KTAP_TEST(registers_survive),
    KTAP_TEST(a_handler_may_change_registers),
    { },
};
static const struct ktap_suite suites[] = { { "exceptions", exceptions }, { } };

void _start(void)
{
    interrupts_set_up();
    kvmpy_exit(ktap_run(suites));
}
