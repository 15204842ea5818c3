# A write to a read-only page, with CR0.WP set
# mode: long
# finds: page-read-only
        mov rax, cr3                    # RBX: the page directory
        mov rbx, [rax]
        and rbx, -0x1000
        mov rbx, [rbx]
        and rbx, -0x1000
        and qword ptr [rbx + 8], -3     # 2 MiB to 4 MiB
        mov cr3, rax
        mov qword ptr [0x200000], 1
        hlt
