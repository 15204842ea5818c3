# A return address that a buffer overrun has replaced
# mode: protected
# finds: return-to-garbage
# says: 0x64636261
        mov esp, 0x8000
        call function
        hlt
function:
        sub esp, 8                      # a buffer of 8 bytes
        mov edi, esp
        mov eax, 0x64636261
        mov ecx, 3                      # and 12 bytes into it
        rep stosd
        add esp, 8
        ret
