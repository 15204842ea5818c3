# CR3 loaded before the tables are filled
# mode: long
# finds: cr3-wrong
# says: no present entry
        mov eax, 0x8000
        mov cr3, rax
        nop
        hlt
