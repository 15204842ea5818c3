# A bit of CR4 that does not exist
# mode: long
# finds: control-register-value
        mov rax, cr4
        bts rax, 31
        mov cr4, rax
        hlt
