# A loop that clears too much
# mode: protected
# finds: code-overwritten
        mov edi, offset buffer
        mov ecx, 64
        mov al, 0xff
        rep stosb
        jmp after
buffer: .fill 16, 1, 0
after:  mov eax, 1
        hlt
