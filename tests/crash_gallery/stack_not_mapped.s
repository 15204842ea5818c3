# A stack pointer that leads to no page
# mode: long
# finds: stack-not-mapped
        mov rsp, 0x6000000000
        call function
        hlt
function:
        ret
