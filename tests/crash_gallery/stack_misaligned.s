# A local variable for SSE on a stack that is 8 bytes off
# mode: long
# finds: stack-misaligned
        mov rsp, 0x8008
        sub rsp, 32
        movaps [rsp], xmm0
        hlt
