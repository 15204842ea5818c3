# A division with a forgotten EDX: the quotient does not fit
# mode: protected
# finds: divide-error
# says: EDX
        mov edx, 5
        mov eax, 1000
        mov ecx, 3
        div ecx
        hlt
