# A data segment that is smaller than the data
# mode: protected
# finds: segment-limit
# says: 0xfff
        lgdt [pointer]
        mov eax, 0x18
        mov ds, eax
        mov dword ptr [0x2000], 1
        hlt
        .balign 8
gdt:    .quad 0
        .quad 0x00cf9a000000ffff        # 0x08 code
        .quad 0x00cf92000000ffff        # 0x10 data
        .quad 0x0040920000000fff        # 0x18 data, limit 0xfff
pointer:
        .word pointer - gdt - 1
        .long gdt
