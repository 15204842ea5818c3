/*
 * A guest in a ROM that works in ring 3 of long mode, so that its own part is run by the processor on every host. A
 * program includes this once and defines `work`. At the end it gives a number, most often ticks of the TSC, to `end`:
 * see guests.py.
 *
 * Linked as a flat file for 0x20000, with .bss at 0x100000, and put at the beginning of a ROM of 64 KiB at 0xffff0000; it
 * copies itself into RAM, which is zero otherwise. Addresses are physical ones, in the first 32 MiB and the last 32 MiB
 * under 4 GiB.
 */

#include <kvmpy/ports.h>

/* Real mode, as the reset vector comes here, then flat protected mode, then long mode, then its ring 3. */
__asm__("        .section .entry, \"ax\"\n"
        "        .code16\n"
        "entry:  cli\n"
        "        lgdtl %cs:(pointer - 0x20000)\n"
        "        movl %cr0, %eax\n"
        "        orb $1, %al\n"
        "        movl %eax, %cr0\n"
        "        ljmpl $8, $(protected + 0xfffd0000)\n"
        "        .balign 8\n"
        /* Accessed bits set: the processor must not have to write into the ROM. */
        "gdt:    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff\n"
        "pointer: .word 23\n"
        "        .long gdt + 0xfffd0000\n"
        "        .code32\n"
        "protected:\n"
        "        movw $0x10, %ax\n"
        "        movw %ax, %ds\n"
        "        movw %ax, %es\n"
        "        movw %ax, %ss\n"
        "        cld\n"
        "        movl $0xffff0000, %esi\n"
        "        movl $0x20000, %edi\n"
        "        movl $0x1000, %ecx\n" /* 16 KiB */
        "        rep movsl\n"
        /* Identical addresses for 32 MiB from 0 on, and for the 32 MiB under 4 GiB, in pages of 2 MiB for all rings. */
        "        movl $0x11007, 0x10000\n"
        "        movl $0x12007, 0x11000\n"
        "        movl $0x13007, 0x11018\n"
        "        movl $0x87, %eax\n"
        "        movl $0x12000, %edi\n"
        "        movl $16, %ecx\n"
        "1:      movl %eax, (%edi)\n"
        "        addl $0x200000, %eax\n"
        "        addl $8, %edi\n"
        "        decl %ecx\n"
        "        jnz 1b\n"
        "        movl $0xfe000087, %eax\n"
        "        movl $0x13f80, %edi\n"
        "        movl $16, %ecx\n"
        "1:      movl %eax, (%edi)\n"
        "        addl $0x200000, %eax\n"
        "        addl $8, %edi\n"
        "        decl %ecx\n"
        "        jnz 1b\n"
        /* A TSS at 0x14000 that lets ring 3 use all ports, and at 0x17000 a GDT that is writable: LTR marks it busy. */
        "        movw $0x68, 0x14066\n"
        "        movb $0xff, 0x16068\n"
        "        movl $0x0000ffff, 0x17008\n"
        "        movl $0x00af9b00, 0x1700c\n"
        "        movl $0x0000ffff, 0x17010\n"
        "        movl $0x00cf9300, 0x17014\n"
        "        movl $0x0000ffff, 0x17018\n"
        "        movl $0x00affb00, 0x1701c\n"
        "        movl $0x0000ffff, 0x17020\n"
        "        movl $0x00cff300, 0x17024\n"
        "        movl $0x40002068, 0x17028\n"
        "        movl $0x00008901, 0x1702c\n"
        "        movw $0x37, 0x17100\n"
        "        movl $0x17000, 0x17102\n"
        "        movl %cr4, %eax\n"
        "        orl $0x20, %eax\n"
        "        movl %eax, %cr4\n"
        "        movl $0x10000, %eax\n"
        "        movl %eax, %cr3\n"
        "        movl $0xc0000080, %ecx\n"
        "        rdmsr\n"
        "        orl $0x100, %eax\n"
        "        wrmsr\n"
        "        movl %cr0, %eax\n"
        "        orl $0x80000000, %eax\n"
        "        movl %eax, %cr0\n"
        "        lgdt 0x17100\n"
        "        ljmp $8, $long_mode\n"
        "        .code64\n"
        "long_mode:\n"
        "        movw $0x10, %ax\n"
        "        movw %ax, %ds\n"
        "        movw %ax, %es\n"
        "        movw %ax, %ss\n"
        "        movl $0x40000, %esp\n"
        "        movw $0x28, %ax\n"
        "        ltr %ax\n"
        "        pushq $0x23\n"
        "        pushq $0x80000\n"
        "        pushq $2\n"
        "        pushq $0x1b\n"
        "        movl $work, %eax\n"
        "        pushq %rax\n"
        "        iretq\n"
        "        .text\n");

__attribute__((used, noreturn)) void work(void);

static inline unsigned ticks(void)
{
    unsigned low, high;

    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return low;
}

static inline __attribute__((noreturn)) void end(unsigned result)
{
    for (unsigned byte = 0; byte < 4; byte++)
        kvmpy_out8(RESULT_PORT, (unsigned char)(result >> 8 * byte));
    for (;;)
        kvmpy_out32(EXIT_PORT, 0);
}
