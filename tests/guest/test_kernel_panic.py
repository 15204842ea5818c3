"""Guests that print what a kernel prints when it panics, and guests that tell it by pvpanic."""

import threading

import pytest

from gnu_toolchain import assemble
from kvmpy import End, GuestFailed, KiB, Machine, Outcome
from kvmpy.boot import FlatImage
from kvmpy.devices import I8042, PvPanic, Uart16550

PRINT = """
    cli
    mov si, offset text
    mov dx, 0x3f8
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:
"""
SPIN = "3: jmp 3b"
HALT = "cli; hlt"
RESET = "mov al, 0xfe; out 0x64, al; 3: jmp 3b"

BEGIN = "[    0.1] Run /init as init process\\r\\n"
PANIC = "[    0.2] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\\r\\n"
TRACE = "[    0.3] Call Trace:\\r\\n[    0.4]  panic+0x123/0x456\\r\\n"
END = "[    0.5] ---[ end Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100 ]---\\r\\n"
MESSAGE = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100"


def run(text: str, then: str = SPIN, *, patience: float = 0.1, **options: bytes) -> Outcome:
    source = f'{PRINT} {then}\n text: .asciz "{text}"'
    with Machine(memory=64 * KiB) as machine:
        console = machine.add(Uart16550())
        machine.add(I8042())
        machine.watch_for_panic(console, patience=patience, **options)
        machine.load(FlatImage(assemble(source)))
        return machine.run(timeout=10)


def test_a_kernel_that_panics_and_spins_ends_as_a_panic_with_the_lines_that_follow() -> None:
    outcome = run(BEGIN + PANIC + TRACE + END, patience=1000)
    assert (outcome.end, outcome.ok, outcome.message) == (End.PANIC, False, MESSAGE)
    assert outcome.console.splitlines() == [
        "[    0.1] Run /init as init process",
        "[    0.2] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100",
        "[    0.3] Call Trace:",
        "[    0.4]  panic+0x123/0x456",
        "[    0.5] ---[ end Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100 ]---",
    ]
    assert outcome.report is not None


@pytest.mark.parametrize("then", [SPIN, "sti; 3: hlt; jmp 3b"])
def test_without_the_last_line_the_run_ends_when_no_other_has_come_for_a_while(then: str) -> None:
    outcome = run(BEGIN + PANIC + TRACE, then)
    assert (outcome.end, outcome.message) == (End.PANIC, MESSAGE)
    assert outcome.console.endswith("panic+0x123/0x456")


@pytest.mark.parametrize("then", [RESET, HALT], ids=["reset", "halt"])
def test_a_kernel_that_resets_or_halts_after_its_panic_has_panicked(then: str) -> None:
    outcome = run(PANIC + "Rebooting in 1 seconds..\\r\\n", then, patience=1000)
    assert (outcome.end, outcome.message) == (End.PANIC, MESSAGE)
    assert outcome.console.endswith("Rebooting in 1 seconds..")


def test_a_kernel_that_triple_faults_after_its_panic_has_panicked() -> None:
    # Protected mode without an IDT.
    source = PRINT.replace("mov si", "mov esi") + f'lidt [none]; ud2\n none: .word 0; .long 0\n text: .asciz "{PANIC}"'
    with Machine(memory=64 * KiB) as machine:
        machine.watch_for_panic(machine.add(Uart16550()), patience=1000)
        machine.load(FlatImage(assemble(source, bits=32), mode="protected"))
        outcome = machine.run(timeout=10)
    assert (outcome.end, outcome.message) == (End.PANIC, MESSAGE)
    assert outcome.exit is not None


def test_the_console_begins_shortly_before_the_panic_however_long_its_trace_is() -> None:
    text = "".join(f"before {number}\\n" for number in range(40)) + PANIC
    outcome = run(text + "".join(f" f{number}+0x1/0x2\\n" for number in range(90)) + END, patience=1000)
    lines = outcome.console.splitlines()
    assert lines[0] == "before 20"
    assert MESSAGE in lines[20]
    assert lines[21] == " f0+0x1/0x2"
    assert len(lines) == 20 + 1 + 90 + 1


