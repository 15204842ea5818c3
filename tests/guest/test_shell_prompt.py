"""The commands of the prompt, one by one, on real guests in every mode."""

from __future__ import annotations

import queue
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gnu_toolchain import TOOLCHAIN, assemble, assemble_with_symbols, compile_c
from kvmpy import End, Machine, MiB, Outcome, UsageError
from kvmpy.boot import ElfImage, FlatImage
from kvmpy.boot.image import Image
from kvmpy.debug.breakpoint import Point
from kvmpy.debug.prompt import GuestPrompt
from kvmpy.devices import DebugExit, Uart16550
from kvmpy.exits import Debug
from kvmpy.kvm import Vcpu

MODES = {16: "real", 32: "protected", 64: "long"}
CODE, STACK = 0x1000, 0x7000
SECONDS = 5.0

COUNTING = """
_start: mov ecx, 3
again:  call work
        dec ecx
        jnz again
        mov al, 0
        out 0xf4, al
        hlt
work:   add ebx, ecx
        ret
"""
WORK = 0x1013


@contextmanager
def prompt_before(image: Image, vcpus: int = 1) -> Iterator[GuestPrompt]:
    with Machine(memory=16 * MiB, vcpus=vcpus) as machine:
        machine.add(DebugExit())
        machine.load(image)
        yield GuestPrompt(machine)


def flat(source: str, bits: int) -> FlatImage:
    return FlatImage(assemble(source, bits=bits), CODE, MODES[bits], stack=STACK)


@pytest.fixture
def counting() -> Iterator[GuestPrompt]:
    """A guest in 64-bit mode, of an ELF file with symbols."""
    assemble_with_symbols(COUNTING, bits=64)  # skips where the tools are missing
    with prompt_before(ElfImage(TOOLCHAIN.assemble(COUNTING, bits=64).elf, stack=STACK)) as prompt:
        yield prompt


# Steps and stops


@pytest.mark.parametrize("bits", MODES)
def test_a_step_shows_the_next_instruction_and_what_changed_in_every_mode(bits: int) -> None:
    with prompt_before(flat("mov ebx, 0x12345678; cmp ebx, ebx; nop", bits)) as prompt:
        here = CODE + (6 if bits == 16 else 5)
        assert str(prompt.step()) == f"{here:#x}\n=> cmp ebx, ebx\n   rbx     0x0 -> 0x12345678"
        prompt.regs.rbx = 1  # by hand: no change that a step makes
        here += 3 if bits == 16 else 2
        assert str(prompt.step()) == f"{here:#x}\n=> nop\n   rflags  0x2 -> 0x46 (+PF +ZF)"
        assert str(prompt.where()) == f"{here:#x}\n=> nop"


def test_several_steps_show_the_sum_of_what_they_changed(counting: GuestPrompt) -> None:
    stopped = counting.step(3)
    assert str(stopped) == (
        "0x1015 <work+0x2>\n=> ret\n   rbx     0x0 -> 0x3\n   rcx     0x0 -> 0x3\n"
        f"   rsp     {STACK:#x} -> {STACK - 8:#x}\n   rflags  0x2 -> 0x6 (+PF)"
    )
    assert stopped.outcome is not None
    assert stopped.outcome.end is End.STOPPED


def test_switching_the_mode_shows_the_system_registers_that_change() -> None:
    with prompt_before(flat("mov eax, cr0; or al, 1; mov cr0, eax; nop", 16)) as prompt:
        prompt.step(2)
        (change,) = prompt.step().changes
        assert re.fullmatch(r"cr0     0x\w+ -> 0x\w+ \(\+PE\)", str(change))


def test_a_code_segment_with_a_base_shows_both_addresses() -> None:
    with prompt_before(flat("jmp 0x100, 0x10; nop; .org 0x110; nop; mov ax, [1]", 16)) as prompt:
        machine = prompt.machine
        machine.memory.write(0x1010, assemble("nop; jmp 3f; nop; 3: inc ax", address=0x10))
        assert str(prompt.step()) == "0x1010 (0100:0010)\n=> nop\n   cs      selector 0x0 -> 0x100, base 0x0 -> 0x1000"
        assert str(prompt.step()).splitlines()[1] == "=> jmp 0x1014"
        assert str(prompt.step()).startswith("0x1014 (0100:0014)\n=> inc ax")


