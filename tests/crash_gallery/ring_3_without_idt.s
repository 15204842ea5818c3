# A program in ring 3 executes HLT, and the kernel has no IDT
# mode: long
# finds: idt-not-loaded
# contributes: privileged-instruction
        mov rax, cr3                    # open the pages to ring 3: PML4E, PDPTE, PDE 0
        or qword ptr [rax], 4
        mov rbx, [rax]
        and rbx, -0x1000
        or qword ptr [rbx], 4
        mov rcx, [rbx]
        and rcx, -0x1000
        or qword ptr [rcx], 4
        mov cr3, rax
        push 0x23                       # to ring 3: SS, RSP, RFLAGS, CS, RIP
        push 0x8000
        push 2
        push 0x2b
        push offset program
        iretq
program:
        hlt