def test_a_reset_without_a_panic_stays_a_reset() -> None:
    outcome = run(BEGIN + "panic? no\\r\\n", RESET)
    assert (outcome.end, outcome.console) == (End.RESET, "")


def test_other_kernels_have_other_messages() -> None:
    outcome = run("panicked at src/main.rs:7\\n  explained here\\n", message=b"panicked at", patience=0.2)
    assert (outcome.end, outcome.message) == (End.PANIC, "panicked at src/main.rs:7")
    assert outcome.console == "panicked at src/main.rs:7\n  explained here"


def test_a_run_that_is_stopped_after_the_panic_was_stopped_and_the_next_one_ends_as_the_panic() -> None:
    source = f'{PRINT} {SPIN}\n text: .asciz "{PANIC}"'
    with Machine(memory=64 * KiB) as machine:
        console = machine.add(Uart16550())
        machine.watch_for_panic(console, patience=0.5)
        machine.load(FlatImage(assemble(source)))
        machine.start(timeout=20)
        console.expect(b"exitcode=0x00000100\r\n")
        assert machine.stop().end is End.STOPPED
        outcome = machine.run(timeout=20)
        assert (outcome.end, outcome.message) == (End.PANIC, MESSAGE)


def test_a_machine_panics_again_with_the_next_image() -> None:
    with Machine(memory=64 * KiB) as machine:
        console = machine.add(Uart16550())
        machine.watch_for_panic(console, patience=1000)
        for text, end in ((PANIC + END, End.PANIC), (BEGIN, End.HALTED), (PANIC + END, End.PANIC)):
            machine.load(FlatImage(assemble(f'{PRINT} {HALT}\n text: .asciz "{text}"')))
            assert machine.run(timeout=10).end is end


def test_the_failure_of_a_checked_run_carries_the_console() -> None:
    with Machine(memory=64 * KiB) as machine:
        machine.watch_for_panic(machine.add(Uart16550()))
        machine.load(FlatImage(assemble(f'{PRINT} {HALT}\n text: .asciz "{PANIC}"')))
        with pytest.raises(GuestFailed, match="Attempted to kill init") as caught:
            machine.run(timeout=10, check=True)
    assert "Kernel panic" in caught.value.outcome.console


def test_a_machine_with_a_watch_leaves_no_thread_when_nothing_panics() -> None:
    before = threading.active_count()
    assert run(BEGIN, HALT).end is End.HALTED
    assert threading.active_count() == before


# pvpanic


def test_pvpanic_ends_the_run_as_a_panic() -> None:
    source = "mov dx, 0x505; in al, dx; mov [0x2000], al; mov al, 1; out dx, al; 1: jmp 1b"
    with Machine(memory=64 * KiB) as machine:
        machine.add(PvPanic())
        machine.load(FlatImage(assemble(source)))
        outcome = machine.run(timeout=10)
        assert outcome.end is End.PANIC
        assert "pvpanic at port 0x505" in outcome.message
        assert machine.memory.read_u8(0x2000) & 1


def test_pvpanic_after_a_message_on_the_console_says_what_the_message_says() -> None:
    source = f'{PRINT} mov dx, 0x505; mov al, 1; out dx, al; {SPIN}\n text: .asciz "{PANIC}{TRACE}"'
    with Machine(memory=64 * KiB) as machine:
        machine.watch_for_panic(machine.add(Uart16550()), patience=1000)
        machine.add(PvPanic())
        machine.load(FlatImage(assemble(source)))
        outcome = machine.run(timeout=10)
    assert (outcome.end, outcome.message) == (End.PANIC, MESSAGE)
    assert outcome.console.endswith("panic+0x123/0x456")


def test_pvpanic_can_switch_the_machine_off() -> None:
    with Machine(memory=64 * KiB) as machine:
        device = machine.add(PvPanic())
        machine.load(FlatImage(assemble("mov dx, 0x505; mov al, 2; out dx, al; mov al, 4; out dx, al; 1: jmp 1b")))
        assert machine.run(timeout=10).end is End.SHUTDOWN
        assert device.counters == {"crash_loaded": 1}