def test_run_goes_from_breakpoint_to_breakpoint_to_the_end(counting: GuestPrompt) -> None:
    point = counting.br("work", condition=lambda vcpu: vcpu.regs.rcx != 2)
    assert counting.points() == [point]
    first, second, last = (counting.cont(SECONDS) for _ in range(3))
    assert str(first).startswith(
        f"breakpoint: work, vCPU 0 at {WORK:#x}\n{WORK:#x} <work>\n=> add ebx, ecx\n   rcx     0x0 -> 0x3\n"
    )
    assert "\n   rcx     0x3 -> 0x1" in str(second)
    assert last.outcome == counting.outcome == Outcome(End.EXITED, "debug exit at port 0xf4, value 0x0", code=1)


def test_a_handler_of_a_breakpoint_sees_registers_and_may_end_the_run(counting: GuestPrompt) -> None:
    seen = []

    def handler(vcpu: Vcpu, point: Point) -> Outcome | None:
        seen.append((point.name, vcpu.regs.rbx))
        return Outcome(End.STOPPED, "enough") if vcpu.regs.rcx == 1 else None

    counting.br("work+2", handler)
    assert str(counting.run(SECONDS)).startswith("stopped: enough\n0x1015 <work+0x2>\n=> ret\n")
    assert seen == [("0x1015", 3), ("0x1015", 5), ("0x1015", 6)]


@pytest.mark.parametrize("hardware", [True, False])
def test_until_comes_to_the_same_place_again_and_leaves_nothing_behind(counting: GuestPrompt, hardware: bool) -> None:
    if not hardware:  # all registers are in use
        for number in range(4):
            counting.br(CODE + 0x80 + number, hardware=True)
    counts = []
    for _ in range(3):
        assert counting.until("again", SECONDS).reason == ""
        counts.append(counting.regs.rcx)
    assert counts == [3, 2, 1]
    counting.step(2)
    assert counting.until("again", SECONDS).reason.startswith("exited with code 1")
    assert len(counting.points()) == (0 if hardware else 4)
    assert counting.machine.memory.read(0x1005, 1) == b"\xe8"


def test_until_the_place_where_the_guest_is_goes_round_once() -> None:
    with prompt_before(flat("again: inc ebx; jmp again", 64)) as prompt:
        for count in range(1, 4):
            assert str(prompt.until(CODE, SECONDS)).startswith(f"{CODE:#x}\n=> inc ebx\n")
            assert prompt.regs.rbx == count


def test_until_says_what_ended_the_run_before(counting: GuestPrompt) -> None:
    counting.br("work")
    assert counting.until("again+2", SECONDS).reason.startswith("breakpoint: work")


def test_a_watchpoint_stops_after_a_write() -> None:
    with prompt_before(flat("mov byte ptr [0x8001], 7; nop; hlt", 64)) as prompt:
        prompt.watch(0x8000, 2)
        assert str(prompt.run(SECONDS)).startswith("breakpoint: 0x8000, vCPU 0 at 0x1008\n0x1008\n=> nop")
        assert prompt.dump(0x8000, 2).data == b"\0\x07"


def test_a_timeout_is_told_and_the_guest_goes_on() -> None:
    with prompt_before(flat("again: inc rbx; jmp again", 64)) as prompt:
        first = prompt.run(0.01)
        assert str(first).startswith("timeout: ")
        assert "report()" not in str(first)
        count = prompt.regs.rbx
        while prompt.regs.rbx <= count:  # on a busy host the guest may get nothing of the time
            prompt.run(0.01)


def test_a_guest_that_ended_badly_points_to_the_report() -> None:
    with prompt_before(flat("ud2", 32)) as prompt:
        assert "\nreport() explains it\n" in str(prompt.run(SECONDS))
        assert "ud2" in str(prompt.report())


def test_an_outcome_may_be_explained_by_whoever_knows_more() -> None:
    with Machine() as machine:
        machine.load(flat("cli; hlt", 64))
        prompt = GuestPrompt(machine, lambda outcome: Outcome(End.FAILED, f"not just {outcome.end}"))
        assert str(prompt.run(SECONDS)).startswith("failed: not just halted\nreport() explains it\n")


# Looking


def test_memory_is_dumped_by_virtual_and_by_physical_address(counting: GuestPrompt) -> None:
    assert counting.dump("work", 3).data == b"\x01\xcb\xc3"
    assert counting.dump(CODE, 2, physical=True).data == b"\xb9\x03"
    assert counting.dump(0x7FFF_FFFF_F000, 2).cells == (None, None)
    across = counting.dump(16 * MiB - 2, 4, physical=True)
    assert across.cells == (0, 0, None, None)
    assert counting.dump((1 << 64) - 2, 100).cells == (None, None)
    assert counting.dump(CODE, 0).cells == ()
    assert len(counting.dump(0, 1 << 20, physical=True).cells) == 1 << 20


