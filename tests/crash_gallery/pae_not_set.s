# Long mode without CR4.PAE
# mode: protected
# finds: pae-not-set
        mov eax, 0x8000
        mov cr3, eax
        mov ecx, 0xc0000080
        rdmsr
        or eax, 0x100                   # EFER.LME
        wrmsr
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        hlt
