# A loop whose counter never becomes zero
# mode: protected
# ends: timeout
# finds: busy-loop
# weight: possible
# says: again
        mov ecx, 1
again:  add eax, ecx
        add ecx, 2
        jnz again
        hlt
