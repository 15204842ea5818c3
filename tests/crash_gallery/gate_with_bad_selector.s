# Gates with a code selector that is beyond the GDT
# mode: long
# finds: gate-selector
# says: 0x0800
        lidt [rip + pointer]
        ud2
handler:
        hlt
        .balign 16
idt:    .rept 32
        .word handler, 0x800            # 8 was meant
        .byte 0, 0x8e
        .word 0
        .long 0, 0
        .endr
pointer:
        .word 32 * 16 - 1
        .quad idt
