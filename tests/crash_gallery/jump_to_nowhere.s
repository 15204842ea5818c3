# A jump to an address where the machine has no memory
# mode: protected
# finds: fetch-outside-memory
        mov eax, 0xc0000000
        jmp eax
