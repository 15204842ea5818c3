# 32-bit code right after CR0.PE, without the far jump that loads CS
# mode: real
# finds: missing-far-jump
        lgdt [pointer]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        .code32                         # the processor does not know that
        mov eax, 0x10
        mov ds, eax
        mov esp, 0x8000
        push eax
        jmp 0xc0000
        .balign 8
gdt:    .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
pointer:
        .word 23
        .long gdt
