# CR0.PG before CR0.PE
# mode: real
# finds: ivt-entry-null
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        hlt
