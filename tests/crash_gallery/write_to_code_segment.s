# A variable written through CS
# mode: protected
# finds: segment-not-writable
        mov dword ptr cs:[counter], 1
        hlt
counter: .long 0
