"""Input from the host while a guest runs: pipes, sockets, terminals, files, and what goes wrong with them."""

import os
import socket
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gnu_toolchain import assemble
from kvmpy import End, Machine
from kvmpy.boot import FlatImage
from kvmpy.devices import Uart16550
from kvmpy.devices.host_input import HasFileno, HostInput, InputStream
from kvmpy.errors import ClosedError, UsageError
from kvmpy.machine.host_events import HostEvents
from waiting import wait_until

KIB = 1024
EOT = b"\x04"

# Echoes what comes, until EOT.
ECHO = """
    mov dx, 0x3f8; mov al, '>'; out dx, al
1:  mov dx, 0x3fd
2:  in al, dx
    test al, 1
    jz 2b
    mov dx, 0x3f8
    in al, dx
    cmp al, 4
    je 3f
    out dx, al
    jmp 1b
3:  hlt
"""


def machine_with_input(source: HasFileno | int | None = None) -> tuple[Machine, Uart16550]:
    image = FlatImage(assemble(ECHO))
    machine = Machine(memory=64 * KIB, irqchip=False)
    console = Uart16550()
    if source is not None:
        console.connect_input(source)
    machine.add(console)
    machine.load(image)
    return machine, console


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its reading and its writing end."""
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    with suppress(OSError):  # a test may have closed it
        os.close(writer)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("kvmpy")}


def test_a_pipe_types_to_the_guest(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    machine, console = machine_with_input(reader)
    with machine:
        machine.start()
        console.expect(b">")
        os.write(writer, b"through a pipe")
        console.expect(b"through a pipe")
        os.write(writer, b", twice" + EOT)
        assert machine.wait(timeout=5).end is End.HALTED
        assert console.output == b">through a pipe, twice"


def test_what_was_written_before_the_guest_started_is_there(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"early" + EOT)
    machine, console = machine_with_input(reader)
    with machine:
        assert machine.run(timeout=5).end is End.HALTED
        assert console.output == b">early"


def test_a_socket_types_to_the_guest_and_gets_its_output() -> None:
    here, there = socket.socketpair()
    with here, there:
        machine, console = machine_with_input(there)
        console.connect_sink(there)
        with machine:
            machine.start()
            assert here.recv(1) == b">"
            here.settimeout(5)
            for message in (b"one", b"two", b"three"):
                here.sendall(message)
                answer = b""
                while len(answer) < len(message):
                    answer += here.recv(100)
                assert answer == message
            here.sendall(EOT)
            assert machine.wait(timeout=5).end is End.HALTED


@pytest.mark.parametrize("guest_end", ["terminal", "master"])
def test_a_terminal_types_to_the_guest_and_its_hang_up_ends_only_the_input(guest_end: str) -> None:
    master, terminal = os.openpty()
    tty.setraw(terminal)
    typing, reading = (master, terminal) if guest_end == "terminal" else (terminal, master)
    machine, console = machine_with_input(reading)
    with machine:
        machine.start()
        os.write(typing, b"\x03typed\r")  # Ctrl-C is the guest's
        console.expect(b">\x03typed\r")
        os.close(typing)  # a terminal then reads as at its end, a master fails with EIO
        console.send(b"by send()")
        console.expect(b"by send()")
        wait_until(lambda: not machine._host_events._sources)
        console.send(EOT)
        assert machine.wait(timeout=5).end is End.HALTED
        assert not machine._host_events.errors
    os.close(reading)


def test_a_regular_file_is_typed_to_its_end(tmp_path: Path) -> None:
    text = bytes(value for value in range(256) if value != 4) * 64  # several reads
    path = tmp_path / "input"
    path.write_bytes(text + EOT)
    with path.open("rb") as file:
        machine, console = machine_with_input(file)
        with machine:
            assert machine.run(timeout=20).end is End.HALTED
            assert console.output == b">" + text


def test_an_empty_file_is_no_input(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with path.open("rb") as file:
        machine, console = machine_with_input(file)
        with machine:
            console.send(EOT)
            assert machine.run(timeout=5).end is End.HALTED


def test_the_end_of_the_input_does_not_end_the_run(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    machine, console = machine_with_input(reader)
    with machine:
        machine.start()
        os.write(writer, b"all")
        os.close(writer)
        console.expect(b"all")
        assert machine.running
        console.send(b" and more" + EOT)
        assert machine.wait(timeout=5).end is End.HALTED
        assert console.output == b">all and more"
        assert not machine._host_events.errors


def test_many_small_writes_arrive_in_order(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    machine, console = machine_with_input(reader)
    text = "".join(f"{number}," for number in range(1000)).encode()
    with machine:
        machine.start()
        for byte in text:
            os.write(writer, bytes([byte]))
        os.write(writer, EOT)
        assert machine.wait(timeout=20).end is End.HALTED
        assert console.output == b">" + text


def test_a_sink_that_answers_types_from_the_guests_own_thread() -> None:
    machine, console = machine_with_input()
    console.connect_sink(lambda data: console.send(b"reply" + EOT) if data == b">" else None)
    with machine:
        assert machine.run(timeout=5).end is End.HALTED
        assert console.output == b">reply"


# What goes wrong


class Failing:
    """An input whose third reading fails."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.read = b""

    def fileno(self) -> int:
        return self._fd

    def ready(self) -> bool:
        self.read += os.read(self._fd, 1)
        if len(self.read) == 3:
            raise RuntimeError("three is too many")
        return True


