# A boot loader that waits for the disk controller of a PC
# mode: real
# ends: timeout
# finds: polls-absent-device
# says: 0x1f7
        mov dx, 0x1f7
busy:   in al, dx
        test al, 0x80                   # BSY
        jnz busy
        hlt
