# A far call that wants FFFF:0510 to wrap to 0000:0500, as on an 8086
# mode: real
# finds: a20-wrap
        mov byte ptr [0x500], 0xcb      # retf, at 0000:0500
        .byte 0x9a                      # call 0xffff:0x0510
        .word 0x0510, 0xffff
        hlt
