"""The registers of a vCPU, and the states that it can start in."""

from kvmpy.errors import UsageError
from kvmpy.kvm.live_registers import LiveRegisters, LiveSystemRegisters
from kvmpy.kvm.register_images import general_image, system_image
from kvmpy.kvm.vcpu_state import VcpuState
from kvmpy.x86.registers import GENERAL_REGISTERS, CpuState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmpy.kvm.register_sync import RegisterSync
    from kvmpy.x86.page_walk import Walk

__all__ = ["VcpuRegisters"]

_RUNNABLE = 0  # KVM_MP_STATE_RUNNABLE
_BOOT_PROCESSOR = 1 << 8
"""IA32_APIC_BASE.BSP (SDM vol. 3, 10.4.4)."""

_last_states: "dict[tuple[object, ...], tuple[bytes, bytes]]" = {}
"""What was asked for -> struct kvm_regs and struct kvm_sregs; see `VcpuRegisters._start`."""
_STATES_REMEMBERED = 8
_PLAIN = frozenset((str, bool, int, type(None)))


def _images(state: CpuState) -> tuple[bytes, bytes]:
    """struct kvm_regs and struct kvm_sregs."""
    return general_image([getattr(state.regs, name) for name in GENERAL_REGISTERS]), system_image(state.sregs)


class VcpuRegisters(VcpuState):
    """Live registers and entry states. Mixed into `Vcpu`."""

    _sync: "RegisterSync"
    _regs: LiveRegisters | None = None  # both are made when somebody asks for them
    _sregs: LiveSystemRegisters | None = None

    def _check_access(self) -> None:
        """Raise unless the calling thread may use the vCPU now."""
        raise NotImplementedError

    @property
    def regs(self) -> LiveRegisters:
        """General registers, RIP and RFLAGS, live. Changes reach the vCPU with the next run.

        `copy()` gives a plain value that stays as it is, `assign(value)` takes one back.
        """
        self._check_access()
        regs = self._regs
        if regs is None:
            regs = self._regs = LiveRegisters(self._sync)
        return regs

    @property
    def sregs(self) -> LiveSystemRegisters:
        """Segments, descriptor tables, control registers, EFER, APIC base, live."""
        self._check_access()
        sregs = self._sregs
        if sregs is None:
            sregs = self._sregs = LiveSystemRegisters(self._sync)
        return sregs

    def _drop_registers(self) -> None:
        """Have them let go of the vCPU's mapping: the vCPU is closed."""
        for registers in (self._regs, self._sregs):
            if registers is not None:
                registers.drop()

    def cpu_state(self) -> CpuState:
        """A plain copy of `regs` and `sregs`: what the entry rules and the modes of `kvmpy.x86` work on."""
        return CpuState(self.regs.copy(), self.sregs.copy())

    def set_cpu_state(self, state: CpuState) -> None:
        """Take over all registers of `state`. On a processor other than the first, it is also made runnable."""
        self._put(*_images(state))

    def set_real_mode(
        self,
        entry: int = 0,
        *,
        segment: int | None = None,
        offset: int = 0,
        data_segment: int | None = None,
        stack: int | None = None,
    ) -> None:
        """Start in real mode at linear address `entry`, or at `segment:offset`; see `kvmpy.x86.modes.real_mode`."""
        self._start("real_mode", entry, segment=segment, offset=offset, data_segment=data_segment, stack=stack)

    def set_protected_mode(self, entry: int, *, bits: int = 32, stack: int | None = None, ring: int = 0) -> None:
        """Start in flat protected mode without paging, `bits` 32 or 16; see `kvmpy.x86.modes.protected_mode`."""
        self._start("protected_mode", entry, bits=bits, stack=stack, ring=ring)

    def set_long_mode(
        self, entry: int, *, cr3: int | None = None, tables: int | None = None, stack: int | None = None, ring: int = 0
    ) -> None:
        """Start in 64-bit mode, in ring 0 or 3.

        With `cr3`, the guest's own page tables are used, see `kvmpy.x86.modes.long_mode`. With `tables`, a
        guest-physical scratch address, a GDT, a TSS and page tables that map all RAM one to one are written there, see
        `kvmpy.x86.long_mode.prepare`.
        """
        if (cr3 is None) == (tables is None):
            raise UsageError("set_long_mode needs cr3=, page tables of your own, or tables=, where to build some")
        if cr3 is not None:
            self._start("long_mode", entry, cr3=cr3, stack=stack, ring=ring)
        else:
            from kvmpy.x86.long_mode import prepare

            state = prepare(self.vm.memory, entry=entry, tables=tables or 0, stack=stack, ring=ring)
            self._put(*_images(self._for_this_processor(state)))

    def walk(self, virtual_address: int) -> "Walk":
        """Walk the guest's page tables for an address, in whichever paging mode the vCPU is, and say what is there.

        `.physical` is where it leads, `.failure` why it does not; see `kvmpy.x86.page_walk.walk`.
        """
        from kvmpy.x86.page_walk import walk

        return walk(self.vm.memory, self.sregs.copy(), virtual_address)

    def _start(self, mode: str, entry: int, **more: int | None) -> None:
        """Take over an entry state, made by the function `mode` of `kvmpy.x86.modes` or remembered from the last time.

        VMs that come and go usually all start alike, and to make a state takes 30 us.
        """
        asked = (mode, self.id == 0, entry, *more.values())
        can_remember = _PLAIN.issuperset(map(type, asked))  # 4096.0 equals 4096, but is refused
        images = _last_states.get(asked) if can_remember else None
        if images is None:
            from kvmpy.x86 import modes

            make: Callable[..., CpuState] = getattr(modes, mode)
            images = _images(self._for_this_processor(make(entry, **more)))
            if can_remember:
                if len(_last_states) >= _STATES_REMEMBERED:
                    _last_states.clear()
                _last_states[asked] = images
        self._put(*images)

    def _for_this_processor(self, state: CpuState) -> CpuState:
        """An entry state, which is written for the boot processor."""
        if self.id:
            state.sregs.apic_base &= ~_BOOT_PROCESSOR
        return state

    def _put(self, regs: bytes, sregs: bytes) -> None:
        self._sync.put(regs, sregs)
        # With an in-kernel irqchip every processor but the first waits for INIT and SIPI, and a halted one for an
        # interrupt, inside KVM (KVM API, section 4.38).
        if self.vm.irqchip:
            self.set_mp_state(_RUNNABLE)
