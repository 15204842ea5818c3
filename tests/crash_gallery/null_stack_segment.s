# SS loaded with the null selector
# mode: protected
# finds: selector-null
        xor eax, eax
        mov ss, eax
        hlt