def test_breakpoints_in_memory_are_not_seen(counting: GuestPrompt) -> None:
    code = counting.dump(CODE, 0x20)
    counting.br("again", hardware=False)
    counting.br(CODE, hardware=False)
    assert counting.dump(CODE, 0x20) == code
    assert str(counting.where()).endswith("=> mov ecx, 3")
    assert str(counting.dis("again", 2)).splitlines() == [
        "<again>:",
        f"   0x1005  e8 09 00 00 00           call {WORK:#x} <work>",
        "   0x100a  ff c9                    dec ecx",
    ]


def test_disassembly_begins_at_the_next_instruction_and_marks_it(counting: GuestPrompt) -> None:
    counting.step()
    assert str(counting.dis(count=1)).splitlines()[1].startswith("=> 0x1005 ")
    assert len(counting.dis().instructions) == 10
    assert counting.dis(0x7FFF_FFFF_F000).instructions == ()


@pytest.mark.parametrize(
    ("bits", "words"), [(16, "1008 1234"), (32, "0000100a 00001234"), (64, "000000000000100a 0000000000001234")]
)
def test_the_stack_has_words_as_wide_as_the_code(bits: int, words: str) -> None:
    with prompt_before(flat("push 0x1234; call 1f; 1: nop", bits)) as prompt:
        prompt.step(2)
        listing = prompt.stack(2)
        returned = assemble("push 0x1234; call 1f; 1: nop", bits=bits).index(b"\x90") + CODE
        first, second = words.split()
        assert [line.split()[2] for line in str(listing).splitlines()] == [f"{returned:0{len(first)}x}", second]
        assert listing.address == STACK - 2 * bits // 8


def test_a_stack_outside_of_memory_says_so(counting: GuestPrompt) -> None:
    counting.regs.rsp = 16 * MiB - 12
    assert str(counting.stack(2)).splitlines()[1].endswith("?" * 16)


def test_an_address_is_walked(counting: GuestPrompt) -> None:
    assert counting.walk("work").physical == WORK
    assert "not present" in str(counting.walk(0x7FFF_FFFF_F000))


def test_exits_are_those_of_devices_and_not_of_steps() -> None:
    with prompt_before(flat("mov al, 'x'; out 0x10, al; in al, 0x99; nop; cli; hlt", 16)) as prompt:
        assert str(prompt.exits()) == "no exit so far"
        prompt.step()
        prompt.run(SECONDS)
        assert str(prompt.exits()) == "port write 0x10 <- 0x78\nport read 0x99 -> 0xff"
        assert str(prompt.exits(1)) == "port read 0x99 -> 0xff"
        assert any(isinstance(event, Debug) for event in prompt.machine.recent_exits())


def test_source_lines_are_places_and_are_shown() -> None:
    program = compile_c(
        "int total;\n"
        "void __attribute__((noinline)) add(int n) {\n"
        "    total += n;\n"
        "}\n"
        "void _start(void) {\n"
        "    add(7);\n"
        '    __asm__ volatile("cli; hlt");\n'
        "}\n"
    )
    with prompt_before(ElfImage(program.elf)) as prompt:
        prompt.br("add")
        stopped = prompt.run(SECONDS)
        assert re.search(r"^0x\w+ <add>, \S*<stdin>:[23]$", str(stopped), re.MULTILINE)
        assert re.match(r"0x\w+ <_start\+0x\w+>, \S*<stdin>:7\n=> cli\n", str(prompt.until("<stdin>:7", SECONDS)))
        assert prompt.dis("<stdin>:7", 1).instructions[0].mnemonic == "cli"
        prompt.br("<stdin>:7")
        with pytest.raises(UsageError):
            prompt.until("<stdin>:999")


