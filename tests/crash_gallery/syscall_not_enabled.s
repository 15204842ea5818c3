# SYSCALL with EFER.SCE off
# mode: long
# finds: feature-not-enabled
        syscall
        hlt
