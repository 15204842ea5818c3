# A boot sector: it reads the sector behind it by INT 13h, prints it by INT 10h, and ends with the key that INT 16h gives.
start:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    mov [drive], dl
    mov ax, 0x0201                  # read one sector ...
    mov cx, 0x0002                  # ... of track 0, the second one ...
    mov dh, 0                       # ... of side 0 ...
    mov bx, offset second           # ... to ES:BX
    int 0x13
    jc failed
    mov si, offset second
1:  lodsb
    test al, al
    jz 2f
    mov ah, 0x0e                    # teletype output
    mov bx, 7
    int 0x10
    jmp 1b

2:  mov ah, 0                       # wait for a key: AL its character, AH its scan code
    int 0x16
    mov [key], ax
    mov ah, 8                       # the drive's geometry
    mov dl, [drive]
    mov di, 0
    int 0x13
    jc failed
    mov [geometry], cx
    mov [geometry + 2], dx
    mov ax, 0x0301                  # write the second sector where the third is, and read that
    mov cx, 0x0003
    mov dh, 0
    mov dl, [drive]
    mov bx, offset second
    xor si, si
    mov es, si
    int 0x13
    jc failed
    mov ax, 0x0201
    mov bx, offset third
    int 0x13
    jc failed
    mov ax, [key]
    mov dx, 0xf4
    out dx, al
failed:
    mov [status], ah
    mov al, 0x7f
    out 0xf4, al
    hlt

    .org 502
drive:    .byte 0
status:   .byte 0
key:      .word 0
geometry: .word 0, 0
    .word 0xaa55
second:
    .asciz "The second sector speaks.\r\n"
    .org 1024
third:
    .org 1536
