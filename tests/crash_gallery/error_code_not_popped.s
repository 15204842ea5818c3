# A handler of #PF that leaves the error code on the stack
# mode: long
# finds: error-code-not-popped
        lidt [rip + pointer]
        mov rax, 0x5000000000
        mov rbx, [rax]                  # #PF(0)
        hlt
handler:
        iretq
        .balign 16
idt:    .fill 14 * 16, 1, 0
        .word handler, 8                # 14, #PF
        .byte 0, 0x8e
        .word 0
        .long 0, 0
pointer:
        .word 15 * 16 - 1
        .quad idt
