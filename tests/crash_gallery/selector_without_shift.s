# The number of a descriptor taken for its selector: 5 means entry 0 of the LDT
# mode: protected
# finds: no-ldt
        mov eax, 5
        mov ds, eax
        hlt
