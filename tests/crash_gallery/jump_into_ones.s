# A jump into memory that is all ones, like an erased ROM
# mode: protected
# finds: executes-ff
        mov edi, 0x8000
        mov ecx, 0x100
        mov al, 0xff
        rep stosb
        jmp 0x8010
