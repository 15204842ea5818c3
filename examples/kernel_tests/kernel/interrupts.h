/* The interrupt descriptor table, and handlers in C. */

#ifndef INTERRUPTS_H
#define INTERRUPTS_H

#define DIVIDE_ERROR 0
#define INVALID_OPCODE 6
#define PAGE_FAULT 14
#define VECTORS 32 /* the processor's exceptions; no devices yet */

/* What is on the stack when a handler is called: our registers, then what the processor has pushed. */
struct frame {
    unsigned long r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
    unsigned long vector, error_code;
    unsigned long rip, cs, rflags, rsp, ss;
};

typedef void handler(struct frame *frame);

/* Fill the table and load it. */
void interrupts_set_up(void);
/* Call `function` for a vector; it may change the frame. Returns the handler before. */
handler *interrupts_handle(unsigned vector, handler *function);
/* How often a vector came for which there is no handler. */
extern unsigned interrupts_lost;

#endif
