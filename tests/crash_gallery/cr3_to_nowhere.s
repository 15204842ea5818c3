# CR3 loaded with an address where no memory is
# mode: long
# finds: cr3-wrong
# says: no guest memory
        mov rax, 0x80000000
        mov cr3, rax
        nop
        hlt
