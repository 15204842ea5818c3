# A jump into a page with XD
# mode: long
# memory: 0x400000
# finds: page-no-execute
        mov rax, cr3                    # RBX: the page directory
        mov rbx, [rax]
        and rbx, -0x1000
        mov rbx, [rbx]
        and rbx, -0x1000
        mov byte ptr [0x200000], 0xf4
        bts qword ptr [rbx + 8], 63     # 2 MiB to 4 MiB
        mov cr3, rax
        mov rcx, 0x200000
        jmp rcx
