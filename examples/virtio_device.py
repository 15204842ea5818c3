"""A virtio device of your own: a new kind, with its driver in C, in one page.

You learn: a virtio device is a class with a device id, feature bits, a configuration structure, and `handle`, which
gets each request as bytes to read and room to write. It knows no registers, no rings and no interrupts: `VirtioMmio`
plugs it in. In the guest <kvmpy/virtio_mmio.h> finds it, agrees on features and sets up the queue. The standard lists
the ids that are taken.

Output::

    the device shifts by 13
    Uryyb, jbeyq
    Hello, world
    2 requests, 0 refused
"""

import ctypes

from kvmpy import Machine, MiB
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit, Uart16550
from kvmpy.guest.toolchain import GnuToolchain, ToolMissingError
from kvmpy.virtio import Chain, VirtioDevice, VirtioMmio, Virtqueue

LOWER_CASE_ONLY = 0  # a feature bit


class RotateConfig(ctypes.LittleEndianStructure):
    _fields_ = [("shift", ctypes.c_uint32)]


class Rotate(VirtioDevice):
    """Shifts letters: a request has a text to read and as much room for the answer."""

    name = "virtio-rotate"
    device_id = 0x8000
    queue_sizes = (16,)
    features = frozenset({LOWER_CASE_ONLY})

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.config = RotateConfig(shift)
        self.shift = shift
        self.requests = 0

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        self.requests += 1
        text = chain.read(4096)  # the guest chose the length: set a limit
        if chain.readable_left:
            self.counters["too_long"] += 1
            chain.complete(0)
            return
        chain.write(bytes(map(self.rotate, text)))
        chain.complete()

    def rotate(self, letter: int) -> int:
        for first in b"aA"[: 1 if self.has_feature(LOWER_CASE_ONLY) else 2]:
            if first <= letter < first + 26:
                return first + (letter - first + self.shift) % 26
        return letter


PROGRAM = """
#include <kvmpy/exit.h>
#include <kvmpy/serial.h>
#include <kvmpy/virtio_mmio.h>

static char memory[KVMPY_VIRTQ_BYTES(16)] __attribute__((aligned(16)));
static struct kvmpy_virtio_mmio device;
static struct kvmpy_virtq queue;
static char text[] = "Hello, world", answer[sizeof text];

static void rotate(void)
{
    struct kvmpy_buffer out = { text, sizeof text - 1 }, in = { answer, sizeof answer - 1 };

    kvmpy_virtq_add(&queue, &out, 1, &in, 1);
    kvmpy_virtq_publish(&queue);
    kvmpy_virtio_mmio_notify(&device, &queue);
    while (kvmpy_virtq_take(&queue, 0) < 0)
        kvmpy_relax();
    for (unsigned at = 0; at < sizeof text; at++)
        text[at] = answer[at];
    kvmpy_print(text);
    kvmpy_print("\\n");
}

void _start(void)
{
    if (!kvmpy_virtio_mmio_find(&device, ADDRESS, 0x8000) || !kvmpy_virtio_mmio_negotiate(&device, 0) ||
        !kvmpy_virtio_mmio_queue(&device, 0, &queue, memory, 16))
        kvmpy_exit(1);
    kvmpy_virtio_mmio_start(&device);
    kvmpy_print("the device shifts by ");
    kvmpy_print_unsigned(kvmpy_virtio_mmio_config32(&device, 0));
    kvmpy_print("\\n");
    rotate();
    rotate();
    kvmpy_exit(0);
}
"""

ADDRESS = 0xD000_0000  # machine.add(Rotate(13)) would find a free place itself

try:
    program = GnuToolchain().compile_c(PROGRAM, flags=[f"-DADDRESS={ADDRESS:#x}"])
except ToolMissingError as error:
    raise SystemExit(str(error)) from None

with Machine(memory=4 * MiB) as machine:
    console = machine.add(Uart16550())
    device = Rotate(13)
    machine.add(VirtioMmio(device, address=ADDRESS))
    machine.add(DebugExit())
    machine.load(ElfImage(program.elf))
    machine.run(timeout=10)
    print(console.text, end="")
    print(f"{device.requests} requests, {device.counters['too_long']} refused")
