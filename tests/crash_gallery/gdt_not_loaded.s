# The switch to protected mode without LGDT
# mode: real
# finds: gdt-not-loaded
        mov eax, cr0
        or al, 1
        mov cr0, eax
        .byte 0xea                      # jmp 0x08:protected
        .word protected, 8
        .code32
protected:
        hlt
