# A write to the text screen with the DS of real mode
# mode: real
# finds: data-segment-not-reloaded
# says: base 0x0
        lgdt [pointer]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        .byte 0xea                      # jmp 0x08:protected
        .word protected, 8
        .code32
protected:
        mov word ptr [0xb8000], 0x0741
        hlt
        .balign 8
gdt:    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
pointer:
        .word 23
        .long gdt
