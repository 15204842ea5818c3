# LSTAR with an address that is not canonical
# mode: long
# finds: msr-refused
# says: IA32_LSTAR
        mov ecx, 0xc0000082
        mov edx, 0x8000
        xor eax, eax
        wrmsr
        hlt
