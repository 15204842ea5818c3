# INT n before an IDT was loaded
# mode: protected
# finds: idt-not-loaded
        int 0x30
        hlt
