# A page-fault handler that touches the page that is not there
# mode: long
# memory: 0x600000
# finds: fault-in-handler
# contributes: stack-overflow
        lidt [rip + pointer]
        mov rax, cr3                    # RBX: the page directory
        mov rbx, [rax]
        and rbx, -0x1000
        mov rbx, [rbx]
        and rbx, -0x1000
        and qword ptr [rbx + 8], -2     # 2 MiB to 4 MiB is not mapped
        mov cr3, rax
        mov rsp, 0x400100
        jmp start
handler:
        mov rdx, [rsi]                  # meant to look at the cause
        iretq
start:  mov rsi, 0x5000000000
        mov rdx, [rsi]
        hlt
        .balign 16
idt:    .fill 14 * 16, 1, 0
        .word handler, 8                # 14, #PF
        .byte 0, 0x8e
        .word 0
        .long 0, 0
pointer:
        .word 15 * 16 - 1
        .quad idt
