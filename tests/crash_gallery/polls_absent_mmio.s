# A driver that waits for a register of a device that is not there
# mode: protected
# ends: timeout
# finds: polls-absent-device
# says: 0xfe000010
busy:   test dword ptr [0xfe000010], 1
        jnz busy
        hlt
