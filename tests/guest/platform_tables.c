/* A kernel that finds processors and interrupt inputs as an operating system does, by the MP table or by ACPI ("acpi"
   on its command line), starts the processors, and says all that on the serial port. */

__asm__ (".globl _start; _start: movl $stack + 16384, %esp; pushl %ebx; pushl %eax; pushl $0; popf; call kernel");
__attribute__((section(".multiboot"), used, aligned(4)))
static const unsigned header[] = { 0x1badb002, 2, -(0x1badb002 + 2) };
char stack[16384];

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static inline void outb(u16 port, u8 value) { __asm__ volatile ("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outw(u16 port, u16 value) { __asm__ volatile ("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline u16 inw(u16 port) { u16 value; __asm__ volatile ("inw %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static inline u32 inl(u16 port) { u32 value; __asm__ volatile ("inl %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static void put(char character) { outb(0x3f8, character); }
static void print(const char *text) { while (*text) put(*text++); }
static void hex(u64 value)
{
    int digits = 1;
    while (digits < 16 && value >> 4 * digits) digits++;
    while (digits--) put("0123456789abcdef"[value >> 4 * digits & 15]);
}
static void say(const char *name, u64 value) { print(name); put(' '); hex(value); put('\n'); }
static void leave(u8 code) { for (;;) outb(0xf4, code); }
static void fail(const char *why) { print(why); put('\n'); leave(1); }

static u16 half(const u8 *at) { return at[0] | at[1] << 8; }
static u32 word(const u8 *at) { return half(at) | (u32) half(at + 2) << 16; }
static int same(const u8 *at, const char *text) { while (*text) if (*at++ != (u8) *text++) return 0; return 1; }
static void check(const u8 *at, u32 size, const char *what)
{
    u8 sum = 0;
    while (size--) sum += *at++;
    if (sum) { print("bad checksum: "); fail(what); }
}

/* What the tables say. */
static u8 apic_ids[256];
static u32 processors, boot_processor, local_apic, ioapic, inputs[16], levels;

static const u8 *search(u32 start, u32 end, const char *signature)
{
    for (const u8 *at = (const u8 *) start; at < (const u8 *) end; at += 16)
        if (same(at, signature)) return at;
    return 0;
}

static void read_mp_table(void)
{
    const u8 *pointer = search(0x9fc00, 0xa0000, "_MP_");
    if (!pointer) pointer = search(0xf0000, 0x100000, "_MP_");
    if (!pointer) fail("no MP table");
    check(pointer, 16, "_MP_");
    const u8 *table = (const u8 *) word(pointer + 4);
    if (!same(table, "PCMP")) fail("no PCMP");
    check(table, half(table + 4), "PCMP");
    local_apic = word(table + 36);
    u32 isa = 0x100;
    const u8 *at = table + 44;
    for (u32 left = half(table + 34); left; left--, at += *at ? 8 : 20)
        switch (*at) {
        case 0:
            if (at[3] & 2) boot_processor = at[1];
            if (at[3] & 1) apic_ids[processors++] = at[1];
            break;
        case 1: if (same(at + 2, "ISA   ")) isa = at[1]; break;
        case 2: if (at[3] & 1) ioapic = word(at + 4); break;
        case 3:
            if (at[1] == 0 && at[4] == isa) {
                inputs[at[5]] = at[7];
                levels |= (half(at + 2) >> 2 & 3) == 3 ? 1 << at[5] : 0;
            }
        }
    if (at != table + half(table + 4)) fail("entries and length differ");
}

static const u8 *acpi_table(const char *signature)
{
    const u8 *pointer = search(0xe0000, 0x100000, "RSD PTR ");
    if (!pointer) fail("no RSDP");
    check(pointer, 20, "RSDP");
    check(pointer, 36, "RSDP, all of it");
    const u8 *roots = (const u8 *) word(pointer + 24);
    check(roots, word(roots + 4), "XSDT");
    for (const u8 *at = roots + 36; at < roots + word(roots + 4); at += 8) {
        const u8 *table = (const u8 *) word(at);
        if (same(table, signature)) {
            check(table, word(table + 4), signature);
            return table;
        }
    }
    fail(signature);
    return 0;
}

static void read_madt(void)
{
    const u8 *table = acpi_table("APIC");
    local_apic = word(table + 36);
    boot_processor = *(volatile u32 *) (local_apic + 0x20) >> 24;
    for (u32 irq = 0; irq < 16; irq++) inputs[irq] = irq;
    for (const u8 *at = table + 44; at < table + word(table + 4); at += at[1])
        switch (*at) {
        case 0: if (word(at + 4) & 1) apic_ids[processors++] = at[3]; break;
        case 1: ioapic = word(at + 4); break;
        case 2:
            inputs[at[3]] = word(at + 4);
            levels |= (half(at + 8) >> 2 & 3) == 3 ? 1 << at[3] : 0;
        }
}

/* The others come up at 0x8000 in real mode, and count themselves at the place of the APIC id that CPUID tells. */
__asm__ (".code16; first: xorw %ax, %ax; movw %ax, %ds; movl $1, %eax; cpuid; shrl $24, %ebx;"
         "movb $1, 0x9000(%bx); cli; 1: hlt; jmp 1b; last: .code32");
extern const u8 first[], last[];

static void apic(u32 offset, u32 value) { *(volatile u32 *) (local_apic + offset) = value; }

static void start(u32 id)
{
    volatile u8 *came = (volatile u8 *) 0x9000 + id;
    *came = 0;
    apic(0x310, id << 24);
    apic(0x300, 0x4500);                /* INIT */
    apic(0x310, id << 24);
    apic(0x300, 0x4608);                /* SIPI, to 0x8000 */
    for (u32 patience = 0; !*came; patience++)
        if (patience == 3000000) fail("a processor does not come up");
    say("up", id);
}

/* Which vector an IRQ leads to: let through to this processor, whose interrupts are off, it stays in its IRR. */
static void let_through(u32 irq, u8 vector)
{
    volatile u32 *select = (volatile u32 *) ioapic, *window = (volatile u32 *) (ioapic + 16);
    *select = 0x11 + 2 * inputs[irq];
    *window = boot_processor << 24;
    *select = 0x10 + 2 * inputs[irq];
    *window = vector | (levels >> irq & 1) << 15;
}

static void await(u8 vector, const char *what)
{
    for (u32 patience = 0; patience < 200000; patience++)
        if (*(volatile u32 *) (local_apic + 0x200 + vector / 32 * 16) >> vector % 32 & 1) {
            say(what, vector);
            return;
        }
    print("no interrupt: ");
    fail(what);
}

void kernel(u32 magic __attribute__((unused)), const u8 *information)
{
    const u8 *command_line = (const u8 *) word(information + 16);
    int acpi = same(command_line, "acpi");
    if (acpi) read_madt(); else read_mp_table();
    say("processors", processors);
    say("boot", boot_processor);
    say("lapic", local_apic);
    say("ioapic", ioapic);
    say("levels", levels);
    for (u32 irq = 0; irq < 16; irq++) if (irq != 2 && inputs[irq] != irq) say("elsewhere", irq);
    apic(0xf0, 0x1ff);
    for (const u8 *from = first, *end = last; from < end; from++) ((u8 *) 0x8000)[from - first] = *from;
    for (u32 i = 0; i < processors; i++) if (apic_ids[i] != boot_processor) start(apic_ids[i]);

    let_through(0, 0x40);
    outb(0x43, 0x34);                   /* PIT counter 0, rate generator, about 1 kHz */
    outb(0x40, 0xa9);
    outb(0x40, 0x04);
    await(0x40, "timer");
    let_through(4, 0x44);
    outb(0x3fc, 0x08);                  /* OUT2, and the interrupt "transmitter empty" */
    outb(0x3f9, 0x02);
    await(0x44, "serial");
    outb(0x3f9, 0x00);
    if (acpi) {
        const u8 *fadt = acpi_table("FACP");
        let_through(half(fadt + 46), 0x49);
        u16 event = word(fadt + 56), control = word(fadt + 64), timer = word(fadt + 76);
        u32 before = inl(timer);
        while (inl(timer) == before) { }
        print("counts\n");
        outw(event + 2, 0x100);         /* PWRBTN_EN */
        print("press\n");
        await(0x49, "button");
        say("status", inw(event));
        outw(event, 0x100);
        say("cleared", inw(event));
        const u8 *dsdt = (const u8 *) word(fadt + 40);
        check(dsdt, word(dsdt + 4), "DSDT");
        const u8 *s5 = dsdt + 36;
        while (!same(s5, "_S5_")) if (++s5 == dsdt + word(dsdt + 4)) fail("no _S5");
        say("s5", s5[8]);               /* Package op, length, number of elements, a byte constant's prefix */
        outw(control, 0x2000 | s5[8] << 10);
    }
    print("done\n");
    leave(0);
}
