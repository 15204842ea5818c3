# A loop whose counter never becomes zero
# mode: protected
# ends: timeout
# finds: endless-loop
# says: again
        mov ecx, 1
again:  add eax, ecx
        add ecx, 2
        jnz again
        hlt
