# An exception while the stack is where no memory is
# mode: long
# finds: stack-outside-memory
        lidt [rip + pointer]
        mov rsp, 0x80000000
        ud2
handler:
        hlt
        .balign 16
idt:    .rept 32
        .word handler, 8
        .byte 0, 0x8e
        .word 0
        .long 0, 0
        .endr
pointer:
        .word 32 * 16 - 1
        .quad idt
