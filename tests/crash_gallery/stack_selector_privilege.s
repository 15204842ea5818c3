# SS loaded with a selector of ring 3 in ring 0
# mode: protected
# finds: selector-privilege
        lgdt [pointer]
        mov eax, 0x1b
        mov ss, eax
        hlt
        .balign 8
gdt:    .quad 0
        .quad 0x00cf9a000000ffff        # 0x08 code
        .quad 0x00cf92000000ffff        # 0x10 data
        .quad 0x00cff2000000ffff        # 0x18 data of ring 3
pointer:
        .word pointer - gdt - 1
        .long gdt
