# LTR of a TSS that is in use
# mode: protected
# finds: tss-busy
        str eax
        ltr ax
        hlt
