"""The 16550 as guests drive it: polled, by interrupts through the in-kernel controllers, and probed."""

import re

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import Uart16550
from pc_interrupts import END_OF_INTERRUPT, take_interrupts

KIB = 1024
AMOUNT = 10_000
"""Bytes that go over the line in the tests for losses, each way."""


def machine_with(source: str, *, irqchip: bool = False) -> tuple[Machine, Uart16550]:
    image = FlatImage(assemble(source))
    machine = Machine(memory=64 * KIB, irqchip=irqchip)
    console = machine.add(Uart16550())
    machine.load(image)
    return machine, console


def pattern(amount: int) -> bytes:
    """Bytes that tell their place: no stretch repeats within 64 KiB."""
    return bytes((place ^ place >> 8) & 0xFF for place in range(amount))


# Polled

PRINT = """
print:                              # SI: text that ends in 0
    lodsb
    test al, al
    jz 2f
    mov bl, al
    mov dx, 0x3fd
1:  in al, dx                       # until LSR.THRE
    test al, 0x20
    jz 1b
    mov dx, 0x3f8
    mov al, bl
    out dx, al
    jmp print
2:  ret
"""


def test_a_guest_that_polls_lsr_says_hello() -> None:
    machine, console = machine_with(f'mov si, offset text; call print; hlt; {PRINT} text: .asciz "hello, world\\n"')
    with machine:
        assert machine.run(timeout=5).end is End.HALTED
        assert console.output == b"hello, world\n"


def test_the_host_talks_with_a_guest_by_expect_and_send() -> None:
    source = f"""
        mov si, offset prompt; call print
        mov di, 0x2000
        mov dx, 0x3fd
    1:  in al, dx                   # until LSR.DR
        test al, 1
        jz 1b
        mov dx, 0x3f8
        in al, dx
        stosb
        mov dx, 0x3fd
        cmp al, 13
        jne 1b
        mov byte ptr [di - 1], 0
        mov si, offset welcome; call print
        mov si, 0x2000; call print
        mov si, offset newline; call print
        hlt
        {PRINT}
        prompt: .asciz "login: "
        welcome: .asciz "Welcome, "
        newline: .asciz ".\\r\\n"
    """
    machine, console = machine_with(source)
    with machine:
        machine.start()
        console.expect(b"login: ")
        console.send("Grace\r")
        match = console.expect(re.compile(r"Welcome, (\w+)\."))
        assert match.group(1) == "Grace"
        assert machine.wait(timeout=5).end is End.HALTED
        assert console.text == "login: Welcome, Grace.\r\n"


def test_a_break_is_a_zero_with_break_and_framing_error() -> None:
    source = """
        mov dx, 0x3fd; in al, dx; mov [0x2000], al
        mov dx, 0x3f8; in al, dx; mov [0x2001], al
        mov dx, 0x3fd; in al, dx; mov [0x2002], al
        hlt"""
    machine, console = machine_with(source)
    with machine:
        console.send_break()
        machine.run(timeout=5)
        assert machine.memory.read(0x2000, 3) == bytes([0x60 | 0x10 | 0x08 | 0x01, 0, 0x60])


# Interrupts

OUTPUT_BY_INTERRUPT = f"""
    {take_interrupts({4: "uart"})}
    mov dx, 0x3fc; mov al, 0x08; out dx, al     # MCR.OUT2: interrupts reach the controller
    mov dx, 0x3f9; mov al, 0x02; out dx, al     # IER.ETBEI: THR is empty, so the first one comes at once
1:  sti
    hlt
    cli
    cmp byte ptr [done], 1
    jne 1b
    hlt
uart:
    inc word ptr [0x2000]
    mov dx, 0x3fa; in al, dx                    # IIR
    cmp al, 0x02
    jne 3f
    mov dx, 0x3f8
    lodsb                                       # SI is nobody else's
    test al, al
    jz 2f
    out dx, al                                  # one byte an interrupt
    jmp 3f
2:  inc dx; out dx, al                          # IER: no more interrupts
    mov byte ptr [done], 1
3:  {END_OF_INTERRUPT}
    iret
done: .byte 0
"""


def test_output_goes_on_by_thr_empty_interrupts() -> None:
    source = f'mov si, offset text; {OUTPUT_BY_INTERRUPT} text: .asciz "one byte an interrupt"'
    machine, console = machine_with(source, irqchip=True)
    with machine:
        assert machine.run(timeout=10).end is End.HALTED
        assert console.text == "one byte an interrupt"
        assert machine.memory.read_u16(0x2000) == len(console.text) + 1


def test_without_out2_no_interrupt_reaches_the_controller() -> None:
    source = f'mov si, offset text; {OUTPUT_BY_INTERRUPT} text: .asciz "silence"'.replace("mov al, 0x08", "mov al, 0")
    machine, console = machine_with(source, irqchip=True)
    with machine:
        assert machine.run(timeout=0.1).end is End.TIMEOUT
        assert console.output == b""
        assert machine.memory.read_u16(0x2000) == 0


