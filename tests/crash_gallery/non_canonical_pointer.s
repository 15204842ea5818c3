# A pointer whose upper half was not sign-extended
# mode: long
# finds: non-canonical-address
        mov rax, 0x0000800000001000
        mov rbx, [rax]
        hlt
