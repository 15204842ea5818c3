"""Which registers of a vCPU are loaded, which are dirty, and when they travel (KVM API, section 6.12)."""

from kvmpy.abi.ioctls import KVM_GET_REGS, KVM_GET_SREGS, KVM_SET_REGS, KVM_SET_SREGS
from kvmpy.errors import ClosedError
from kvmpy.kvm.run_page import DIRTY_REGS, REGS, SREGS, SYNC_REGS, SYNC_SREGS, VALID_REGS, RunPage
from kvmpy.memory.region import host_address_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RegisterSync"]

_VALID, _DIRTY = VALID_REGS // 8, DIRTY_REGS // 8
_SREGS_END = SREGS + 312


class RegisterSync:
    """The register area of one vCPU: `kvm_run.s`, or private memory of the same layout where KVM does not sync.

    `check` raises when the calling thread may not touch the vCPU now; `transfer(request, address)` does a vCPU ioctl.
    """

    __slots__ = (
        "_attempt",
        "_check",
        "_regs_loaded",
        "_sregs_loaded",
        "_sregs_wanted",
        "_transfer",
        "_u64",
        "address",
        "area",
        "synced",
    )

    def __init__(
        self, page: RunPage, *, synced: bool, check: "Callable[[], None]", transfer: "Callable[[int, int], object]"
    ) -> None:
        self.synced = synced
        self.area = page.u8 if synced else memoryview(bytearray(0x1000))
        self.address = host_address_of(self.area)
        self._u64 = self.area.cast("Q")
        self._check = check
        self._transfer = transfer
        self._regs_loaded = False
        self._sregs_loaded = False
        self._sregs_wanted = False
        self._attempt = b""
        # From the first KVM_RUN on, the general registers are simply there.
        self._u64[_VALID] = SYNC_REGS

    # Called by the live register objects

    def need_regs(self) -> None:
        """Before the general registers are read or changed: have them all in the area."""
        self._check()
        if not self._regs_loaded:
            self._transfer(KVM_GET_REGS, self.address + REGS)
            self._regs_loaded = True

    def need_sregs(self) -> None:
        """Before the system registers are read or changed: load them, and have KVM_RUN copy them from now on."""
        self._check()
        self._sregs_wanted = True
        self._u64[_VALID] |= SYNC_SREGS
        if not self._sregs_loaded:
            self._transfer(KVM_GET_SREGS, self.address + SREGS)
            self._sregs_loaded = True

    def will_write_regs(self) -> None:
        """Before all of the general registers are overwritten: nothing needs to be loaded."""
        self._check()

    def will_write_sregs(self) -> None:
        """Before all of the system registers are overwritten."""
        self._check()

    def mark_regs(self) -> None:
        """The general registers in the area are complete and must reach the vCPU."""
        self._regs_loaded = True
        self._u64[_DIRTY] |= SYNC_REGS

    def mark_sregs(self) -> None:
        """The system registers in the area are complete and must reach the vCPU."""
        self._sregs_loaded = True
        self._attempt = bytes(self.area[SREGS:_SREGS_END])  # see restore_refused
        self._u64[_DIRTY] |= SYNC_SREGS
        self._u64[_VALID] |= SYNC_SREGS  # should this happen inside a run loop, they stay current; see before_run

    # Called by the vCPU

    @property
    def dirty(self) -> int:
        """Which registers wait to reach the vCPU: SYNC_REGS, SYNC_SREGS."""
        return self._u64[_DIRTY]

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

    def close(self, owner: str) -> None:
        """Let go of the area and of the vCPU; a look at a register raises ClosedError from now on."""

        def closed(*_: object) -> None:
            raise ClosedError(f"{owner} was used after it was closed")

        self._check = self._transfer = closed
        self._u64.release()
        if not self.synced:
            self.area.release()
