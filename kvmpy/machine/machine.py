"""A machine: a VM with memory, processors, and devices plugged in, that runs until the guest ends."""

import os
import threading
from contextlib import ExitStack

from kvmpy._exit import Exit
from kvmpy.devices.device import Device, InterruptLine, Region
from kvmpy.errors import ClosedError, UsageError
from kvmpy.kvm import Kvm, Vcpu, Vm
from kvmpy.machine.board import MachineBoard
from kvmpy.machine.bus import Bus
from kvmpy.machine.cpu_model import CpuModel
from kvmpy.machine.device_lock import as_it_is, one_at_a_time
from kvmpy.machine.host_events import HostEvents
from kvmpy.machine.interrupts import check_not_in_kernel
from kvmpy.machine.run_control import RunControl
from kvmpy.machine.running import Running, join
from kvmpy.machine.vcpu_runner import VcpuRunner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Any, Self, TypeVar

    from kvmpy.boot.image import Entry, Image, RomMapping
    from kvmpy.devices.console_output import ConsoleOutput
    from kvmpy.devices.device import ReadHandler, WriteHandler
    from kvmpy.devices.host_input import HostInput
    from kvmpy.machine.cpu_model import Cpu
    from kvmpy.machine.host_timer import HostTimer
    from kvmpy.machine.outcome import Outcome
    from kvmpy.memory import GuestMemory
    from kvmpy.virtio.device import VirtioDevice

    D = TypeVar("D", bound=Device | VirtioDevice)

__all__ = ["Machine"]

RAM_HOLE = 0xC000_0000
"""RAM ends here and goes on at 4 GiB: PCI, APICs and firmware live in between, as on a PC."""
_FOUR_GIB = 1 << 32
_IDENTITY_MAP = 0xFEFF_C000
_TSS = 0xFEFF_D000  # three pages; both lie where no PC has memory, below a 16 MiB firmware


