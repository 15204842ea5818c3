# A recursion without end whose stack grows over the code
# mode: protected
# stack: 0x1040
# finds: stack-overflow
recurse:
        push -1                         # as good as any argument
        jmp recurse
