"""Debugging aids of one vCPU, shared by all who use them: breakpoint registers, single steps (KVM_SET_GUEST_DEBUG).

KVM has one setting for a vCPU (KVM API, section 4.87). Here several users keep theirs beside each other, and what KVM
is told is the sum of them.
"""

from kvmpy.abi.flags import (
    KVM_GUESTDBG_BLOCKIRQ,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP,
)
from kvmpy.errors import UsageError
from kvmpy.kvm import Vcpu

__all__ = ["DebugRegister", "GuestDebug"]

_CAP_SET_GUEST_DEBUG2 = 195
_SLOTS = 4
_KINDS = {"execute": 0, "write": 1, "access": 3}
"""DR7.R/W (SDM vol. 3, 18.2.4); 2 is for ports, which KVM does not pass on."""
_LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}
"""DR7.LEN."""


class DebugRegister:
    """What one of DR0 to DR3 watches: linear `address`, `kind` "execute", "write" or "access", `length` in bytes.

    Raises UsageError for what the processor cannot watch (SDM vol. 3, 18.2.5: aligned, and 1, 2, 4 or 8 bytes long).
    """

    __slots__ = ("address", "kind", "length")

    def __init__(self, address: int, kind: str = "execute", length: int = 1) -> None:
        if kind not in _KINDS or length not in _LENGTHS or (kind == "execute" and length != 1):
            raise UsageError(f"a debug register cannot watch {length} bytes for {kind!r}")
        if address % length or not 0 <= address < 1 << 64:
            raise UsageError(f"a debug register watches {length} bytes at a multiple of {length}, not at {address:#x}")
        self.address = address
        self.kind = kind
        self.length = length

    def dr7(self, slot: int) -> int:
        """This register's part of DR7, enabled globally."""
        return 2 << 2 * slot | (_KINDS[self.kind] | _LENGTHS[self.length] << 2) << 16 + 4 * slot


class GuestDebug:
    """The debug setting of one vCPU. Changes reach KVM with `apply`, which the vCPU's owner calls between two runs."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._registers: dict[int, DebugRegister] = {}
        self._steps: dict[object, int | None] = {}
        """Who wants KVM_RUN to come back after one instruction -> the breakpoint that it passes by that."""
        self.software = False
        """Whether INT3 in the guest is an exit."""
        self.traced = False
        """Whether a tracer wants to see every instruction. Interrupts are not held back for it: the guest shall do what
        it does without."""
        self._applied: tuple[int, ...] = (0,)
        known = vcpu.vm.check_extension(_CAP_SET_GUEST_DEBUG2)
        self._block_interrupts = known & KVM_GUESTDBG_BLOCKIRQ

    @property
    def free(self) -> int:
        """How many debug registers are free."""
        return _SLOTS - len(self._registers)

    def add(self, register: DebugRegister) -> None:
        """Watch one more address. Raises UsageError when all four registers are in use."""
        slot = next((slot for slot in range(_SLOTS) if slot not in self._registers), None)
        if slot is None:
            raise UsageError("all four debug registers are in use: remove a breakpoint, or make one in software")
        self._registers[slot] = register

    def remove(self, register: DebugRegister) -> None:
        """Stop watching."""
        self._registers = {slot: other for slot, other in self._registers.items() if other is not register}

    def hit(self, dr6: int) -> list[DebugRegister]:
        """The registers that DR6, from a Debug exit, says were hit (SDM vol. 3, 18.2.3)."""
        return [register for slot, register in self._registers.items() if dr6 >> slot & 1]

    def stops_at(self, address: int) -> bool:
        """Whether the vCPU may have to stop at an instruction at `address`, or because of what it does."""
        if self._steps or self.traced or self.software:
            return True
        return any(register.kind != "execute" or register.address == address for register in self._registers.values())

    @property
    def stepping(self) -> bool:
        """Whether KVM_RUN comes back after one instruction."""
        return bool(self._steps)

    def step(self, owner: object, *, past: int | None = None) -> None:
        """Have KVM_RUN come back after one instruction until `owner` calls `run`; interrupts wait meanwhile.

        `past`: the address of an execution breakpoint that does not stop it.
        """
        self._steps[owner] = past

    def run(self, owner: object) -> None:
        """`owner` wants no more steps."""
        self._steps.pop(owner, None)

    def apply(self) -> None:
        """Tell KVM."""
        passed = self._steps.values()
        registers = {
            slot: register
            for slot, register in self._registers.items()
            if register.kind != "execute" or register.address not in passed
        }
        control = KVM_GUESTDBG_USE_HW_BP if registers else 0
        if self._steps:
            # An interrupt that waits would otherwise make the step end in its handler.
            control |= KVM_GUESTDBG_SINGLESTEP | self._block_interrupts
        elif self.traced:
            control |= KVM_GUESTDBG_SINGLESTEP
        if self.software:
            control |= KVM_GUESTDBG_USE_SW_BP
        if control:
            control |= KVM_GUESTDBG_ENABLE
        addresses = [registers[slot].address if slot in registers else 0 for slot in range(_SLOTS)]
        dr7 = 0
        for slot, register in registers.items():
            dr7 |= register.dr7(slot)
        setting = (control, dr7, *addresses)
        # A step is always told anew: KVM remembers the RIP at which it began.
        if self._steps or self.traced or setting != self._applied:
            self._vcpu.set_guest_debug(control, addresses if registers else (), dr7 | 0x400 if registers else 0)
            self._applied = setting
