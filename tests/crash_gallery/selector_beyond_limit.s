# A selector beyond the end of the GDT
# mode: protected
# finds: selector-beyond-limit
# says: 0x0100
        mov eax, 0x100
        mov ds, eax
        hlt
