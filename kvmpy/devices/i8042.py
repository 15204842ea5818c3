"""The keyboard controller 8042 and the keyboard behind it, with the A20 gate and the reset line it carries on a PC.

Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller".
"""

from __future__ import annotations

import threading
from collections import deque

from kvmpy.devices.device import Device, Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["I8042", "Config", "Status"]

# Offsets are counted from port 0x60.
DATA = 0x00  # port 0x60
COMMAND = 0x04  # port 0x64
SYSTEM_CONTROL_A = 0x32  # port 0x92

ACK = 0xFA
RESEND = 0xFE
SELF_TEST_PASSED = 0x55
KEYBOARD_TEST_PASSED = 0xAA
FROM_KEYBOARD = 0x100  # beside a byte in the output buffer: it interrupts
NO_AUX_CLOCK = 0x01  # answer to the test of the auxiliary port: its clock line is stuck low, for nothing is there


class Status:
    """Port 0x64, read."""

    OBF = 1 << 0  # a byte waits at port 0x60
    IBF = 1 << 1  # never seen: what is written is taken at once
    SYS = 1 << 2  # the self test has passed
    COMMAND = 1 << 3  # the last write was to port 0x64
    UNLOCKED = 1 << 4  # the key lock is open
    AUX_OBF = 1 << 5
    TIMEOUT = 1 << 6
    PARITY = 1 << 7


class Config:
    """The controller's command byte (commands 0x20 and 0x60)."""

    KEYBOARD_INTERRUPT = 1 << 0
    AUX_INTERRUPT = 1 << 1
    SYS = 1 << 2
    KEYBOARD_DISABLED = 1 << 4
    AUX_DISABLED = 1 << 5
    TRANSLATE = 1 << 6


_TRANSLATE = Config.TRANSLATE
_DISABLED = Config.KEYBOARD_DISABLED
_AUX_DISABLED = Config.AUX_DISABLED
_SET_1_OF = {0x01: 0x43, 0x02: 0x41, 0x03: 0x3F, 0x83: 0x41}  # set 2: F9, F7, F5, F7
_POWER_ON_CONFIG = Config.KEYBOARD_INTERRUPT | Config.SYS | Config.AUX_DISABLED | Config.TRANSLATE


