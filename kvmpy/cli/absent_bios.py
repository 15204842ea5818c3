"""What `kvmpy run` does about the BIOS that a boot sector expects and that is not there: it says so.

A real-mode guest finds its interrupt handlers in a table at address 0. On a PC the BIOS fills it; without one it is all
zeros, INT 10h jumps to address 0, and the guest runs through zeros, for ever. So each vector gets a HLT of its own:
the guest stops there, with interrupts off, and the address tells which interrupt it was.
"""

from __future__ import annotations

from kvmpy.machine.outcome import End, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.boot import Entry
    from kvmpy.machine import Machine
    from kvmpy.memory import GuestMemory
    from kvmpy.x86.registers import CpuState

__all__ = ["explained", "install"]

_VECTORS = 0x100
_TABLE_SIZE = 4 * _VECTORS
_SEGMENT = 0xF000
_OFFSET = 0xFE00
_HANDLERS = _SEGMENT * 0x10 + _OFFSET
_HLT = b"\xf4"
_INT = 0xCD  # INT n: this byte, then n
_PROTECTION_ENABLE = 1  # CR0.PE


def install(memory: GuestMemory, entry: Entry) -> bool:
    """Give all vectors a handler, for a guest that starts in real mode. False: it does not, or its image is there."""
    if entry.state.sregs.cr0 & _PROTECTION_ENABLE or memory.region_at(_HANDLERS + _VECTORS - 1) is None:
        return False
    if any(used.overlaps(0, _TABLE_SIZE) or used.overlaps(_HANDLERS, _VECTORS) for used in entry.ranges):
        return False
    for vector in range(_VECTORS):
        memory.write_u32(4 * vector, _SEGMENT << 16 | _OFFSET + vector)
    memory.write(_HANDLERS, _HLT * _VECTORS)
    return True


def explained(outcome: Outcome, machine: Machine) -> Outcome:
    """The outcome of a run after `install`: a failure that names the interrupt, where one of the handlers ended it."""
    if outcome.end is not End.HALTED:
        return outcome
    state = machine.vcpus[0].cpu_state()
    vector = state.regs.rip - 1 - _OFFSET  # RIP is behind the HLT
    if state.sregs.cs.selector != _SEGMENT or not 0 <= vector < _VECTORS or state.sregs.cr0 & _PROTECTION_ENABLE:
        return outcome
    return Outcome(End.FAILED, _message(vector, state, machine.memory), exit=outcome.exit, vcpu=outcome.vcpu)


def _message(vector: int, state: CpuState, memory: GuestMemory) -> str:
    """What happened, from the IP and CS that the interrupt pushed: behind an INT, at an instruction that faulted."""
    stack = state.sregs.ss.base + (state.regs.rsp & 0xFFFF)
    if memory.region_at(stack) is None or memory.region_at(stack + 3) is None:
        return f"interrupt {vector:#04x} has no handler"
    offset, segment = memory.read_u16(stack), memory.read_u16(stack + 2)
    behind = segment * 0x10 + offset
    if behind >= 2 and memory.region_at(behind - 1) and memory.read(behind - 2, 2) == bytes((_INT, vector)):
        place = f"at {segment:#06x}:{offset - 2 & 0xFFFF:#06x} with AX={state.regs.rax & 0xFFFF:#06x}"
        return (
            f"INT {vector:#04x} {place}, but there is no BIOS here; to print, write to port 0x3f8 (COM1) or 0xe9, or "
            "have SeaBIOS boot the image: --firmware /usr/share/seabios/bios.bin --floppy IMAGE"
        )
    return f"interrupt {vector:#04x} at {segment:#06x}:{offset:#06x} has no handler, and there is no BIOS here"
