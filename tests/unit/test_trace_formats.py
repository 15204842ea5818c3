"""What the formats of trace files make of the same events."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.debug.trace.chrome_trace import ChromeTrace
from kvmpy.debug.trace.event import KINDS
from kvmpy.debug.trace.json_lines import JsonLines
from kvmpy.debug.trace.port_names import usual_owner
from kvmpy.debug.trace.subject import event_of
from kvmpy.debug.trace.text_form import TextForm
from kvmpy.exits import Debug, Hlt, Hypercall, InternalError, Interrupted, RdMsr, Shutdown, WrMsr
from traced_machine import notes, records

MICROSECOND = 1000

ALL_SORTS = (
    (0, 0, 8_000, 9_500, ("port", "write", 0x3F8, 1), 0x41),
    (1, 10_000, 12_000, 12_250, ("port", "read", 0x1F7, 1), 0xFF),
    (0, 20_000, 21_000, 22_000, ("mmio", "write", 0xFED0_00F0, 4), 0xDEAD_BEEF),
    (0, 23_000, 23_000, 23_100, ("port", "write", 0x3F8, 1, True), 0x42),
    (0, 24_000, 25_000, 26_000, ("port", "write", 0x3F8, 1), b"hello"),
    (None, 26_500, 26_500, 26_500, ("irq", "raise", 4), None),
    (0, 27_000, 28_000, 29_000, RdMsr(0x1B, 2), None),
    (0, 29_000, 30_000, 31_000, WrMsr(0x10, 7, 4), 7),
    (0, 31_000, 32_000, 33_000, Hypercall(5, (1, 2)), 9),
    (0, 33_000, 34_000, 35_000, ("port", "write", 0x70, 1), ValueError("no such register")),
    (None, 35_500, 35_500, 35_500, ("irq", "lower", 4), None),
    (0, 36_000, 37_000, 38_000, ("step", None, 0x1000, b"\x40\xf4", 16), {"rax": 1}),
    (0, 38_000, 39_000, 40_000, InternalError(1, (), b"\x0f\x0b"), None),
    (0, 40_000, 41_000, 42_000, Interrupted(), None),
    (1, 42_000, 43_000, 44_000, Debug(1, 0x1000), None),
    (0, 44_000, 45_000, 46_000, Hlt(), None),
    (0, 46_000, 47_000, 48_000, Shutdown(), None),
)


def test_all_sorts_of_events_are_described() -> None:
    events = [event_of(record) for record in records(*ALL_SORTS)]
    assert {event.kind for event in events} == set(KINDS)
    uart, ata, hpet, queued, string, raised, rdmsr, wrmsr, hypercall, failed, lowered, step, *others = events
    assert (uart.time, uart.guest, uart.duration, uart.vcpu) == (8_000, 8_000, 1_500, 0)
    assert (uart.name, uart.direction, uart.address, uart.size) == ("out 0x3f8", "write", 0x3F8, 1)
    assert (uart.value, uart.device, uart.queued) == (0x41, "uart16550", False)
    assert (ata.name, ata.device, ata.text) == ("in 0x1f7", "nobody", "ATA, primary channel")
    assert (hpet.name, hpet.value, hpet.device) == ("write 0xfed000f0", 0xDEAD_BEEF, "hpet")
    assert queued.queued
    assert string.value == b"hello"
    assert (raised.name, raised.vcpu, raised.device) == ("irq 4 raise", None, "uart16550")
    assert (rdmsr.name, rdmsr.value, rdmsr.text) == ("rdmsr 0x1b", None, "#GP")
    assert (wrmsr.name, wrmsr.value, wrmsr.text) == ("wrmsr 0x10", 7, "")
    assert (hypercall.name, hypercall.value, hypercall.text) == ("hypercall 5", 9, "(0x1, 0x2)")
    assert (failed.value, failed.text) == (None, "raised ValueError: no such register")
    assert lowered.direction == "lower"
    assert (step.address, step.size, step.value, step.registers) == (0x1000, 1, b"\x40", {"rax": 1})
    assert step.name == "inc ax"
    assert [event.name for event in others] == ["InternalError", "interrupted", "debug", "hlt", "shutdown"]


def test_an_access_that_reaches_two_devices_names_both() -> None:
    event = event_of(records((0, 0, 1, 2, ("port", "read", 0x3FE, 4), 0))[0])
    assert event.device == "uart16550 and nobody"


def test_a_device_that_comes_later_is_named_from_then_on() -> None:
    from kvmpy.debug.trace.subject import Subjects
    from kvmpy.devices.device import Region
    from traced_machine import fake_machine

    machine = fake_machine()
    subjects = Subjects((machine.ports, machine.mmio))
    note = (0, 0, 1, 2, ("port", "read", 0x300, 1), 0)
    assert subjects.records([note], 0)[0][4].device == "nobody"
    machine.ports.add(Region("port", 0x300, 1, "latecomer", None, None))
    assert subjects.records([note], 0)[0][4].device == "latecomer"


# Text


def test_text_has_a_line_in_columns_for_each_event() -> None:
    form = TextForm()
    lines = form.batch(records(*ALL_SORTS)).splitlines()
    assert len(lines) == len(ALL_SORTS)
    times = "  0.000008000    0      8.000      1.500  "
    assert lines[0] == f"{times}out 0x3f8                <- 0x41             uart16550"
    assert [line[len(times) :] for line in lines[1:4]] == [
        "in 0x1f7                 -> 0xff             nobody (ATA, primary channel)",
        "write 0xfed000f0         <- 0xdeadbeef       hpet",
        "out 0x3f8 (queued)       <- 0x42             uart16550",
    ]
    assert lines[5].split() == ["0.000026500", "-", "0.000", "0.000", "irq", "4", "raise", "uart16550"]
    assert lines[9].endswith('100% "odd" <b> (raised ValueError: no such register)')
    assert lines[11].split()[4:] == ["0x1000", "40", "inc", "ax", "rax=0x1"]
    heads = form.begin().split()
    assert heads[:4] == ["#", "time", "s", "vcpu"]


def test_an_event_prints_as_its_line() -> None:
    made = records(*ALL_SORTS)
    assert [str(event_of(record)) for record in made] == TextForm().batch(made).splitlines()


# JSON lines


def test_json_lines_have_the_keys_of_the_event() -> None:
    made = records(*ALL_SORTS)
    lines = [json.loads(line) for line in JsonLines().batch(made).splitlines()]
    assert lines[0] == {
        "time": 8_000, "guest": 8_000, "duration": 1_500, "vcpu": 0, "kind": "port",
        "direction": "write", "address": 0x3F8, "size": 1, "value": 0x41, "device": "uart16550",
    }  # fmt: skip
    for line, event in zip(lines, map(event_of, made), strict=True):
        said = {name: getattr(event, name) for name in event.__match_args__}
        said["value"] = said["value"].hex() if isinstance(said["value"], bytes) else said["value"]
        if event.kind not in ("step", "other"):
            del said["name"]
        always = ("time", "guest", "duration", "vcpu", "kind")
        assert line == {
            key: value for key, value in said.items() if key in always or value not in (None, False, "", {})
        }


# Chrome's trace event format


def chrome(*made: Any, detailed: int = 1000, batch: int = 1024) -> list[dict[str, Any]]:
    form = ChromeTrace("a machine", (0, 1), detailed)
    text, done = form.begin(), records(*made)
    for start in range(0, len(done), batch):
        text += form.batch(done[start : start + batch])
        json.loads(text + form.end())  # complete after each batch
    whole = json.loads(text + form.last() + form.end())
    assert whole["displayTimeUnit"] == "ns"
    events: list[dict[str, Any]] = whole["traceEvents"]
    return events


def test_chrome_events_have_what_the_format_asks_of_their_phase() -> None:
    events = chrome(*ALL_SORTS)
    needed = {
        "X": {"name", "pid", "tid", "ts", "dur"}, "C": {"name", "pid", "ts", "args"}, "M": {"name", "pid", "args"},
    }  # fmt: skip
    for event in events:
        assert needed[event["ph"]] <= event.keys()
        assert isinstance(event["ts"], int | float)
        assert event["ts"] >= 0
        assert event["pid"] == 1
    assert {event["ph"] for event in events} == {"X", "C", "M"}


def test_chrome_names_the_process_and_a_thread_for_each_vcpu() -> None:
    named = {(event["name"], event["tid"]): event["args"]["name"] for event in chrome(*ALL_SORTS) if event["ph"] == "M"}
    assert named == {("process_name", 0): "a machine", ("thread_name", 1): "vCPU 0", ("thread_name", 2): "vCPU 1"}


def test_chrome_slices_say_what_and_who_in_microseconds() -> None:
    slices = [event for event in chrome(*ALL_SORTS) if event["ph"] == "X"]
    guest, uart = slices[:2]
    assert (guest["name"], guest["tid"], guest["ts"], guest["dur"]) == ("guest", 1, 0, 8)
    assert (uart["name"], uart["tid"], uart["ts"], uart["dur"]) == ("out 0x3f8 uart16550", 1, 8, 1.5)
    assert uart["args"] == {"value": "0x41"}
    by_name = {event["name"]: event for event in slices}
    assert by_name["in 0x1f7 nobody (ATA, primary channel)"]["args"] == {"value": "0xff"}
    assert by_name['out 0x70 100% "odd" <b>']["args"] == {"text": "raised ValueError: no such register"}
    assert by_name["inc ax"]["args"] == {"rax": "0x1"}
    assert by_name["hlt"]["dur"] == 1


@pytest.mark.parametrize("detailed", [0, 300, 10_000])
def test_guest_and_exits_take_turns_on_each_thread(detailed: int) -> None:
    made = notes(2_000)
    events = chrome(*made, detailed=detailed, batch=300)
    exits = 0
    for thread in (1, 2):
        slices = [event for event in events if event["ph"] == "X" and event["tid"] == thread]
        assert slices == sorted(slices, key=lambda event: event["ts"])
        for one, other in pairwise(slices):
            assert one["ts"] + one["dur"] <= other["ts"] + 0.001
        exits += sum(event["name"] != "guest" for event in slices)
    assert exits == len(made)
    guests = sum(event["name"] == "guest" for event in events)
    assert guests == {0: 0, 300: 300, 10_000: 2_000}[detailed]
    assert any(event["ph"] == "i" and "from here on" in event["name"] for event in events) is (detailed == 300)


def test_an_interrupt_line_is_a_counter_of_0_and_1() -> None:
    levels = [event for event in chrome(*ALL_SORTS) if event["name"] == "irq 4 uart16550"]
    assert [(event["ph"], event["ts"], event["args"]) for event in levels] == [
        ("C", 26.5, {"level": 1}),
        ("C", 35.5, {"level": 0}),
    ]


def test_exits_per_millisecond_add_up_to_the_exits() -> None:
    made = notes(2_048)
    rates = [event for event in chrome(*made) if event["name"] == "exits per ms"]
    assert all(rate["args"].keys() == {"port", "mmio"} for rate in rates)
    ends = [rate["ts"] for rate in rates[1:]] + [made[-1][2] / 1e3]
    total = sum(
        sum(rate["args"].values()) * (end - rate["ts"]) / 1e3 for rate, end in zip(rates, ends, strict=True)
    )  # fmt: skip
    assert total == pytest.approx(len(made), rel=0.01)


# Hostile names and values


@given(name=st.text(), value=st.integers(0, (1 << 64) - 1) | st.binary(max_size=80) | st.none(), text=st.text())
def test_no_name_breaks_a_format(name: str, value: Any, text: str) -> None:
    from kvmpy.devices.device import Region
    from traced_machine import fake_machine

    machine = fake_machine()
    machine.ports.add(Region("port", 0x10, 1, name, None, None))
    made = (
        (0, 0, 8_000, 9_500, ("port", "write", 0x10, 8), value),
        (0, 10_000, 11_000, 12_000, ("port", "write", 0x10, 8), OSError(text)),
    )
    form = ChromeTrace(name, (0,))
    whole = json.loads(form.begin() + form.batch(records(*made, machine=machine)) + form.end())
    assert whole["traceEvents"][0]["args"]["name"] == name
    for line in JsonLines().batch(records(*made, machine=machine)).splitlines():
        assert json.loads(line)["device"] == event_of(records(*made, machine=machine)[0]).device
    assert TextForm().batch(records(*made, machine=machine)).count("\n") == 2


# Ports


@pytest.mark.parametrize(
    ("port", "owner"),
    [
        (0x70, "CMOS and real-time clock"), (0x3F8, "COM1"), (0x3FF, "COM1"), (0x400, ""),
        (0x1F7, "ATA, primary channel"), (0x61, "system control port B"), (0xCF9, "reset control"),
        (0xCFA, "PCI configuration"), (0xFFFF, ""), (0x3F7, "floppy controller"),
        (0x3F6, "ATA, primary channel, control"),
    ],
)  # fmt: skip
def test_ports_of_a_pc_have_their_usual_owner(port: int, owner: str) -> None:
    assert usual_owner(port) == owner
