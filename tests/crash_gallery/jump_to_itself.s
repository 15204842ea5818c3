# The end of a program that nobody was told about
# mode: protected
# ends: timeout
# finds: endless-loop
        mov eax, 1
stop:   jmp stop
