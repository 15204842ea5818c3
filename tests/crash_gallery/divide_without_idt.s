# A division by zero before an IDT was loaded
# mode: protected
# finds: divide-error
# contributes: idt-not-loaded
        xor edx, edx
        mov eax, 1000
        xor ecx, ecx
        div ecx
        hlt
