# A program in ring 3 faults, and the kernel has not set RSP0 in the TSS
# mode: long
# finds: tss-stack
# says: RSP0
        lidt [rip + pointer]
        sgdt [rip + gdtr]
        mov rax, [rip + gdtr + 2]
        mov ecx, [rax + 0x32]           # the base in the TSS descriptor, 0x30
        and ecx, 0xffffff
        mov edx, [rax + 0x34]
        and edx, 0xff000000
        or ecx, edx
        mov qword ptr [rcx + 4], 0      # RSP0
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
        ud2
handler:
        hlt
gdtr:   .fill 10, 1, 0
        .balign 16
idt:    .rept 32
        .word handler, 8
        .byte 0, 0x8e
        .word 0
        .long 0, 0
        .endr
pointer:
        .word 32 * 16 - 1
        .quad idt
