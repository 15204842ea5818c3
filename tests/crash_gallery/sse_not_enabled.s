# SSE before the system has switched it on
# mode: long
# finds: sse-not-enabled
        mov rax, cr4
        btr rax, 9                      # OSFXSR
        mov cr4, rax
        movaps xmm0, xmm1
        hlt
