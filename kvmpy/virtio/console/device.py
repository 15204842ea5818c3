"""The console device: terminals and byte channels to the guest (virtio 1.2, section 5.3)."""

from __future__ import annotations

import ctypes
import struct
import time
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from kvmpy.errors import UsageError
from kvmpy.virtio.chain import Chain
from kvmpy.virtio.console.port import ConsolePort
from kvmpy.virtio.descriptors import read_single_buffers
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.virtqueue import BATCH, Virtqueue

if TYPE_CHECKING:
    import re

    from kvmpy.devices.console_output import Sink
    from kvmpy.devices.device import Board, Timer
    from kvmpy.devices.host_input import HasFileno
    from kvmpy.memory import GuestMemory

__all__ = ["ConsoleEvent", "ConsoleFeature", "VirtioConsole"]

_CONTROL_RECEIVE, _CONTROL_TRANSMIT = 2, 3  # section 5.3.2
_CONTROL = struct.Struct("<IHH")  # struct virtio_console_control: id, event, value (5.3.6.2)
_ENTRIES = 64
_CONTROL_ENTRIES = 32
_PIECE = 0x1_0000
"""Bytes of a request that are taken at once."""
_MOST_OUTPUT = 16 << 20
"""Bytes of one request. A hostile guest may make 4 GiB of a few pages, again and again; no driver writes that much."""
_AT_ONCE = 1 << 20
"""After so many bytes of output for one notification, others may have the thread first."""
_MOST_PORTS = 31
_MOST_MESSAGES = 1024
"""That wait for a driver which makes no buffers available. One that asks for more is told no more."""
_PAUSE = 0.02
"""Seconds without output after which a driver has perhaps finished what it was doing; each time twice as many."""
_REMINDERS = 6


class ConsoleFeature(IntEnum):
    """Section 5.3.3."""

    SIZE = 0
    MULTIPORT = 1
    EMERG_WRITE = 2


