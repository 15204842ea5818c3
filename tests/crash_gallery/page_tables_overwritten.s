# A buffer of ones that ends in the page tables
# mode: long
# finds: page-tables-overwritten
        mov rdi, cr3
        xor eax, eax
        mov ecx, 1
        mov rbx, [rdi]                  # the PDPT
        and rbx, -0x1000
        mov qword ptr [rbx], 0x4242420
        mov cr3, rdi
        mov rcx, [0x200000]
        hlt
