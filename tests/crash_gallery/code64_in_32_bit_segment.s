# 64-bit code behind a far jump to a 32-bit code descriptor
# mode: long
# ends: halted
# finds: cs-not-64-bit
        mov rsp, 0x8000
        push 0x40                       # the 32-bit code segment of the prepared GDT
        lea rax, [rip + code]
        push rax
        lretq
code:   mov rax, rbx
        add rax, 8
        lea rcx, [rax + 8]
        xor rdx, rdx
        hlt