class ConsoleEvent(IntEnum):
    """What control messages are about (section 5.3.6.2)."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    DEVICE_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


class ConsoleConfig(ctypes.LittleEndianStructure):
    """struct virtio_console_config (section 5.3.4)."""

    _pack_ = 1
    _fields_ = (
        ("cols", ctypes.c_uint16),
        ("rows", ctypes.c_uint16),
        ("max_nr_ports", ctypes.c_uint32),
        ("emerg_wr", ctypes.c_uint32),
    )


class VirtioConsole(VirtioDevice):
    """A terminal (Linux: `console=hvc0`), and with `channels` further ports, by their names.

    Whole buffers go from and to the guest: a line costs one exit, where a 16550 costs one a character. `text`,
    `output`, `expect`, `send`, `connect_sink` and `connect_input` are those of the terminal, `ports[0]`;
    `channel(name)` is another port. `size` is (columns, rows); `resize` changes it.

    With channels, a size travels in a message of two numbers, the columns first (section 5.3.6.2). Linux had them the
    other way round until 2025 (version 6.15, and updates of older ones): for such guests say `rows_first=True`.
    """

    name = "virtio-console"
    device_id = 3

    def __init__(
        self,
        *,
        size: tuple[int, int] = (80, 25),
        channels: Sequence[str] = (),
        sink: Sink | None = None,
        history: int = 0x1_0000,
        rows_first: bool = False,
    ) -> None:
        if len(channels) >= _MOST_PORTS or len({*channels}) != len(channels) or not all(channels):
            raise UsageError(f"a console has up to {_MOST_PORTS - 1} channels of different names, not {channels!r}")
        columns, rows = _checked(size)
        terminal = ConsolePort(self, 0, is_console=True, columns=columns, rows=rows, sink=sink, history=history)
        others = [ConsolePort(self, number, name=name) for number, name in enumerate(channels, 1)]
        self.ports = (terminal, *others)
        # 5.3.2: the queues of port 0, the two for control messages, then two for each further port.
        self.queue_sizes = (_ENTRIES, _ENTRIES)
        features = {int(ConsoleFeature.SIZE), int(ConsoleFeature.EMERG_WRITE)}
        if others:
            self.queue_sizes += (_CONTROL_ENTRIES, _CONTROL_ENTRIES, *(_ENTRIES, _ENTRIES) * len(others))
            features.add(int(ConsoleFeature.MULTIPORT))
        self.features = frozenset(features)
        super().__init__()
        self.config: ConsoleConfig = ConsoleConfig(columns, rows, len(self.ports), 0)
        self._messages: deque[bytes] = deque()
        self._rows_first = rows_first
        self._reminder: Timer | None = None
        self._reminders_left = 0

    # --- for programs -----------------------------------------------------------------------------------------------

    def channel(self, name: str) -> ConsolePort:
        """A port by its name. Raises UsageError for a name that is not there."""
        found = next((port for port in self.ports[1:] if port.name == name), None)
        if found is None:
            raise UsageError(f"there is no channel {name!r}, but {', '.join(port.name for port in self.ports[1:])}")
        return found

    def resize(self, columns: int, rows: int) -> None:
        """The terminal has another size now; the guest is told. Raises UsageError for sizes that are none."""
        columns, rows = _checked((columns, rows))
        terminal = self.ports[0]
        with self.changing_config():  # 5.3.5.2: without MULTIPORT this is how the driver learns of it
            terminal.columns, terminal.rows = columns, rows
            self.config.cols, self.config.rows = columns, rows
            if terminal.guest_ready and self._multiport:
                self._tell_size(terminal)

    @property
    def output(self) -> bytes:
        """The last bytes that the guest wrote to the terminal."""
        return self.ports[0].output

    @property
    def text(self) -> str:
        """`output` as UTF-8."""
        return self.ports[0].text

    def expect(self, pattern: str | re.Pattern[str], timeout: float = 5.0) -> re.Match[str]:
        """Wait for `pattern` on the terminal; see `ConsoleOutput.expect`."""
        return self.ports[0].expect(pattern, timeout)

    def send(self, data: bytes | str) -> None:
        """Type on the terminal."""
        self.ports[0].send(data)

    def connect_sink(self, sink: Sink | None) -> None:
        """Send the terminal's output to `sink` too."""
        self.ports[0].connect_sink(sink)

    def connect_input(self, source: HasFileno | int | None) -> None:
        """Take the terminal's input from a file object, socket or terminal."""
        self.ports[0].connect_input(source)

    # --- for ports --------------------------------------------------------------------------------------------------

    @property
    def _multiport(self) -> bool:
        return self.has_feature(ConsoleFeature.MULTIPORT)

    def receive_queue(self, port: ConsolePort) -> Virtqueue:
        """Where the guest gets what is sent to a port."""
        return self.queues[0 if port.number == 0 else 2 + 2 * port.number]

    def takes_input(self, port: ConsolePort) -> bool:
        """Whether the guest would not lose what it got now: Linux drops the input of a port that nobody has open."""
        return port.guest_open or not self._multiport

    # --- the driver's side ------------------------------------------------------------------------------------------

    def attach(self, board: Board, memory: GuestMemory) -> None:
        super().attach(board, memory)
        self._reminder = board.timer(self._remind)
        for port in self.ports:
            port.attach(board)

    def notified(self, queue: Virtqueue) -> None:
        index = queue.index
        if index == _CONTROL_RECEIVE:
            self._flush()
        elif index % 2 == 0:
            self._port_of(index).feed()
        else:
            self._taken = 0
            queue.run(self.handle, self._print_next)

    def _print_next(self, queue: Virtqueue) -> int:
        """For `run`: print what is next in one piece, as far as it is in buffers of one part each. After much output,
        BATCH."""
        if self._taken >= _AT_ONCE:
            return BATCH
        if queue.index == _CONTROL_TRANSMIT:
            return 0
        answers, texts, length = [], [], 0
        for head, text in queue.peek(read_single_buffers):
            length += len(text)
            if length > _PIECE:
                break
            answers.append((head, 0))
            texts.append(text)
        if texts:
            self._printed(self._port_of(queue.index), b"".join(texts))
            queue.use(answers)
        return len(answers)

    def _port_of(self, index: int) -> ConsolePort:
        return self.ports[max(0, index // 2 - 1)]

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        if queue.index == _CONTROL_TRANSMIT:
            self._control(chain.read(_CONTROL.size))
        else:
            port = self._port_of(queue.index)
            left = chain.readable_left
            if left > _MOST_OUTPUT:
                self.counters["giant_output"] += 1
                left = _MOST_OUTPUT
            while left:
                piece = chain.read(min(left, _PIECE))
                left -= len(piece)
                self._printed(port, piece)
        chain.complete(0)

    def _printed(self, port: ConsolePort, data: bytes) -> None:
        self._taken += len(data)
        port.written(data)
        if self._reminders_left:
            self._remind_later()

    def config_written(self, offset: int, data: bytes) -> None:
        """5.3.4: `emerg_wr` is a character, also from a driver that has not set the device up yet."""
        if offset == ConsoleConfig.emerg_wr.offset:
            self.ports[0].written(data[:1])
        else:
            super().config_written(offset, data)

    # --- control messages, section 5.3.6.2 --------------------------------------------------------------------------

    def _control(self, message: bytes) -> None:
        if len(message) < _CONTROL.size:
            self.counters["short_control_message"] += 1
            return
        number, event, value = _CONTROL.unpack(message)
        if event == ConsoleEvent.DEVICE_READY:
            if value:
                for port in self.ports:
                    self._tell(port, ConsoleEvent.DEVICE_ADD, 1)
            return
        if number >= len(self.ports):
            self.counters["unknown_port"] += 1
            return
        port = self.ports[number]
        if event == ConsoleEvent.PORT_READY:
            if value:
                self._port_is_ready(port)
        elif event == ConsoleEvent.PORT_OPEN:
            port.guest_open = bool(value)
            if port.on_open is not None:
                port.on_open(port.guest_open)
            port.feed()
        else:
            self.counters["unknown_event"] += 1

    def _port_is_ready(self, port: ConsolePort) -> None:
        port.guest_ready = True
        if port.is_console:
            self._tell(port, ConsoleEvent.CONSOLE_PORT, 1)
            self._tell_size(port)
        if port.name:
            self._tell(port, ConsoleEvent.PORT_NAME, 1, port.name.encode())
        self._tell(port, ConsoleEvent.PORT_OPEN, 1)

    def _tell_size(self, port: ConsolePort) -> None:
        size = (port.rows, port.columns) if self._rows_first else (port.columns, port.rows)
        self._tell(port, ConsoleEvent.RESIZE, 0, struct.pack("<HH", *size))

    def _tell(self, port: ConsolePort, event: ConsoleEvent, value: int, more: bytes = b"") -> None:
        if len(self._messages) >= _MOST_MESSAGES:
            self.counters["message_lost"] += 1
            return
        self._messages.append(_CONTROL.pack(port.number, event, value) + more)
        self._flush()

    def _flush(self) -> None:
        """Send the messages that wait, as far as the driver has made buffers available."""
        queue = self.queues[_CONTROL_RECEIVE]
        with queue.batch():
            while self._messages:
                chain = queue.take()
                if chain is None:
                    return
                message = self._messages.popleft()
                if chain.write(message) < len(message):  # 5.3.6.2.2: a buffer must have room for the message
                    self.counters["message_cut"] += 1
                chain.complete()

    # --- the size that the terminal has at the start ----------------------------------------------------------------

    # Linux reads the size from the configuration space only when it changes, and forgets what it read as long as its
    # terminal is being set up, which ends with printing the whole log. It is told of a change in the first pauses.

    def started(self) -> None:
        if not self._multiport and self.has_feature(ConsoleFeature.SIZE):
            self._reminders_left = _REMINDERS
            self._remind_later()

    def _remind_later(self) -> None:
        if self._reminder is not None:
            self._reminder.start(time.monotonic() + _PAUSE * 2 ** (_REMINDERS - self._reminders_left))

    def _remind(self) -> None:
        with self.lock:
            if self._reminders_left and self.notifies:
                self._reminders_left -= 1
                self.transport.config_notification()

    # --- life -------------------------------------------------------------------------------------------------------

    def stopped(self) -> None:
        self._messages.clear()
        self._reminders_left = 0
        for port in self.ports:
            port.reset()

    def device_state(self) -> dict[str, Any]:
        return {
            "ports": [port.state() for port in self.ports],
            "messages": list(self._messages),
            "reminders": self._reminders_left,
        }

    def restore_device_state(self, state: dict[str, Any]) -> None:
        if len(state["ports"]) != len(self.ports):
            raise UsageError(f"the state is of a console with {len(state['ports'])} ports, not {len(self.ports)}")
        for port, saved in zip(self.ports, state["ports"], strict=True):
            port.restore(saved)
        self._messages = deque(state["messages"])
        self._reminders_left = state["reminders"]
        if self._reminders_left:
            self._remind_later()

    def close(self) -> None:
        for port in self.ports:
            port.close()


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    columns, rows = size
    if not (0 < columns < 1 << 16 and 0 < rows < 1 << 16):
        raise UsageError(f"a terminal has columns and rows from 1 to 65535, not {columns} x {rows}")
    return columns, rows
