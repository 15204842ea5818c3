# A division by zero in real mode, where vector 0 is 0000:0000
# mode: real
# ends: halted
# finds: ivt-entry-null
# says: #DE
        xor ax, ax
        div al                          # on to 0000:0000, through zeros, and to 0x1000 again
        hlt
