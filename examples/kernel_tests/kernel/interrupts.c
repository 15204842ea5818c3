#include "interrupts.h"

/* SDM vol. 3, "64-Bit Mode IDT". */
struct gate {
    unsigned short offset_low, selector;
    unsigned char stack, type;
    unsigned short offset_middle;
    unsigned offset_high, reserved;
};

#define INTERRUPT_GATE 0x8e /* present, ring 0, 64 bits */

static struct gate table[VECTORS];
static handler *handlers[VECTORS];
unsigned interrupts_lost;

extern const unsigned long interrupt_entries[VECTORS]; /* entries.S */

/* Called by entries.S. */
void interrupts_dispatch(struct frame *frame)
{
    handler *function = handlers[frame->vector];

    if (function)
        function(frame);
    else
        interrupts_lost++;
}

void interrupts_set_up(void)
{
    struct __attribute__((packed)) {
        unsigned short limit;
        struct gate *base;
    } pointer = { sizeof table - 1, table };
    unsigned short code;

    __asm__("movw %%cs, %0" : "=r"(code));
    for (unsigned vector = 0; vector < VECTORS; vector++) {
        unsigned long entry = interrupt_entries[vector];

        table[vector] = (struct gate){
            .offset_low = (unsigned short)entry,
            .selector = code,
            .type = INTERRUPT_GATE,
            .offset_middle = (unsigned short)(entry >> 16),
            .offset_high = (unsigned)(entry >> 32),
        };
    }
    __asm__ volatile("lidt %0" : : "m"(pointer), "m"(table));
}

handler *interrupts_handle(unsigned vector, handler *function)
{
    handler *before = handlers[vector];

    handlers[vector] = function;
    return before;
}
