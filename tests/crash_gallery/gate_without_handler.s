# An IDT with gates for some exceptions only
# mode: long
# finds: page-not-present
# contributes: gate-not-present
        lidt [rip + pointer]
        mov rax, 0x5000000000
        mov rbx, [rax]
handler:
        hlt
        .balign 16
idt:    .rept 4
        .word handler, 8
        .byte 0, 0x8e
        .word 0
        .long 0, 0
        .endr
        .fill 28 * 16, 1, 0
pointer:
        .word 32 * 16 - 1
        .quad idt