class Machine(Running):
    """A VM with `memory` bytes of RAM from address 0 and `vcpus` processors.

    With `irqchip` (the default) it has a PC's interrupt controllers and timer inside KVM: PICs, IOAPIC, local APICs,
    PIT; processors other than the first wait for INIT and SIPI. Without, HLT ends the run at once and devices cannot
    interrupt.

    `cpu` is what the processors are: "host", all that the host supports; "portable" or "plain"; a
    `kvmpy.x86.cpu_templates.CpuTemplate`, or a dict that describes one; or a `kvmpy.x86.cpuid.CpuidTable`, which is
    taken as it is but for APIC ids.

    `rom` is what of the image to come lies beside RAM, `image.memory_needs()`. `load` maps it otherwise, for which KVM
    makes it wait some ticks of the host's clock.

    Plug devices in with `add`, `map_ports` and `map_mmio`, load an image with `load`, and `run`.
    `vm`, `vcpus` and `memory` are the things below it.
    """

    def __init__(
        self,
        memory: int = 16 << 20,
        vcpus: int = 1,
        *,
        irqchip: bool = True,
        cpu: "Cpu" = "host",
        kvm: Kvm | None = None,
        rom: "Iterable[RomMapping]" = (),
    ) -> None:
        if not isinstance(vcpus, int) or vcpus < 1:
            raise UsageError(f"a machine needs at least one vCPU, not {vcpus!r}")
        if not isinstance(memory, int):
            raise UsageError(f"memory is a number of bytes, such as 16 * MiB, not {memory!r}")
        self._cpu = CpuModel(cpu)
        self._owns_kvm = kvm is None
        self.kvm = kvm if kvm is not None else Kvm()
        self.ports = Bus("port", 1 << 16)
        self.mmio = Bus("mmio", 1 << 52)
        self.devices: list[Device] = []
        self.entry: Entry | None = None
        self._control = RunControl()
        self._host_events = HostEvents()
        self._threads: list[threading.Thread] = []
        self._rom = list(rom)
        """What is mapped already of the image that will be loaded."""
        self._runners: list[VcpuRunner] = []
        self._guard = one_at_a_time() if vcpus > 1 else as_it_is
        self._closed = False
        self._pid = os.getpid()
        try:
            self.vm: Vm = self.kvm.create_vm()
        except BaseException:
            if self._owns_kvm:
                self.kvm.close()
            raise
        self.board = MachineBoard(self.vm, self._control, self._host_events, self.mmio)
        """What devices are plugged into."""
        try:
            if vcpus > self.kvm.max_vcpus:
                raise UsageError(f"this host's KVM gives a VM at most {self.kvm.max_vcpus} vCPUs, not {vcpus}")
            # Memory first: with interrupt controllers KVM's changes of memory wait for some ticks of the host's clock.
            self.vm.add_ram(0, size=min(memory, RAM_HOLE))
            if memory > RAM_HOLE:
                self.vm.add_ram(_FOUR_GIB, size=memory - RAM_HOLE)
            for mapping in self._rom:
                self._map(mapping)
            if irqchip:
                self.vm.set_identity_map_address(_IDENTITY_MAP)
                self.vm.set_tss_address(_TSS)
                self.vm.create_irqchip()
                self.vm.create_pit()
            self._runners = [self._create_runner(vcpus) for _ in range(vcpus)]
        except BaseException:
            self.close()
            raise

    def _create_runner(self, count: int) -> VcpuRunner:
        vcpu = self.vm.create_vcpu()
        self._cpu.set_up(vcpu, count, bool(self.vm.irqchip))
        return VcpuRunner(vcpu, self._control, self.ports, self.mmio, self._guard)

    def close(self) -> None:
        """Stop the guest, close devices, VM and threads. Guest memory that is still viewed stays valid.

        Waits for handlers to return; raises UsageError in one of them. All is closed even if closing a device fails,
        which raises what it raises.
        """
        if self._closed:
            return
        if os.getpid() == self._pid:  # in a child of fork there are neither the threads nor whoever held their locks
            if self._control.called_from_the_run():
                raise UsageError("a device handler cannot close the machine that waits for its answer; stop() it")
            self._control.close()
            join(self._threads)
            if self._closed:  # by another thread meanwhile
                return
        self._closed = True
        self._control.verdict = None
        for runner in self._runners:
            runner.loop.detach()
        with ExitStack() as last_to_first:
            if self._owns_kvm:
                last_to_first.callback(self.kvm.close)
            last_to_first.callback(self.vm.close)
            for device in self.devices:
                last_to_first.callback(device.close)
            last_to_first.callback(self._host_events.close)

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "running" if self._control.running else "stopped"
        return f"<Machine {len(self.vcpus)} vCPUs, {self.memory!r}, {state}>"

    # What it is made of

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """The processors; the first one boots."""
        return self.vm.vcpus

    @property
    def memory(self) -> "GuestMemory":
        """Guest-physical memory."""
        return self.vm.memory

    def add(self, device: "D") -> "D":
        """Plug a device in at the ports and addresses it declares, and answer it.

        A virtio device, such as `kvmpy.virtio.Entropy()`, is plugged in behind virtio-mmio, at an address and an
        interrupt that are free; `VirtioMmio(device, address=..., irq=...)` chooses them.

        Raises OverlapError naming both owners of a range that is taken, UsageError for a device plugged in already.
        """
        if self._closed:
            raise ClosedError("the machine is closed")
        plugged: Any = device
        if not isinstance(device, type) and hasattr(device, "as_device"):
            plugged = device.as_device()
        if isinstance(plugged, type) or not hasattr(plugged, "regions"):
            raise UsageError(f"add() takes a device, such as Uart16550(), not {device!r}")
        if any(plugged is other for other in self.devices):
            raise UsageError(f"{plugged.name} is plugged in already")
        if isinstance(plugged, Device):
            plugged.place(self.board)
        added: list[Region] = []
        try:
            for region in plugged.regions():
                self._claim(region)
                added.append(region)
            plugged.attach(self.board)
        except BaseException:
            for region in added:
                self._bus(region).remove(region)
            raise
        self.devices.append(plugged)
        return device

    def map_ports(
        self, first: int, count: int, *, read: "ReadHandler | None" = None, write: "WriteHandler | None" = None,
        name: str = "ports", width: int = 8,
    ) -> Region:  # fmt: skip
        """Answer `count` ports from `first` on with `read(offset, size) -> int` and `write(offset, size, value)`.

        Without `read`, reads give all ones; without `write`, writes are lost. `width` is the widest access taken at
        once.
        """
        return self._claim(Region("port", first, count, name, read, write, width=width))

    def map_mmio(
        self, address: int, size: int, *, read: "ReadHandler | None" = None, write: "WriteHandler | None" = None,
        name: str = "mmio", width: int = 8,
    ) -> Region:  # fmt: skip
        """Answer guest-physical addresses as `map_ports` does ports. RAM is refused: accesses to it are no exits."""
        return self._claim(Region("mmio", address, size, name, read, write, width=width))

    def _bus(self, region: Region) -> Bus:
        return self.ports if region.kind == "port" else self.mmio

    def _claim(self, region: Region) -> Region:
        bus = self._bus(region)
        bus.check(region)
        if self.vm.irqchip:
            check_not_in_kernel(region)
        if bus is self.mmio:
            self.memory.check_free(region.start, region.length, region)
        bus.add(region)
        return region

    def interrupt_line(self, number: int) -> InterruptLine:
        """A line to interrupt input `number` (a GSI: 0 to 15 are the ISA IRQs) of the in-kernel controllers.

        Several lines to one input are a wired OR. Without an irqchip the line leads nowhere.
        """
        return self.board.interrupt_line(number)

    @property
    def host_errors(self) -> "list[tuple[HostInput | HostTimer, Exception]]":
        """Input sources that were dropped because reading them failed, timers whose call failed, and why."""
        return self._host_events.errors

    def listen(self, source: "HostInput") -> None:
        """Have the host input thread call `source.ready()` whenever its descriptor can be read."""
        self._host_events.add(source)

    def load(self, image: "Image") -> "Entry":
        """Put an image into memory and set the first processor to its start. Raises ImageError when it does not fit.

        A kernel of an operating system gets tables that describe the machine, so devices are to be added before, and
        processors as a firmware leaves them (`kvmpy.machine.firmware_settings`).
        """
        if not hasattr(image, "memory_needs"):
            raise UsageError(f"load() takes an image, such as FlatImage(...) or ElfImage(...), not {image!r:.60}")
        self.vcpus[0].check_idle()  # before anything is written below a running guest
        for mapping in image.memory_needs():
            if mapping in self._rom:
                self._rom.remove(mapping)
            else:
                self._map(mapping)
        if getattr(image, "takes_tables", False):
            from kvmpy.machine.platform_tables import load_with_tables

            self.entry = load_with_tables(self, image)  # type: ignore[arg-type]
        else:
            self.entry = image.load(self.memory)
        self.image, self._symbols, self._lines = image, None, None
        for runner in self._runners:
            runner.runs_ring_0_directly = getattr(image, "code_is_apart", False)
        self._runners[0].start_at(self.entry.state)
        if hasattr(image, "takes_tables"):  # a kernel, which no firmware starts here
            from kvmpy.machine.firmware_settings import set_as_firmware

            set_as_firmware(self.vm, self._cpu.msrs)
        return self.entry

    def _map(self, mapping: "RomMapping") -> None:
        if mapping.read_only:
            self.vm.add_rom(mapping.address, mapping.data, name=mapping.name)
        else:
            self.vm.add_ram(mapping.address, size=len(mapping.data), name=mapping.name)
            self.memory.write(mapping.address, mapping.data)

    def watch_for_panic(
        self, console: "ConsoleOutput", message: bytes = b"Kernel panic - not syncing", *,
        last: bytes = b"---[ end Kernel panic", patience: float = 2.0,
    ) -> None:  # fmt: skip
        """End the run as a panic when the guest prints a line with `message` on `console`; by default, as Linux does.

        The lines that explain it are waited for: up to one with `last`, or until none has come for `patience` seconds.
        `Outcome.message` is the first of them, `Outcome.console` the last lines of all. See `PanicWatch`.
        """
        from kvmpy.machine.panic_watch import PanicWatch

        PanicWatch(self.board, self._control, console, message, last, patience)

    def on_exit(self, kind: type[Exit], handler: "Callable[[Vcpu, Any], Outcome | None]") -> None:
        """Call `handler(vcpu, exit)` for exits of a class that no device answers, such as `RdMsr` or `Debug`.

        It answers None to let the guest go on, or an `Outcome` to end the run. Unlike a device's, the handlers of
        several processors may be at work at the same time.
        """
        if not (isinstance(kind, type) and issubclass(kind, Exit)) or not callable(handler):
            raise UsageError(f"on_exit() takes a class of kvmpy.exits and a function, not {kind!r} and {handler!r}")
        for runner in self._runners:
            runner.exit_handlers[kind] = handler
