# A gate with everything but the P bit
# mode: long
# finds: gate-not-present
# says: handler
        lidt [rip + pointer]
        ud2
handler:
        hlt
        .balign 16
idt:    .rept 32
        .word handler, 8
        .byte 0, 0x0e
        .word 0
        .long 0, 0
        .endr
pointer:
        .word 32 * 16 - 1
        .quad idt
