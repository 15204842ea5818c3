# A jump through such a pointer
# mode: long
# finds: non-canonical-address
        mov rax, 0x0000800000001000
        jmp rax
