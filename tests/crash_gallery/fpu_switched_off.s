# SSE while CR0.TS waits for the registers of another task
# mode: long
# finds: fpu-switched-off
        mov rax, cr0
        or eax, 8
        mov cr0, rax
        movaps xmm0, xmm1
        hlt
