# A recursion without end above a page that is not mapped
# mode: long
# memory: 0x600000
# finds: stack-overflow
# says: 0x200000
        mov rax, cr3                    # RBX: the page directory
        mov rbx, [rax]
        and rbx, -0x1000
        mov rbx, [rbx]
        and rbx, -0x1000
        mov rsp, 0x200100
        lea rsi, [rip + begin]
        mov rdi, 0x400000               # the code goes on above the stack
        mov ecx, offset end - begin
        rep movsb
        mov rdx, 0x400000
        jmp rdx
begin:  and qword ptr [rbx], -2         # 0 to 2 MiB is a guard page from now on
        mov cr3, rax
recurse:
        call recurse
end:
