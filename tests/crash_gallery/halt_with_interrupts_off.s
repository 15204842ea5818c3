# CLI; HLT
# mode: real
# irqchip: yes
# ends: halted
# finds: halt-with-interrupts-off
        cli
        hlt
