# A stack above the end of RAM: the return address is lost
# mode: protected
# finds: stack-outside-memory
        mov esp, 0x80000000
        call function
        hlt
function:
        ret
