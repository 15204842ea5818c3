# The timer's interrupt in protected mode with the PIC as it came
# mode: protected
# irqchip: yes
# finds: pic-not-remapped
        mov al, 0x34                    # PIT channel 0, 1 kHz
        out 0x43, al
        mov al, 0xa9
        out 0x40, al
        mov al, 4
        out 0x40, al
        sti
wait:   hlt
        jmp wait
