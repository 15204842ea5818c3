# A jump into empty memory: zeros are instructions, and the processor runs on to the end of RAM
# mode: long
# memory: 0x20000
# finds: runs-through-zeroes
        mov eax, 0
        jmp 0x5000
