# A table for SSE that was not aligned
# mode: long
# finds: misaligned-operand
        lea rax, [rip + table]
        movaps xmm0, [rax]
        hlt
        .balign 16
        .byte 0
table:  .quad 1, 2