def test_an_input_that_raises_is_dropped_and_the_others_go_on(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    bad_reader, bad_writer = os.pipe()
    failing = Failing(bad_reader)
    machine, console = machine_with_input(reader)
    try:
        with machine:
            machine.listen(failing)
            machine.start()
            os.write(bad_writer, b"abcdef")
            os.write(writer, b"still here")
            console.expect(b"still here")
            os.write(writer, EOT)
            assert machine.wait(timeout=5).end is End.HALTED
            wait_until(lambda: bool(machine._host_events.errors))
            ((source, error),) = machine._host_events.errors
            assert source is failing
            assert str(error) == "three is too many"
            assert failing.read == b"abc"
    finally:
        os.close(bad_reader)
        os.close(bad_writer)


def test_a_file_that_raises_is_recorded_too_and_the_machine_is_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"abcdef")
    machine, console = machine_with_input()
    with machine, path.open("rb") as file:
        failing = Failing(file.fileno())
        machine.listen(failing)
        ((source, error),) = machine._host_events.errors
        assert source is failing
        assert str(error) == "three is too many"
        console.send(EOT)
        assert machine.run(timeout=5).end is End.HALTED


def test_one_descriptor_has_one_reader(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    machine, console = machine_with_input(reader)
    second: list[bytes] = []
    with machine:
        with pytest.raises(UsageError, match=f"descriptor {reader} "):
            machine.listen(InputStream(reader, second.append))
        machine.start()
        os.write(writer, b"to the first" + EOT)
        assert machine.wait(timeout=5).end is End.HALTED
        assert console.output == b">to the first"
        assert not second


def test_a_descriptor_that_was_closed_and_opened_again_is_a_new_input(pipe: tuple[int, int]) -> None:
    reader, _ = pipe
    machine, console = machine_with_input(reader)
    with machine:
        other_reader, other_writer = os.pipe()
        os.dup2(other_reader, reader)  # the old pipe is gone from epoll by itself
        machine.listen(InputStream(reader, console.send))
        os.write(other_writer, b"new" + EOT)
        assert machine.run(timeout=5).end is End.HALTED
        assert console.output == b">new"
    for end in (other_reader, other_writer):
        os.close(end)


def test_a_closed_descriptor_is_refused_when_it_is_added() -> None:
    machine, console = machine_with_input()
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with machine:
        with pytest.raises(OSError, match="Bad file descriptor"):
            machine.listen(InputStream(reader, console.send))
        console.send(EOT)
        assert machine.run(timeout=5).end is End.HALTED


def test_an_input_that_ends_does_not_take_along_the_next_one_with_its_number(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    other_reader, other_writer = os.pipe()
    arrived: list[bytes] = []
    events = HostEvents()

    class Reconnecting:
        """Like a server whose connection ends while the next one is accepted."""

        def fileno(self) -> int:
            return reader

        def ready(self) -> bool:
            os.dup2(other_reader, reader)
            events.add(InputStream(reader, arrived.append))
            return False

    events.add(Reconnecting())
    os.write(writer, b"old")
    os.write(other_writer, b"new")
    wait_until(lambda: bool(arrived))
    os.write(other_writer, b"newer")
    wait_until(lambda: len(arrived) == 2)
    events.close()
    assert arrived == [b"new", b"newer"]
    assert not events.errors
    os.close(other_reader)
    os.close(other_writer)


# Closing


def test_closing_with_input_that_nobody_took_ends_the_thread(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    machine, console = machine_with_input(reader)
    machine.start()
    console.expect(b">")
    os.write(writer, b"x" * 60_000)
    machine.close()
    assert not threads()
    os.write(writer, b"nobody reads this")
    assert os.fstat(reader)  # the source is the caller's, and still open


def test_closing_while_writes_go_on_ends_the_thread() -> None:
    here, there = socket.socketpair()
    with here, there:
        machine, _ = machine_with_input(there)
        machine.start()
        stop = threading.Event()

        def write() -> None:
            here.settimeout(0.1)
            while not stop.is_set():
                try:
                    here.send(b"again and again ")
                except TimeoutError:
                    return  # the buffers are full: nobody reads any more

        writing = threading.Thread(target=write)
        writing.start()
        for _ in range(50):
            os.sched_yield()
        machine.close()
        assert not threads()
        stop.set()
        writing.join()


def test_a_machine_without_input_has_no_thread_for_it() -> None:
    machine, console = machine_with_input()
    with machine:
        console.send(EOT)
        machine.run(timeout=5)
        assert not threads()


def test_an_input_may_close_the_events_it_belongs_to(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    events = HostEvents()
    closed = threading.Event()

    class Closing:
        def fileno(self) -> int:
            return reader

        def ready(self) -> bool:
            events.close()
            closed.set()
            return True

    source: HostInput = Closing()
    events.add(source)
    os.write(writer, b"x")
    assert closed.wait(timeout=5)
    wait_until(lambda: not threads())
    events.close()
    with pytest.raises(ClosedError):
        events.add(source)
    assert not threads()


def test_a_source_can_be_taken_out_again(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    events = HostEvents()
    arrived = threading.Event()
    taken: list[bytes] = []

    def take(data: bytes) -> None:
        taken.append(data)
        arrived.set()

    source = InputStream(reader, take)
    events.add(source)
    os.write(writer, b"one")
    assert arrived.wait(timeout=5)
    events.remove(source)
    os.write(writer, b"two")
    events.add(InputStream(reader, take))
    wait_until(lambda: len(taken) == 2)
    events.close()
    assert taken == [b"one", b"two"]


def test_input_may_be_connected_to_a_device_that_is_plugged_in_and_changed_later() -> None:
    first, second = os.pipe(), os.pipe()
    try:
        with Machine(memory=64 * 1024) as machine:
            console = machine.add(Uart16550())
            console.connect_input(first[0])
            os.write(first[1], b"one")
            wait_until(lambda: console.unread == 3)
            console.connect_input(second[0])
            os.write(first[1], b"nobody reads this")
            os.write(second[1], b"two!")
            wait_until(lambda: console.unread == 7)
            time.sleep(0.02)
            assert console.unread == 7
    finally:
        for fd in (*first, *second):
            os.close(fd)


def test_a_device_whose_input_cannot_be_polled_is_not_plugged_in() -> None:
    console = Uart16550()
    with Machine(memory=64 * 1024) as machine:
        end = os.pipe()
        console.connect_input(end[0])
        os.close(end[0])
        os.close(end[1])
        with pytest.raises(OSError, match="Bad file descriptor"):
            machine.add(console)
        assert machine.devices == []
        assert machine.ports.find(0x3F8) is None
