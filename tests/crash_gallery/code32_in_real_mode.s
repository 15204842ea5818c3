# Code for 32 bits that starts in real mode
# mode: real
# ends: halted
# finds: code-width
# says: 32-bit
        .code32
        mov eax, 1
        mov ebx, 2
        add eax, ebx
        mov [0x8000], eax
        hlt
