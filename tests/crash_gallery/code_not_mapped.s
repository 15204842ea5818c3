# New page tables that map the upper half only
# mode: long
# finds: code-not-mapped
        mov rax, cr3
        mov rbx, [rax]
        mov edi, 0x8000
        mov [edi + 8 * 256], rbx        # 0xffff800000000000 and up
        mov cr3, rdi
        nop
        hlt
