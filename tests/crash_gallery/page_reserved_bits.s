# A large page whose address is not aligned to its size
# mode: long
# finds: page-reserved-bits
        mov rax, cr3                    # RBX: the page directory
        mov rbx, [rax]
        and rbx, -0x1000
        mov rbx, [rbx]
        and rbx, -0x1000
        or qword ptr [rbx + 8], 0x2000  # 2 MiB page, bit 13
        mov cr3, rax
        mov rcx, [0x200000]
        hlt
