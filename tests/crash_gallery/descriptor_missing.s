# A GDT without the entry that is used
# mode: protected
# finds: descriptor-missing
        lgdt [pointer]
        mov eax, 0x18
        mov ds, eax
        hlt
        .balign 8
gdt:    .quad 0
        .quad 0x00cf9a000000ffff        # 0x08 code
        .quad 0x00cf92000000ffff        # 0x10 data
        .quad 0                         # 0x18
pointer:
        .word pointer - gdt - 1
        .long gdt