def test_an_image_whose_symbols_cannot_be_read_has_none(tmp_path: Path) -> None:
    assemble_with_symbols(COUNTING, bits=64)
    damaged = bytearray(TOOLCHAIN.assemble(COUNTING, bits=64).elf.read_bytes())
    sections = int.from_bytes(damaged[40:48], "little")
    for section in range(sections, len(damaged) - 63, 64):
        if damaged[section + 4] == 2:  # SHT_SYMTAB
            damaged[section + 32 : section + 40] = (1 << 40).to_bytes(8, "little")
    with prompt_before(ElfImage(bytes(damaged))) as prompt:
        assert prompt.trouble
        assert str(prompt.step()).startswith("0x1005\n=> call")
        with pytest.raises(UsageError):
            prompt.br("work")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("step", (0,), "one instruction or more"),
        ("handle", (0x9999,), "no device is at 0x9999"),
        ("handle", ("uart",), "'uart' is no device"),
        ("dump", (0, -1), "a length is 0 to 0x100000 bytes, not -1"),
        ("dump", (0, 1 << 40), "a length is 0 to"),
        ("dump", (0, "x"), "a length is 0 to"),
        ("dump", (-1,), "an address has 64 bits"),
        ("dump", (1.5,), "an address is a number"),
        ("dis", (0, 0), "dis() shows"),
        ("stack", (1 << 20,), "stack() shows"),
        ("exits", (0,), "exits() shows"),
        ("cpu", (7,), "there are vCPUs 0 to 0, no 7"),
        ("cpu", (-1,), "there are vCPUs 0 to 0, no -1"),
        ("walk", (1 << 64,), "an address has 64 bits"),
        ("br", ("nothing",), "no symbol 'nothing'"),
        ("until", ("nothing",), "no symbol 'nothing'"),
        ("pause", (), "the guest does not run"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(
    counting: GuestPrompt, name: str, arguments: tuple[Any, ...], said: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        getattr(counting, name)(*arguments)
    assert counting.run(SECONDS).outcome == Outcome(End.EXITED, "debug exit at port 0xf4, value 0x0", code=1)


# Devices


def test_a_device_has_the_handlers_that_it_was_given_last() -> None:
    letters: list[str] = []
    with prompt_before(flat("again: out 0x10, al; in al, 0x10; out 0x11, al; nop; jmp again", 16)) as prompt:
        machine, nop = prompt.machine, CODE + 6
        device = machine.map_ports(0x10, 1, read=lambda offset, size: 65)
        machine.map_ports(0x11, 1, write=lambda offset, size, value: letters.append(chr(value)))
        prompt.until(nop, SECONDS)
        device.read = lambda offset, size: 66
        prompt.until(nop, SECONDS)
        assert prompt.handle(0x10, read=lambda offset, size: 67) is device
        prompt.until(nop, SECONDS)
        prompt.handle(device, read=lambda offset, size: 68)
        machine.run(0.05)  # not by the prompt
        assert letters[:3] == ["A", "B", "C"]
        assert set(letters[3:]) == {"D"}


def test_a_device_in_memory_gets_other_handlers_by_its_address() -> None:
    with prompt_before(flat("again: mov al, [0xd0000004]; mov [0xd0000000], al; nop; jmp again", 32)) as prompt:
        seen: list[int] = []
        device = prompt.machine.map_mmio(
            0xD000_0000, 8, read=lambda offset, size: 1, write=lambda offset, size, value: seen.append(value)
        )
        prompt.until(CODE + 10, SECONDS)
        assert prompt.handle(0xD000_0004, read=lambda offset, size: 2, mmio=True) is device
        prompt.until(CODE + 10, SECONDS)
        assert seen == [1, 2]


def test_what_is_no_handler_changes_nothing(counting: GuestPrompt) -> None:
    device = counting.machine.map_ports(0x10, 1, read=lambda offset, size: 1)
    before = device.read
    with pytest.raises(UsageError, match="a handler is a function, not 5"):
        counting.handle(device, read=lambda offset, size: 2, write=5)  # type: ignore[arg-type]
    assert (device.read, device.write) == (before, None)


def test_handlers_can_be_replaced_while_the_guest_runs() -> None:
    first: queue.Queue[int] = queue.Queue()
    second: queue.Queue[int] = queue.Queue()
    with prompt_before(flat("mov al, 7; again: out 0x10, al; jmp again", 16)) as prompt:
        device = prompt.machine.map_ports(0x10, 1, write=lambda offset, size, value: first.put(value))
        prompt.start(SECONDS)
        assert first.get(timeout=SECONDS) == 7
        prompt.handle(device, write=lambda offset, size, value: second.put(value))
        while not first.empty():
            first.get()
        assert second.get(timeout=SECONDS) == 7
        assert first.empty()
        assert prompt.pause().outcome == Outcome(End.STOPPED)


def test_what_a_handler_raises_comes_out_and_the_access_comes_again(counting: GuestPrompt) -> None:
    def fail(offset: int, size: int, value: int) -> None:
        raise KeyError("mine")

    with prompt_before(flat("mov al, 5; out 0x10, al; cli; hlt", 16)) as prompt:
        device = prompt.machine.map_ports(0x10, 1, write=fail)
        with pytest.raises(KeyError, match="mine"):
            prompt.run(SECONDS)
        assert prompt.interrupted() is None
        written: list[int] = []
        prompt.handle(device, write=lambda offset, size, value: written.append(value))
        assert prompt.run(SECONDS).reason.startswith("halted")
        assert written == [5]


# In the background


def test_a_guest_in_the_background_is_left_alone_until_it_is_paused() -> None:
    with prompt_before(flat("again: inc rbx; jmp again", 64)) as prompt:
        prompt.start()
        for look in (prompt.where, prompt.step, prompt.run, prompt.stack, prompt.dis, prompt.report, prompt.start):
            with pytest.raises(UsageError, match="the guest runs; pause"):
                look()
        with pytest.raises(UsageError, match="the guest runs; pause"):
            prompt.dump(CODE)
        assert prompt.dump(CODE, 1, physical=True).data == b"\x48"
        assert prompt.ended() is None
        stopped = prompt.pause()
        assert stopped.outcome == Outcome(End.STOPPED)
        assert prompt.ended() is None
        prompt.step()


def test_the_end_of_a_run_in_the_background_is_told_once() -> None:
    with prompt_before(flat("mov ebx, 9; cli; hlt", 64)) as prompt:
        prompt.start(SECONDS)
        prompt.machine.wait(SECONDS)
        ended = prompt.ended()
        assert ended is not None
        assert str(ended).startswith("halted")
        assert str(ended.changes[0]) == "rbx     0x0 -> 0x9"
        assert prompt.ended() is None
        with pytest.raises(UsageError, match="does not run"):
            prompt.pause()


def test_what_a_handler_raises_in_the_background_comes_out_once() -> None:
    with prompt_before(flat("out 0x10, al; cli; hlt", 16)) as prompt:
        prompt.machine.map_ports(0x10, 1, write=lambda offset, size, value: 1 / 0)  # type: ignore[arg-type]
        prompt.start(SECONDS)
        with pytest.raises(ZeroDivisionError):
            prompt.machine.wait(SECONDS)
        with pytest.raises(ZeroDivisionError):
            prompt.ended()
        assert prompt.ended() is None


# Several processors


def test_the_vcpu_that_stopped_is_the_one_that_it_is_about() -> None:
    with prompt_before(flat("again: inc bx; jmp again; other: inc cx; nop; stop: jmp stop", 16), vcpus=2) as prompt:
        machine = prompt.machine
        machine.vcpus[1].set_real_mode(0x1003)
        prompt.br(0x1004)
        stopped = prompt.run(SECONDS)
        assert str(stopped).startswith("breakpoint: 0x1004, vCPU 1 at 0x1004\nvCPU 1 at 0x1004\n=> nop\n")
        assert prompt.vcpu is machine.vcpus[1]
        assert prompt.present()["regs"].rip == 0x1004
        assert "   rcx     0x0 -> 0x1" in str(stopped).splitlines()
        assert str(prompt.cpu(0)).startswith("vCPU 0 at 0x100")
        count = prompt.regs.rbx
        prompt.step(2)
        assert prompt.regs.rbx == count + 1
        assert machine.vcpus[1].regs.rip == 0x1004


# Notebooks


def test_live_registers_show_themselves_in_notebooks(counting: GuestPrompt) -> None:
    assert f">{counting.vcpu.regs}<" in counting.vcpu.regs._repr_html_()
    assert "mode 64-bit mode, ring 0\n" in counting.vcpu.sregs._repr_html_()


def test_a_crash_report_is_a_part_of_its_outcome_in_notebooks() -> None:
    with prompt_before(flat("ud2", 32)) as prompt:
        prompt.machine.crash_reports = True
        outcome = prompt.machine.run(SECONDS)
        assert outcome.report is not None
        html = outcome._repr_html_()
        assert html.startswith("<pre")
        assert html.endswith(outcome.report._repr_html_())


def test_the_console_is_named_by_whoever_has_one(counting: GuestPrompt) -> None:
    counting.machine.add(Uart16550())
    names = counting.names()
    assert {"machine", "vcpu", "regs", "sregs", "memory", "symbols", "commands", "step", "report"} <= names.keys()
