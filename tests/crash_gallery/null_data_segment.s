# DS may be null, but not be used then
# mode: protected
# finds: selector-null
        xor eax, eax
        mov ds, eax
        mov ebx, [0x2000]
        hlt
