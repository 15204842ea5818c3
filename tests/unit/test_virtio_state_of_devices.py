"""Each device is stopped in mid-transfer, its process is killed, and another process finishes what was under way.

Block and network devices have theirs in test_virtio_block.py and test_virtio_net.py.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kvmpy.memory import GuestMemory, MemoryRegion
from kvmpy.virtio import Entropy, VirtioConsole, VirtioDevice, Vsock
from kvmpy.virtio.ninep.device import Plan9
from kvmpy.virtio.vsock.format import VsockOperation
from ninep_client import NinepClient
from virtio_driver import RAM, FakeDriver, FakeQueue
from vsock_guest import CID, VsockGuest

BEGINNING = """
import os, sys, threading
sys.path[:0] = [PATHS]
from test_virtio_state_of_devices import file_memory
from virtio_driver import FakeDriver

def stop(driver):
    rings = [{name: value for name, value in vars(queue).items() if name not in ("driver", "memory")}
             for queue in driver.queues]
    os.write(1, repr((driver.mmio.state(), rings)).encode())
    os.kill(os.getpid(), 9)
"""


def file_memory(path: str) -> GuestMemory:
    """Guest memory that is a file, which stays when the process goes."""
    memory = GuestMemory()
    with open(path, "r+b") as file:
        memory.add(MemoryRegion.from_file(0, file.fileno(), RAM))
    return memory


def stopped(tmp_path: Path, program: str, make: Callable[[], VirtioDevice]) -> FakeDriver:
    """Run the program in a process that ends with `stop(driver)`; a driver of the device that has taken over."""
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(RAM))
    here = Path(__file__).parent
    beginning = BEGINNING.replace("PATHS", ", ".join(repr(str(path)) for path in (here, here.parent, here.parents[1])))
    command = [sys.executable, "-c", beginning + program, str(ram), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (-9, "")
    state, rings = ast.literal_eval(done.stdout)  # plain data
    driver = FakeDriver(make(), memory=file_memory(str(ram)))
    driver.mmio.restore(state)
    driver.queues = [FakeQueue.__new__(FakeQueue) for _ in rings]
    for queue, ring in zip(driver.queues, rings, strict=True):
        vars(queue).update(ring, driver=driver, memory=driver.memory)
    return driver


def resume(driver: FakeDriver) -> None:
    """Go on, as the host input thread does it."""
    driver.mmio.resume()
    for timer in driver.board.timers:
        if timer.deadline is not None:
            timer.call()


def test_random_numbers_that_were_asked_for_come_from_another_process(tmp_path: Path) -> None:
    driver = stopped(tmp_path, """
from kvmpy.virtio import Entropy
calls = []
def source(length):
    calls.append(length)
    if len(calls) == 3:
        stop(driver)
    return b"1" * length
driver = FakeDriver(Entropy(source), memory=file_memory(sys.argv[1])).start()
for length in (1, 2, 3, 4):
    driver.queues[0].add((), [length])
driver.queues[0].kick()
""", lambda: Entropy(lambda length: b"2" * length))  # fmt: skip
    (queue,) = driver.queues
    assert [content for _, _, content in queue.used()] == [b"1", b"11"]
    resume(driver)
    assert [content for _, _, content in queue.used()] == [b"222", b"2222"]
    assert driver.request(into=[5]) == b"22222"
    driver.mmio.close()


def test_a_console_goes_on_in_another_process(tmp_path: Path) -> None:
    console = VirtioConsole(channels=["agent"])
    driver = stopped(tmp_path, """
import struct
from kvmpy.virtio import VirtioConsole
def sink(data):
    if data == b"twothree":  # what waits is printed in one piece
        stop(driver)
console = VirtioConsole(channels=["agent"], sink=sink)
driver = FakeDriver(console, memory=file_memory(sys.argv[1])).start()
receive, transmit, told, tell, receive_1, transmit_1 = driver.queues
for message in ((0, 0, 1), (0, 3, 1), (1, 3, 1), (0, 6, 1), (1, 6, 1)):
    tell.add([struct.pack("<IHH", *message)])
tell.kick()
receive.add((), [4])
receive.kick()
console.send(b"typed in one go")
console.channel("agent").send(b"for the agent")
for lines in ([b"one"], [b"two", b"three"]):
    for line in lines:
        transmit.add([line])
    transmit.kick()
