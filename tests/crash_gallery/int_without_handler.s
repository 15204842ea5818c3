# INT n in real mode without a handler
# mode: real
# finds: ivt-entry-null
# says: INT 0x21
        mov ah, 9
        int 0x21                # the vector table is all zeros: on to 0000:0000
        hlt
