"""The timer 8254: KVM's own, and the one of kvmpy.devices for machines without KVM's interrupt controllers."""

from gnu_toolchain import assemble
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import Pit8254
from kvmpy.devices.pit import FREQUENCY
from pc_interrupts import END_OF_INTERRUPT, take_interrupts

KIB = 1024
SECOND = 1_000_000_000


def run(source: str, pit: Pit8254 | None = None) -> Machine:
    """Run a guest with KVM's timer, or with `pit` in a machine without irqchip, until it halts."""
    image = FlatImage(assemble(source))
    machine = Machine(memory=64 * KIB, irqchip=pit is None)
    if pit is not None:
        machine.add(pit)
    machine.load(image)
    assert machine.run(timeout=20).end is End.HALTED
    return machine


class SteppingClock:
    """Every look at the clock takes `step` nanoseconds."""

    def __init__(self, step: int) -> None:
        self.now = 5 * SECOND
        self.step = step

    def __call__(self) -> int:
        self.now += self.step
        return self.now


# KVM's own


def test_counter_0_interrupts_as_often_as_the_guest_waits_for() -> None:
    source = f"""
        mov word ptr [0x2000], 0
        {take_interrupts({0: "tick"})}
        mov al, 0x34; out 0x43, al                          # counter 0, both bytes, mode 2
        mov al, {1193 & 0xFF}; out 0x40, al
        mov al, {1193 >> 8}; out 0x40, al                   # 1 kHz
    1:  sti
        hlt
        cli
        cmp word ptr [0x2000], 25
        jb 1b
        hlt
    tick:
        inc word ptr [0x2000]
        {END_OF_INTERRUPT}
        iret"""
    with run(source) as machine:
        assert machine.memory.read_u16(0x2000) == 25
        assert not machine.statistics().accesses  # all of it went on inside KVM


def test_counter_0_counts_down_and_is_latched() -> None:
    source = """
        mov al, 0x34; out 0x43, al
        mov al, 0xff; out 0x40, al; out 0x40, al
        mov di, 0x2000
        mov cx, 3
    1:  mov al, 0x00; out 0x43, al                          # latch
        in al, 0x40; stosb
        in al, 0x40; stosb
        loop 1b
        mov al, 0xe2; out 0x43, al                          # read back the status of counter 0
        in al, 0x40; stosb
        cli; hlt"""
    with run(source) as machine:
        counts = [machine.memory.read_u16(0x2000 + 2 * at) for at in range(3)]
        assert len(set(counts)) == 3
        assert machine.memory.read_u8(0x2006) & 0x3F == 0x34


SPEAKER = """
    in al, 0x61; and al, 0xfc; out 0x61, al                 # gate and speaker off
    mov al, 0xb6; out 0x43, al                              # counter 2, both bytes, mode 3
    mov al, 0x00; out 0x42, al
    mov al, 0x04; out 0x42, al                              # 1165 Hz
    in al, 0x61; mov [0x2000], al
    in al, 0x61; or al, 0x01; out 0x61, al
    in al, 0x61; mov [0x2001], al
    mov cx, 4
    xor bl, bl
1:  in al, 0x61                                             # until the output has changed four times
    and al, 0x20
    cmp al, bl
    je 1b
    mov bl, al
    loop 1b
    in al, 0x61; or al, 0x02; out 0x61, al; in al, 0x61; mov [0x2002], al
    in al, 0x61; and al, 0xfc; out 0x61, al; in al, 0x61; mov [0x2003], al
    cli; hlt
"""


def check_speaker(machine: Machine) -> None:
    off, gate, speaker, off_again = machine.memory.read(0x2000, 4)
    assert (off & 3, gate & 3, speaker & 3, off_again & 3) == (0, 1, 3, 0)


def test_the_output_of_counter_2_toggles_at_port_0x61_while_its_gate_is_open() -> None:
    with run(SPEAKER) as machine:
        check_speaker(machine)
        assert not machine.statistics().unclaimed


CALIBRATE = f"""
    in al, 0x61; and al, 0xfc; or al, 1; out 0x61, al       # gate of counter 2 open, speaker off
    mov al, 0xb0; out 0x43, al                              # counter 2, both bytes, mode 0: one shot
    mov al, {59659 & 0xFF}; out 0x42, al
    mov al, {59659 >> 8}; out 0x42, al                      # 50 ms
    in al, 0x61; mov [0x2004], al
    xor ecx, ecx
1:  inc ecx
    in al, 0x61
    test al, 0x20
    jz 1b
    mov [0x2000], ecx
    cli; hlt
"""


def test_a_one_shot_of_counter_2_ends_once_as_kernels_calibrate_by_it() -> None:
    with run(CALIBRATE) as machine:
        assert not machine.memory.read_u8(0x2004) & 0x20
        assert machine.memory.read_u32(0x2000) > 1


# Ours


def test_our_counter_2_takes_as_long_as_the_data_sheet_says() -> None:
    clock = SteppingClock(step=100_000)
    with run(CALIBRATE, Pit8254(now=clock)) as machine:
        # 50 ms in steps of 100 us: one step for the read before the loop, 499 more until the output is high.
        assert machine.memory.read_u32(0x2000) == 499
        assert machine.statistics().count("port", 0x61, "read") == 2 + 499


def test_our_port_0x61_toggles_like_kvms() -> None:
    with run(SPEAKER, Pit8254(now=SteppingClock(step=50_000))) as machine:
        check_speaker(machine)


def test_our_counter_0_shows_how_much_time_has_passed() -> None:
    source = """
        mov al, 0x34; out 0x43, al
        mov al, 0xff; out 0x40, al; out 0x40, al
        mov al, 0x00; out 0x43, al; in al, 0x40; mov [0x2000], al; in al, 0x40; mov [0x2001], al
        mov al, 0x00; out 0x43, al; in al, 0x40; mov [0x2002], al; in al, 0x40; mov [0x2003], al
        hlt"""
    step = 1_000_000
    with run(source, Pit8254(now=SteppingClock(step))) as machine:
        first, second = machine.memory.read_u16(0x2000), machine.memory.read_u16(0x2002)
        # Three looks at the clock from one latch to the next: two bytes read, and the latch itself.
        assert abs(first - second - 3 * step * FREQUENCY // SECOND) <= 1


def test_the_refresh_bit_of_port_0x61_toggles() -> None:
    source = "mov di, 0x2000; mov cx, 8; 1: in al, 0x61; stosb; loop 1b; hlt"
    with run(source, Pit8254(now=SteppingClock(step=18 * SECOND // FREQUENCY + 1))) as machine:
        bits = [value >> 4 & 1 for value in machine.memory.read(0x2000, 8)]
        assert bits in ([0, 1] * 4, [1, 0] * 4)
