# HLT with interrupts on, and nobody who sends one
# mode: real
# irqchip: yes
# ends: timeout
# finds: no-interrupt-comes
# says: PIT never programmed
        sti
wait:   hlt
        jmp wait