""", lambda: console)  # fmt: skip
    receive, transmit, told, _, receive_1, _ = driver.queues
    assert [content for _, _, content in receive.used()] == [b"type"]
    assert [length for _, length, _ in transmit.used()] == [0]  # of the first
    resume(driver)
    assert len(transmit.used()) == 2
    assert console.output == b"twothree"  # that the first process had printed them only it knows
    for queue in (receive, receive_1):
        queue.add((), [64])
        queue.kick()
    assert [content for _, _, content in receive.used()] == [b"d in one go"]
    assert [content for _, _, content in receive_1.used()] == [b"for the agent"]
    for _ in range(8):
        told.add((), [32])
    told.kick()
    events = [content[4] for _, _, content in told.used()]
    assert events == [1, 1, 4, 5, 6, 7, 6]  # added twice; console, size, open; name, open
    driver.mmio.close()


def test_a_guest_connects_again_when_its_streams_have_gone_with_a_process(tmp_path: Path) -> None:
    vsock = Vsock(3)
    driver = stopped(tmp_path, """
from kvmpy.virtio import Vsock
from kvmpy.virtio.vsock.format import VsockOperation
from vsock_guest import CID, VsockGuest
device = Vsock(CID)
driver = FakeDriver(device, memory=file_memory(sys.argv[1])).start(size=16)
guest = VsockGuest(device, buffers=2, driver=driver)
guest.events.add((), [4])
guest.events.kick()
listener = device.listen(50)
assert guest.connect(50) == "RESPONSE"
sock, _ = listener.accept(5)
sock.sendall(b"x" * 100_000)
guest.packets(again=False)
guest.send(VsockOperation.RW, 1000, 50, b"half of it", buffer=1 << 20)
guest.transmit.add([b"cut off"])  # of which the device does not know yet
driver.mmio.quiesce()
stop(driver)
""", lambda: vsock)  # fmt: skip
    guest = VsockGuest(vsock, buffers=0, driver=driver)
    resume(driver)
    assert [content for _, _, content in guest.events.used()] == [bytes(4)]  # VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
    assert vsock.counters["short_packet"] == 1
    guest.transmit.used()
    guest.packets()
    guest.offer(4)
    guest.send(VsockOperation.RW, 1000, 50, b"the other half")
    assert guest.names() == ["RST"]
    with vsock.listen(50) as listener:
        assert guest.connect(50) == "RESPONSE"
        sock, address = listener.accept(5)
    with sock:
        assert address == (CID, 1000)
        guest.send(VsockOperation.RW, 1000, 50, b"all of it")
        assert sock.recv(100) == b"all of it"
        sock.sendall(b"answer")
        assert [packet.data for packet in guest.packets()] == [b"answer"]
    driver.mmio.close()


def test_files_of_a_shared_folder_are_written_to_their_end_by_another_process(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    device = Plan9(tmp_path / "shared")
    driver = stopped(tmp_path, """
import time
from struct import pack
from kvmpy.virtio.ninep.messages import HEADER, MessageType
from kvmpy.virtio.ninep.device import Plan9
from ninep_client import NinepClient
never, real = threading.Event(), os.pwritev
def pwritev(fd, views, offset, *flags):
    if offset >= 1000:
        real(fd, [bytes(views[0][:10])], offset)  # a part is written, and there it ends
        in_midst.set()
        never.wait()
    return real(fd, views, offset, *flags)
in_midst, os.pwritev = threading.Event(), pwritev
device = Plan9(sys.argv[2] + "/shared")
driver = FakeDriver(device, memory=file_memory(sys.argv[1])).start()
client = NinepClient(device, driver=driver)
client.version()
client.attach()
file = client.create(client.walk(), b"file", os.O_RDWR)
client.write(file, b"a" * 1000)
def add(offset, data):
    body = pack("<IQI", file, offset, len(data)) + data
    driver.queues[0].add([HEADER.pack(7 + len(body), MessageType.TWRITE, offset // 1000) + body], [64])
add(1000, b"b" * 1000)
driver.queues[0].kick()
assert in_midst.wait(20)
add(2000, b"c" * 1000)  # of which the device does not know yet
stop(driver)
""", lambda: device)  # fmt: skip
    path = tmp_path / "shared" / "file"
    assert path.read_bytes() == b"a" * 1000 + b"b" * 10
    assert len(driver.mmio.state()["device"]["queues"][0]["in_flight"]) == 1
    client = NinepClient(device, driver=driver)
    resume(driver)
    assert [answer[4] for answer in client.wait(2)] == [119, 119]  # Rwrite
    assert path.read_bytes() == b"a" * 1000 + b"b" * 1000 + b"c" * 1000
    assert client.read(1, 1995, 10) == b"b" * 5 + b"c" * 5  # its fid was opened by the process before
    driver.mmio.close()
