"""Which registers of a vCPU are loaded, which are dirty, and when they travel (KVM API, section 6.12)."""

from kvmpy.abi.ioctls import KVM_GET_REGS, KVM_GET_SREGS, KVM_SET_REGS, KVM_SET_SREGS
from kvmpy.kvm.register_images import INTERRUPTS, REGS_SIZE, SREGS_SIZE
from kvmpy.kvm.run_page import (
    DIRTY_REGS,
    IMMEDIATE_EXIT,
    REGS,
    SREGS,
    SYNC_REGS,
    SYNC_SREGS,
    VALID_REGS,
    ClosedRunPage,
    RunPage,
)
from kvmpy.memory.region import host_address_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ALL", "RegisterSync"]

_VALID, _DIRTY = VALID_REGS // 8, DIRTY_REGS // 8
_CELLS = REGS // 8
_REGS_END, _SREGS_END = REGS + REGS_SIZE, SREGS + SREGS_SIZE
_BITMAP = (SREGS + INTERRUPTS) // 8

ALL = range(18)
"""The indices of all general registers in struct kvm_regs."""


class RegisterSync:
    """The register area of one vCPU: `kvm_run.s`, or private memory of the same layout where KVM does not sync.

    `check` raises when the calling thread may not touch the vCPU now; `transfer(request, address)` does a vCPU ioctl;
    `pending` says whether KVM still has to complete the instruction that caused the last exit.

    Registers written while a completion is pending are held back. Where KVM's emulator waits for the answer to a read,
    setting registers makes it forget where the answer goes, and completing writes RIP: so the instruction is completed
    first (immediate_exit makes the next KVM_RUN do only that), and then what was written takes effect over it.
    """

    __slots__ = (
        "_attempt",
        "_check",
        "_held_regs",
        "_held_sregs",
        "_page",
        "_pending",
        "_regs_loaded",
        "_sregs_loaded",
        "_sregs_wanted",
        "_transfer",
        "_u64",
        "area",
        "synced",
    )

    def __init__(
        self,
        page: RunPage,
        *,
        synced: bool,
        check: "Callable[[], None]",
        transfer: "Callable[[int, int], object]",
        pending: "Callable[[], bool]",
    ) -> None:
        self.synced = synced
        self.area = page.u8 if synced else memoryview(bytearray(0x1000))
        self._page = page
        self._u64 = page.u64 if synced else self.area.cast("Q")
        self._check = check
        self._transfer = transfer
        self._pending = pending
        self._regs_loaded = False
        self._sregs_loaded = False
        self._sregs_wanted = False
        self._attempt = b""
        self._held_regs: dict[int, int] = {}
        self._held_sregs = b""
        # From the first KVM_RUN on, the general registers are simply there.
        self._u64[_VALID] = SYNC_REGS

    # Called by the live register objects

    def need_regs(self) -> None:
        """Before the general registers are read or changed: have them all in the area."""
        self._check()
        self._load_regs()

    def _load_regs(self) -> None:
        if not self._regs_loaded:
            self._transfer(KVM_GET_REGS, self.address + REGS)
            self._regs_loaded = True
        for index, value in self._held_regs.items():
            self._u64[_CELLS + index] = value

    def need_sregs(self) -> None:
        """Before the system registers are read or changed: load them, and have KVM_RUN copy them from now on."""
        self._check()
        self._sregs_wanted = True
        self._u64[_VALID] |= SYNC_SREGS
        u64 = self._u64
        # Dirty ones are newer than the vCPU's: a KVM_RUN that failed early has not taken them.
        if not u64[_DIRTY] & SYNC_SREGS and (
            not self._sregs_loaded
            # KVM_RUN sets the bit of an interrupt that waits, and never clears one: given back to KVM with other
            # registers, an old bit would be that interrupt once more. The ioctl tells the truth.
            or u64[_BITMAP] | u64[_BITMAP + 1] | u64[_BITMAP + 2] | u64[_BITMAP + 3]
        ):
            self._transfer(KVM_GET_SREGS, self.address + SREGS)
            self._sregs_loaded = True
        if self._held_sregs:
            self.area[SREGS:_SREGS_END] = self._held_sregs

    def put(self, regs: bytes, sregs: bytes) -> None:
        """Overwrite all registers, given as struct kvm_regs and struct kvm_sregs."""
        self._check()
        self.area[REGS:_REGS_END] = regs
        self.area[SREGS:_SREGS_END] = sregs
        if self._pending():
            self.mark_regs(ALL)
            self.mark_sregs()
        else:  # the same in one step
            self._regs_loaded = self._sregs_loaded = True
            self._attempt = sregs
            self._u64[_DIRTY] = SYNC_REGS | SYNC_SREGS
            self._u64[_VALID] |= SYNC_SREGS

    def will_write(self) -> None:
        """Before all registers of a kind are overwritten: nothing needs to be loaded."""
        self._check()

    def mark_regs(self, written: "range | tuple[int, ...]") -> None:
        """The general registers in the area are complete, and those with the given indices must reach the vCPU."""
        self._regs_loaded = True
        if self._pending():
            self._held_regs.update((index, self._u64[_CELLS + index]) for index in written)
            self._page.u8[IMMEDIATE_EXIT] = 1
        else:
            self._u64[_DIRTY] |= SYNC_REGS

    def mark_sregs(self) -> None:
        """The system registers in the area are complete and must reach the vCPU."""
        self._sregs_loaded = True
        self._attempt = bytes(self.area[SREGS:_SREGS_END])  # see restore_refused
        if self._pending():
            self._held_sregs = self._attempt
            self._page.u8[IMMEDIATE_EXIT] = 1
        else:
            self._u64[_DIRTY] |= SYNC_SREGS
            self._u64[_VALID] |= SYNC_SREGS  # should this happen inside a run loop, they stay current; see before_run

    # Called by the vCPU

    @property
    def address(self) -> int:
        """Where the area is in this process."""
        return host_address_of(self.area)

    @property
    def dirty(self) -> int:
        """Which registers wait to reach the vCPU: SYNC_REGS, SYNC_SREGS. Those that are held back do not count."""
        return self._u64[_DIRTY]

    def completed(self) -> bool:
        """KVM_RUN came back with EINTR, so nothing is pending: let go of what was held back. False: there was none."""
        if not self._held_regs and not self._held_sregs:
            return False
        if self._held_regs:
            self._load_regs()
            self._u64[_DIRTY] |= SYNC_REGS
            self._held_regs = {}
        if self._held_sregs:
            self.area[SREGS:_SREGS_END] = self._attempt = self._held_sregs
            self._sregs_loaded = True
            self._u64[_DIRTY] |= SYNC_SREGS
            self._u64[_VALID] |= SYNC_SREGS
            self._held_sregs = b""
        return True

    def before_run(self) -> None:
        """Before the first entry of a run: system registers that only we wrote are not worth copying out."""
        if not self._sregs_wanted:
            self._u64[_VALID] = SYNC_REGS
            self._sregs_loaded = False

    def restore_refused(self) -> None:
        """KVM_RUN refused the system registers, and copied the old ones over them: show again what was refused.

        They stay dirty, so that the caller can put one right and run again.
        """
        self.area[SREGS:_SREGS_END] = self._attempt
        self.mark_sregs()

    def flush(self) -> None:
        """Write dirty registers to the vCPU by ioctl, for whoever looks at it other than through KVM_RUN."""
        dirty = self._u64[_DIRTY]
        if dirty & SYNC_SREGS:
            self._transfer(KVM_SET_SREGS, self.address + SREGS)
        if dirty & SYNC_REGS:
            self._transfer(KVM_SET_REGS, self.address + REGS)
        self._u64[_DIRTY] = 0

    def invalidate(self) -> None:
        """The vCPU's registers changed behind our back: load them again at the next look."""
        self._regs_loaded = self._sregs_loaded = False

    def close(self, closed: ClosedRunPage) -> None:
        """Let go of the area and of the vCPU; a look at a register raises ClosedError from now on."""
        self._check = self._transfer = self._pending = closed
        if not self.synced:  # else they are the page's
            self._u64.release()
            self.area.release()