def test_a_handler_that_only_writes_is_called_again() -> None:
    # The controller sees edges: the line must fall with the write, though THR is empty again at once.
    source = f"""
        {take_interrupts({4: "uart"})}
        mov dx, 0x3fc; mov al, 0x08; out dx, al
        mov dx, 0x3f9; mov al, 0x02; out dx, al
        mov dx, 0x3f8
        mov bl, 'a'
    1:  sti
        hlt
        cli
        cmp bl, 'k'
        jne 1b
        hlt
    uart:
        mov al, bl
        out dx, al
        inc bl
        {END_OF_INTERRUPT}
        iret"""
    machine, console = machine_with(source, irqchip=True)
    with machine:
        assert machine.run(timeout=5).end is End.HALTED
        assert console.text == "abcdefghij"


@pytest.mark.parametrize("fcr", [0x00, 0xC1], ids=["no FIFO", "below the trigger level"])
def test_a_handler_that_reads_one_byte_is_called_for_the_next(fcr: int) -> None:
    source = f"""
        mov di, 0x2000
        {take_interrupts({4: "uart"})}
        mov dx, 0x3fa; mov al, {fcr}; out dx, al
        mov dx, 0x3fc; mov al, 0x08; out dx, al
        mov dx, 0x3f9; mov al, 0x01; out dx, al
        out 0x80, al                                # the host types
        mov dx, 0x3f8
    1:  sti
        hlt
        cli
        cmp di, 0x200a
        jne 1b
        hlt
    uart:
        in al, dx
        stosb
        {END_OF_INTERRUPT}
        iret"""
    machine, console = machine_with(source, irqchip=True)
    with machine:
        machine.map_ports(0x80, 1, write=lambda offset, size, value: console.send(b"0123456789"))
        assert machine.run(timeout=5).end is End.HALTED
        assert machine.memory.read(0x2000, 10) == b"0123456789"


BOTH_WAYS = f"""
    mov word ptr [0x2000], 0                    # bytes received, at 0x4000
    mov word ptr [0x2002], 0                    # bytes sent
    {take_interrupts({4: "uart"})}
    mov dx, 0x3fa; mov al, FCR; out dx, al
    mov dx, 0x3fc; mov al, 0x08; out dx, al
    mov dx, 0x3f9; mov al, 0x03; out dx, al     # received data, and THR empty
wait:
    cli
    cmp word ptr [0x2000], {AMOUNT}
    jne 1f
    cmp word ptr [0x2002], {AMOUNT}
    je 2f
1:  sti
    hlt
    jmp wait
2:  hlt
uart:
    mov dx, 0x3fa; in al, dx                    # IIR
    test al, 1                                  # nothing pending any more
    jnz 5f
    and al, 0x0f
    cmp al, 0x02
    je 3f
    mov dx, 0x3f8; in al, dx                    # received data, or some that waited long
    mov di, [0x2000]
    mov [0x4000 + di], al
    inc word ptr [0x2000]
    jmp uart
3:  mov bx, [0x2002]
    cmp bx, {AMOUNT}
    je 4f
    inc word ptr [0x2002]
    mov al, bl
    xor al, bh
    mov dx, 0x3f8; out dx, al
    jmp uart
4:  mov dx, 0x3f9; mov al, 0x01; out dx, al     # all sent: received data only
    jmp uart
5:  {END_OF_INTERRUPT}
    iret
"""


@pytest.mark.parametrize("fcr", [0x00, 0x07, 0xC7], ids=["no FIFO", "trigger 1", "trigger 14"])
def test_ten_thousand_bytes_go_both_ways_by_interrupts_and_none_is_lost(fcr: int) -> None:
    machine, console = machine_with(BOTH_WAYS.replace("FCR", f"{fcr:#x}"), irqchip=True)
    typed = pattern(AMOUNT)[::-1]
    with machine:
        machine.start()
        console.expect(b"\0\1\2")  # what comes before the guest sets FCR, that clears: typing begins when it listens
        for start in range(0, AMOUNT, 77):
            console.send(typed[start : start + 77])
        assert machine.wait(timeout=20).end is End.HALTED
        assert machine.memory.read(0x4000, AMOUNT) == typed
        assert console.output == pattern(AMOUNT)
        assert console.unread == 0
        assert not console.counters


