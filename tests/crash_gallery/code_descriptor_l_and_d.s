# A 64-bit code descriptor that also has D
# mode: long
# finds: code-descriptor-l-and-d
        lgdt [rip + pointer]
        push 0x08
        lea rax, [rip + target]
        push rax
        lretq
target: hlt
        .balign 8
gdt:    .quad 0, 0x00ef9a000000ffff
pointer:
        .word 15
        .quad gdt
