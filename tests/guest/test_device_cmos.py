"""The clock and the memory of the CMOS, read by guests."""

from calendar import timegm

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import Cmos
from kvmpy.devices.device import WriteHandler
from pc_interrupts import END_OF_INTERRUPT, take_interrupts

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

READ = """
    mov si, offset indexes
    mov di, 0x2000
1:  lodsb
    cmp al, 0xff
    je 2f
    out 0x70, al
    in al, 0x71
    stosb
    jmp 1b
2:  hlt
"""


def read(cmos: Cmos, *indexes: int, before: str = "", wait: WriteHandler | None = None) -> bytes:
    """What a guest reads at `indexes` of `cmos`, after it has done `before`; `wait` is behind port 0x80."""
    source = f"{before}\n{READ} indexes: .byte {', '.join(map(str, indexes))}, 0xff"
    image = FlatImage(assemble(source))
    with Machine(memory=64 * KIB, irqchip=False) as machine:
        machine.add(cmos)
        machine.map_ports(0x80, 1, write=wait)
        machine.load(image)
        assert machine.run(timeout=5).end is End.HALTED
        return machine.memory.read(0x2000, len(indexes))


TIME = (0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32)
NEW_YEARS_EVE = timegm((1999, 12, 31, 23, 59, 58)) + 0.25  # a Friday


def test_a_guest_reads_the_hosts_time_in_bcd() -> None:
    cmos = Cmos(now=lambda: timegm((2031, 8, 24, 17, 5, 39)))  # a Sunday
    assert read(cmos, *TIME) == bytes([0x39, 0x05, 0x17, 0x01, 0x24, 0x08, 0x31, 0x20])


def test_time_passes_while_the_guest_runs_and_every_field_carries() -> None:
    time = NEW_YEARS_EVE

    def wait(offset: int, size: int, value: int) -> None:
        nonlocal time
        time += value

    cmos = Cmos(now=lambda: time)
    old = "xor al, al; out 0x70, al; in al, 0x71; mov [0x3000], al; mov al, 2; out 0x80, al"
    assert read(cmos, *TIME, before=old, wait=wait) == bytes([0x00, 0x00, 0x00, 0x07, 0x01, 0x01, 0x00, 0x20])


def test_twelve_hours_in_binary_when_the_guest_wants_them() -> None:
    cmos = Cmos(now=lambda: NEW_YEARS_EVE)
    binary = "mov al, 0x0b; out 0x70, al; mov al, 0x04; out 0x71, al"
    assert read(cmos, *TIME, before=binary) == bytes([58, 59, 0x80 | 11, 6, 31, 12, 99, 19])


def test_the_time_that_a_guest_sets_is_the_time_it_reads() -> None:
    def put(index: int, value: int) -> str:
        return f"mov al, {index:#x}; out 0x70, al; mov al, {value:#x}; out 0x71, al;"

    settings = ((0x00, 0x30), (0x02, 0x15), (0x04, 0x08), (0x07, 0x29), (0x08, 0x02), (0x09, 0x24))
    set_time = put(0x0B, 0x82) + "".join(put(*setting) for setting in settings) + put(0x0B, 0x02)
    cmos = Cmos(now=lambda: NEW_YEARS_EVE)
    assert read(cmos, 0x00, 0x02, 0x04, 0x07, 0x08, 0x09, before=set_time) == bytes(value for _, value in settings)


def test_an_update_is_announced_by_uip() -> None:
    waits = "1: mov al, 0x0a; out 0x70, al; in al, 0x71; test al, 0x80; jz 1b;"
    moments = iter(NEW_YEARS_EVE + step / 16384 for step in range(1 << 20))
    # From a quarter of a second on, UIP comes 244 us before the next second: at the last of four 61 us steps.
    cmos = Cmos(now=lambda: next(moments))
    flags = read(cmos, 0x0A, 0x0D, before=waits)
    assert flags == bytes([0x26 | 0x80, 0x80])


def test_the_bios_finds_the_size_of_memory_and_the_number_of_processors() -> None:
    cmos = Cmos(memory_below_4g=3 * GIB, memory_above_4g=5 * GIB, cpus=4)
    values = read(cmos, 0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5B, 0x5C, 0x5D, 0x5F)
    base, extended, beyond_1m, beyond_16m = (int.from_bytes(values[at : at + 2], "little") for at in range(0, 8, 2))
    assert base == 640
    assert extended == beyond_1m == 0xFFFF  # KiB: as much as the field can say
    assert beyond_16m * 64 * KIB == 3 * GIB - 16 * MIB
    assert int.from_bytes(values[8:11], "little") * 64 * KIB == 5 * GIB
    assert values[11] + 1 == 4


def test_a_small_memory_is_told_in_kib() -> None:
    values = read(Cmos(memory_below_4g=8 * MIB), 0x17, 0x18, 0x34, 0x35)
    assert int.from_bytes(values[:2], "little") == 7 * KIB
    assert values[2:] == b"\0\0"


def test_the_nmi_mask_in_the_index_does_not_change_the_register() -> None:
    before = "mov al, 0x80 | 0x50; out 0x70, al; mov al, 0x77; out 0x71, al"
    assert read(Cmos(), 0x50, 0xD0, before=before) == b"\x77\x77"


# Takes interrupts of the clock, of which it enables those in {enable}, until it has had {count}; halted in between.
INTERRUPTED = """
    cli
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7000
    {take}
    mov al, 0x0a; out 0x70, al; mov al, {rate}; out 0x71, al
    mov al, 0x0b; out 0x70, al; mov al, {enable}; out 0x71, al
1:  sti; hlt
    cmp byte ptr [0x2000], {count}
    jb 1b
    cli; hlt
clock:
    push ax
    mov al, 0x0c; out 0x70, al; in al, 0x71
    mov [0x2001], al
    inc byte ptr [0x2000]
    mov al, 0x20; out 0xa0, al
    {end}
    pop ax
    iret
"""


@pytest.mark.parametrize(("enable", "rate", "count", "flag"), [(0x42, 0x2A, 20, 0xC0), (0x12, 0x20, 1, 0x90)])
def test_interrupts_of_the_clock_come_by_themselves(enable: int, rate: int, count: int, flag: int) -> None:
    source = INTERRUPTED.format(
        take=take_interrupts({8: "clock"}), enable=enable, rate=rate, count=count, end=END_OF_INTERRUPT
    )
    with Machine(memory=64 * KIB) as machine:
        machine.add(Cmos())
        machine.load(FlatImage(assemble(source)))
        assert machine.run(timeout=10).end is End.HALTED
        seen, flags = machine.memory.read(0x2000, 2)
    assert seen == count
    assert flags & flag == flag


def test_an_alarm_wakes_a_guest_that_has_nothing_else_to_do() -> None:
    source = INTERRUPTED.format(
        take=take_interrupts({8: "clock"}), enable=0x22, rate=0x20, count=1, end=END_OF_INTERRUPT
    )
    alarm = "mov al, {}; out 0x70, al; mov al, 0xff; out 0x71, al\n"  # at every second
    with Machine(memory=64 * KIB) as machine:
        machine.add(Cmos())
        machine.load(FlatImage(assemble("".join(alarm.format(register) for register in (1, 3, 5)) + source)))
        assert machine.run(timeout=10).end is End.HALTED
        assert machine.memory.read(0x2001, 1)[0] & 0xA0 == 0xA0
