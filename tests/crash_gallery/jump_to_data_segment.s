# A far jump by the selector of a data segment
# mode: protected
# finds: descriptor-type
# says: data
        lgdt [pointer]
        .byte 0xea                      # jmp 0x10:target
        .long target
        .word 0x10
target: hlt
        .balign 8
gdt:    .quad 0
        .quad 0x00cf9a000000ffff        # 0x08 code
        .quad 0x00cf92000000ffff        # 0x10 data

pointer:
        .word pointer - gdt - 1
        .long gdt