class I8042(Device):
    """Ports 0x60 and 0x64, and the "fast" A20 and reset bits at port 0x92.

    It answers the probes of firmware and Linux at once. There is no auxiliary port (mouse), and the controller says so:
    the loop-back command echoes without the AUX flag, the port test reports a dead clock line. A reset by command 0xFE,
    by the output port or by port 0x92 is a reset of the machine. KVM cannot mask address line 20: `a20_enabled` keeps
    what the guest asked for, memory behaves as if it were always on. `press` types scan codes.
    """

    name = "i8042"

    def __init__(self, irq: int = 1) -> None:
        super().__init__()
        self.irq = irq
        self._lock = threading.Lock()
        self._level = False
        self._power_on()

    def _power_on(self) -> None:
        self.a20_enabled = True
        self._config = _POWER_ON_CONFIG
        self._ram = bytearray(0x20)  # the controller's other bytes, reachable by commands 0x21 to 0x3F and 0x61 to 0x7F
        self._last_was_command = False
        self._argument_of = 0  # the command whose argument port 0x60 expects; 0: none
        self._output: int | None = None
        self._replies: deque[int] = deque()  # of the controller
        self._keyboard: deque[int] = deque()  # from the keyboard, on its wire
        self._keyboard_argument_of = 0
        self._scanning = True
        self._scan_code_set = 2
        self._last_sent = 0

    def regions(self) -> tuple[Region, ...]:
        return (
            Region("port", 0x60, 1, self.name, self.read, self.write, base=DATA, width=1),
            Region("port", 0x64, 1, self.name, self.read, self.write, base=COMMAND, width=1),
            Region("port", 0x92, 1, f"{self.name}, port 0x92", self.read, self.write, base=SYSTEM_CONTROL_A, width=1),
        )

    # --- the guest's side -------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            if offset == DATA:
                value = self._output & 0xFF if self._output is not None else 0
                self._output = None
                self._update()  # down and, if there is more, up again: an edge for each byte
                self._fill()
                return value
            if offset == COMMAND:
                status = Status.UNLOCKED | self._config & Config.SYS
                if self._output is not None:
                    status |= Status.OBF
                if self._last_was_command:
                    status |= Status.COMMAND
                return status
            if offset == SYSTEM_CONTROL_A:
                return self.a20_enabled << 1
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        reset = False
        with self._lock:
            if offset == COMMAND:
                self._last_was_command = True
                reset = self._command(value)
            elif offset == DATA:
                self._last_was_command = False
                command, self._argument_of = self._argument_of, 0
                if command:
                    reset = self._argument(command, value)
                else:
                    self._config &= ~_DISABLED  # the controller opens the wire to send a byte to the keyboard
                    self._to_keyboard(value)
            elif offset == SYSTEM_CONTROL_A:
                self.a20_enabled = bool(value & 2)
                reset = bool(value & 1)
            self._fill()
        if reset:
            self._reset_machine(f"write of {value:#x} to port {0x60 + offset:#x}")

    def _command(self, command: int) -> bool:
        """Port 0x64 is written. True: reset the machine."""
        self._argument_of = 0
        if command == 0x20:
            self._replies.append(self._config)
        elif command < 0x40:
            self._replies.append(self._ram[command & 0x1F])
        elif command < 0x80 or command in (0xD1, 0xD2, 0xD3, 0xD4):
            self._argument_of = command
        elif command == 0xA9:
            self._replies.append(NO_AUX_CLOCK)
        elif command == 0xAA:
            self._config |= Config.SYS
            self._replies.append(SELF_TEST_PASSED)
        elif command == 0xAB:
            self._replies.append(0x00)  # the keyboard's lines are fine
        elif command == 0xAD:
            self._config |= _DISABLED
        elif command == 0xAE:
            self._config &= ~_DISABLED
        elif command == 0xC0:
            self._replies.append(0x80)  # input port: key lock open
        elif command == 0xD0:
            self._replies.append(0x01 | self.a20_enabled << 1 | (self._output is not None) << 4)
        elif command in (0xDD, 0xDF):  # widespread, though not IBM's: A20 off and on in one command
            self.a20_enabled = command == 0xDF
        elif command >= 0xF0:
            return not command & 1  # pulse output lines whose bit is 0; bit 0 is the processor's reset
        elif command not in (0xA7, 0xA8):  # the auxiliary port is off and stays so
            self.counters["unknown_command"] += 1
        return False

    def _argument(self, command: int, value: int) -> bool:
        """Port 0x60 is written after a command that takes an argument. True: reset the machine."""
        if command == 0x60:
            self._config = value | _AUX_DISABLED
        elif command < 0x80:
            self._ram[command & 0x1F] = value
        elif command == 0xD1:
            self.a20_enabled = bool(value & 2)
            return not value & 1
        elif command == 0xD4:
            self._replies.append(RESEND)  # nobody is there
        elif command == 0xD2:
            self._replies.append(value | FROM_KEYBOARD)
        else:  # 0xD3 loops back through the auxiliary port; as there is none, without the AUX flag in the status
            self._replies.append(value)
        return False

    # --- the keyboard -----------------------------------------------------------------------------------------------

    def _to_keyboard(self, value: int) -> None:
        argument_of, self._keyboard_argument_of = self._keyboard_argument_of, 0
        if argument_of:
            self._keyboard.append(ACK)
            if argument_of == 0xF0:
                if value == 0:
                    self._answer(self._scan_code_set)
                elif value <= 3:
                    self._scan_code_set = value
            return
        if value == 0xFE:
            self._keyboard.append(self._last_sent)
        elif value == 0xEE:
            self._keyboard.append(0xEE)
        elif value in (0xED, 0xF0, 0xF3):  # lamps, scan code set, repeat rate: an argument follows
            self._keyboard.append(ACK)
            self._keyboard_argument_of = value
        elif value == 0xF2:
            self._keyboard.extend((ACK, 0xAB))
            self._answer(0x83)
        elif 0xF4 <= value <= 0xFD:
            self._keyboard.append(ACK)
            if value in (0xF4, 0xF5):
                self._scanning = value == 0xF4
            if value in (0xF5, 0xF6):
                self._scan_code_set = 2
        elif value == 0xFF:
            self._keyboard.clear()
            self._scanning, self._scan_code_set = True, 2
            self._keyboard.extend((ACK, KEYBOARD_TEST_PASSED))
        else:
            self._keyboard.append(RESEND)
            self.counters["unknown_keyboard_command"] += 1

    def _answer(self, value: int) -> None:
        """The keyboard sends a byte that the controller, if it translates to scan code set 1, takes for a key."""
        self._keyboard.append(_SET_1_OF.get(value, value) if self._config & _TRANSLATE else value)

    def press(self, scan_codes: bytes) -> None:
        """Type, from any thread. Each byte appears at port 0x60 as given: set 1, unless the guest stopped translation.

        A keyboard told to be silent (0xF5) drops them, counted as `scan_code_dropped`.
        """
        with self._lock:
            if self._scanning:
                self._keyboard.extend(scan_codes)
                self._fill()
            else:
                self.counters["scan_code_dropped"] += len(scan_codes)

    def _fill(self) -> None:
        """Move the next byte into the output buffer, if it is free, and let the interrupt follow it."""
        if self._output is None:
            if self._replies:
                self._output = self._replies.popleft()
            elif self._keyboard and not self._config & _DISABLED:
                self._last_sent = self._keyboard.popleft()
                self._output = self._last_sent | FROM_KEYBOARD
        self._update()

    def _update(self) -> None:
        # Only what comes from the keyboard interrupts. The controller's own answers are polled for, and an edge that
        # the PIC keeps until later would then find nothing to read: SeaBIOS takes that for a key.
        output = self._output or 0
        level = bool(output & FROM_KEYBOARD and self._config & Config.KEYBOARD_INTERRUPT)
        if level != self._level:
            self._level = level
            if level:
                self.line.raise_line()
            else:
                self.line.lower_line()

    def _reset_machine(self, cause: str) -> None:
        if self.board is None:
            self.counters["reset_without_board"] += 1
        else:
            self.board.reset(f"{self.name}: {cause}")

    # --- life -------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        with self._lock:
            self._power_on()
            self._update()

    def state(self) -> dict[str, Any]:
        with self._lock:
            return {
                "a20_enabled": self.a20_enabled, "config": self._config, "ram": bytes(self._ram),
                "last_was_command": self._last_was_command, "argument_of": self._argument_of, "output": self._output,
                "replies": list(self._replies), "keyboard": list(self._keyboard),
                "keyboard_argument_of": self._keyboard_argument_of, "scanning": self._scanning,
                "scan_code_set": self._scan_code_set, "last_sent": self._last_sent,
            }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        with self._lock:
            self.a20_enabled, self._config, self._ram = state["a20_enabled"], state["config"], bytearray(state["ram"])
            self._last_was_command, self._argument_of = state["last_was_command"], state["argument_of"]
            self._output = state["output"]
            self._replies, self._keyboard = deque(state["replies"]), deque(state["keyboard"])
            self._keyboard_argument_of, self._scanning = state["keyboard_argument_of"], state["scanning"]
            self._scan_code_set, self._last_sent = state["scan_code_set"], state["last_sent"]
            self._update()
