# LIDT with the number of gates for the limit
# mode: long
# finds: idt-limit-too-small
        lidt [rip + pointer]
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
        .word 32                        # and not 32 * 16 - 1
        .quad idt
