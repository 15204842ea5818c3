# XD in a page-table entry while EFER.NXE is off
# mode: long
# finds: nxe-not-set
        mov ecx, 0xc0000080
        rdmsr
        and eax, 0xfffff7ff             # EFER.NXE
        wrmsr
        mov rax, cr3                    # RBX: the page directory
        mov rbx, [rax]
        and rbx, -0x1000
        mov rbx, [rbx]
        and rbx, -0x1000
        bts qword ptr [rbx + 8], 63
        mov cr3, rax
        mov rcx, [0x200000]
        hlt
