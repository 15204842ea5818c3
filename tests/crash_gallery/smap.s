# Ring 0 reads an argument of a program without STAC
# mode: long
# memory: 0x400000
# finds: smap
        mov rax, cr3                    # RBX: the page directory
        mov rbx, [rax]
        and rbx, -0x1000
        mov rbx, [rbx]
        and rbx, -0x1000
        mov rcx, [rax]                  # US in all levels for 2 MiB to 4 MiB
        or qword ptr [rax], 4
        and rcx, -0x1000
        or qword ptr [rcx], 4
        or qword ptr [rbx + 8], 4
        mov rdx, cr4
        bts rdx, 21                     # SMAP
        mov cr4, rdx
        mov cr3, rax
        mov rcx, [0x200000]
        hlt
