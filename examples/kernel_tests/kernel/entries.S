/* Where the processor goes for each vector. Some exceptions push an error code; for the others we push 0. */

.macro entry vector
entry_\vector:
    .if !((1 << \vector) & 0x60227d00) /* 8, 10 to 14, 17, 21, 29, 30: SDM vol. 3, "Exception and Interrupt Reference" */
    pushq $0
    .endif
    pushq $\vector
    jmp common
.endm

.altmacro
.set number, 0
.rept 32
    entry %number
    .set number, number + 1
.endr

common:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    movq %rsp, %rdi
    cld
    movq %rsp, %rax /* the ABI wants the stack aligned to 16 bytes at a call */
    andq $-16, %rsp
    subq $16, %rsp
    movq %rax, (%rsp)
    call interrupts_dispatch
    movq (%rsp), %rsp
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rax
    addq $16, %rsp /* vector and error code */
    iretq

.section .rodata
.balign 8
.globl interrupt_entries
interrupt_entries:
.macro address vector
    .quad entry_\vector
.endm
.set number, 0
.rept 32
    address %number
    .set number, number + 1
.endr

.section .note.GNU-stack, "", @progbits