def test_input_wakes_a_guest_that_sleeps() -> None:
    source = f"""
        {take_interrupts({4: "uart"})}
        mov dx, 0x3fc; mov al, 0x08; out dx, al
        mov dx, 0x3f9; mov al, 0x01; out dx, al
        mov dx, 0x3f8; mov al, '?'; out dx, al
        sti
    1:  hlt
        jmp 1b
    uart:
        in al, dx
        out dx, al
        cmp al, 'q'
        jne 2f
        cli
        hlt
    2:  {END_OF_INTERRUPT}
        iret"""
    machine, console = machine_with(source, irqchip=True)
    with machine:
        machine.start()
        for question, answer in ((b"?", b"a"), (b"a", b"b"), (b"b", b"q")):
            console.expect(question)
            console.send(answer)
        assert machine.wait(timeout=5).end is End.HALTED
        assert console.output == b"?abq"


# Probes

STORE = "stosb\n"  # what a probe reads goes to 0x2000 and on


def probe(*steps: str) -> bytes:
    """What a guest reads that does `steps`: "0x3f9=0x0f" writes, "0x3f9" reads."""
    source = "mov di, 0x2000\n"
    reads = 0
    for step in steps:
        port, _, value = step.partition("=")
        source += f"mov dx, {port}\n"
        source += f"mov al, {value}; out dx, al\n" if value else f"in al, dx; {STORE}"
        reads += not value
    machine, _ = machine_with(source + "hlt")
    with machine:
        assert machine.run(timeout=5).end is End.HALTED
        return machine.memory.read(0x2000, reads)


def test_the_loop_shows_modem_outputs_at_the_inputs_as_linux_probes_it() -> None:
    # MCR: LOOP, OUT2 and RTS; Linux's 8250 driver wants DCD and CTS back, and nothing else.
    assert probe("0x3fc=0x1a", "0x3fe", "0x3fc=0x00", "0x3fe")[0] & 0xF0 == 0x90


def test_the_interrupt_enables_have_four_bits() -> None:
    assert probe("0x3f9=0", "0x3f9", "0x3f9=0xff", "0x3f9") == b"\x00\x0f"


def test_the_scratch_register_keeps_bytes() -> None:
    assert probe("0x3ff=0x5a", "0x3ff", "0x3ff=0xa5", "0x3ff") == b"\x5a\xa5"


def test_the_fifo_probe_finds_a_16550a() -> None:
    # IIR after FCR.ENABLE: 0xC0 is a 16550A, 0x80 the broken 16550, 0x00 a 8250 or 16450.
    assert probe("0x3fa", "0x3fa=0x01", "0x3fa", "0x3fa=0x00", "0x3fa") == b"\x01\xc1\x01"


def test_the_divisor_latch_lies_under_dlab_and_the_registers_below_it_stay() -> None:
    steps = ("0x3f9=5", "0x3fb=0x83", "0x3f8=0x34", "0x3f9=0x12", "0x3f8", "0x3f9", "0x3fb=0x03", "0x3f9", "0x3fb")
    assert probe(*steps) == b"\x34\x12\x05\x03"


def test_enabling_the_thr_empty_interrupt_shows_it_every_time() -> None:
    # Linux's test for the bug of some UARTs that show it the first time only.
    assert probe("0x3f9=2", "0x3fa", "0x3fa", "0x3f9=0", "0x3f9=2", "0x3fa") == b"\x02\x01\x02"


def test_in_the_loop_a_byte_comes_back_and_none_leaves() -> None:
    source = """
        mov dx, 0x3fc; mov al, 0x10; out dx, al
        mov dx, 0x3f8; mov al, 0xae; out dx, al
        mov dx, 0x3fd; in al, dx; mov [0x2000], al
        mov dx, 0x3f8; in al, dx; mov [0x2001], al
        hlt"""
    machine, console = machine_with(source)
    with machine:
        machine.run(timeout=5)
        assert machine.memory.read(0x2000, 2) == b"\x61\xae"
        assert console.output == b""


def test_a_probe_finds_nothing_where_no_uart_is() -> None:
    # A guest takes a UART for present when IER keeps zeros.
    assert probe("0x2f9=0", "0x2f9", "0x2fd") == b"\xff\xff"


def test_two_uarts_do_not_mix() -> None:
    source = (
        "mov dx, 0x3f8; mov al, '1'; out dx, al; mov dx, 0x2f8; inc al; out dx, al; in al, dx; mov [0x2000], al; hlt"
    )
    machine, first = machine_with(source)
    with machine:
        second = machine.add(Uart16550(port=0x2F8, irq=3))
        first.send(b"x")
        second.send(b"y")
        machine.run(timeout=5)
        assert (first.output, second.output, machine.memory.read_u8(0x2000)) == (b"1", b"2", ord("y"))
        assert (first.unread, second.unread) == (1, 0)


def test_string_output_fills_the_line_in_order() -> None:
    source = "mov si, offset text; mov cx, 300; mov dx, 0x3f8; cld; rep outsb; hlt; text: .fill 150, 2, 0x6261"
    machine, console = machine_with(source)
    with machine:
        machine.run(timeout=5)
        assert console.output == b"ab" * 150
