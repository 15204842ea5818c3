# UD2, which compilers put where code must not come
# mode: long
# finds: undefined-instruction
# contributes: idt-not-loaded
        nop
        ud2
