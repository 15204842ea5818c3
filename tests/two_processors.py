"""A guest that two processors execute at the same time, in real mode: both begin at `_start`."""

COUNTER = 0x8000


def working_twice(calls: int) -> str:
    """Each calls `work` so often, which counts at COUNTER; then it waits for the other, and ends the run."""
    return f"""
        .code16
_start: mov ax, 0
        mov ds, ax
        mov si, {calls}
again:  call work
        dec si
        jnz again
        lock inc byte ptr [{COUNTER + 0x800}]
wait:   cmp byte ptr [{COUNTER + 0x800}], 2
        jne wait
        mov al, 0
        out 0xf4, al
stop:   hlt
        jmp stop
work:   lock inc word ptr [{COUNTER}]
        ret
"""
