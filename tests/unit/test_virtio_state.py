"""A device is stopped in the midst of its requests, and another process finishes them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from kvmpy.memory import GuestMemory, MemoryRegion
from virtio_devices import Echo, Keeper
from virtio_driver import RAM, FakeDriver

SECOND = f"""
import ast, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from unit.test_virtio_state import file_memory
from virtio_devices import Echo
from virtio_driver import FakeDriver

echo = Echo()
driver = FakeDriver(echo, memory=file_memory(sys.argv[1]))
driver.mmio.restore(ast.literal_eval(sys.stdin.read()))
assert echo.handled == []
driver.mmio.resume()
driver.board.timers[0].call()
print(echo.handled, driver.interrupt_status)
"""


def file_memory(path: str) -> GuestMemory:
    """Guest memory that is a file, which stays when the process goes."""
    memory = GuestMemory()
    with open(path, "r+b") as file:
        memory.add(MemoryRegion.from_file(0, file.fileno(), RAM))
    return memory


def test_another_process_finishes_what_was_begun(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(RAM))
    keeper = Keeper()
    driver = FakeDriver(keeper, memory=file_memory(str(ram))).start()
    queue = driver.queues[0]
    for data in (b"one", b"two", b"three"):
        queue.add([data], [len(data)])
    queue.kick()
    keeper.answer(1)
    assert [answer for _, _, answer in queue.used()] == [b"two"]
    queue.add([b"four"], [4])  # the driver has not notified of it yet

    command = [sys.executable, "-c", SECOND, str(ram)]
    state = repr(driver.mmio.state())
    assert ast.literal_eval(state) == driver.mmio.state(), "plain data"
    done = subprocess.run(command, input=state, capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == ("[b'one', b'three', b'four'] 1\n", "")
    assert [answer for _, _, answer in queue.used()] == [b"one", b"three", b"four"]


def test_what_is_restored_can_be_saved_again_before_it_goes_on() -> None:
    driver = FakeDriver(Keeper()).start()
    driver.queues[0].add([b"one"])
    driver.queues[0].kick()
    state = driver.mmio.state()
    for _ in range(2):
        other = FakeDriver(Echo(), memory=driver.memory)
        other.mmio.restore(state)
        assert other.mmio.state() == state
        state = other.mmio.state()
