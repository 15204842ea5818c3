# A null pointer's neighbour: an address that no page maps
# mode: long
# finds: page-not-present
        mov rax, 0x5000000000
        mov qword ptr [rax + 8], 1
        hlt
