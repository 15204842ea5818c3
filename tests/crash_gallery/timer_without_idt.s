# The timer's interrupt before an IDT was loaded
# mode: protected
# irqchip: yes
# finds: idt-not-loaded
        mov al, 0x11                    # both PICs: ICW1 to ICW4, vectors from 0x20 and 0x28
        out 0x20, al
        out 0xa0, al
        mov al, 0x20
        out 0x21, al
        mov al, 0x28
        out 0xa1, al
        mov al, 4
        out 0x21, al
        mov al, 2
        out 0xa1, al
        mov al, 1
        out 0x21, al
        out 0xa1, al
        mov al, 0xfe                    # IRQ 0 only
        out 0x21, al
        mov al, 0xff
        out 0xa1, al
        mov al, 0x34                    # PIT channel 0, 1 kHz
        out 0x43, al
        mov al, 0xa9
        out 0x40, al
        mov al, 4
        out 0x40, al
        sti
wait:   hlt
        jmp wait
