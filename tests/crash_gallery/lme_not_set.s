# Long mode's page tables without EFER.LME
# mode: protected
# finds: lme-not-set
        mov dword ptr [0x8000], 0x9003  # PML4E
        mov dword ptr [0x9000], 0x83    # PDPTE
        mov eax, 0x8000
        mov cr3, eax
        mov eax, cr4
        or eax, 0x20                    # PAE
        mov cr4, eax
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        hlt
