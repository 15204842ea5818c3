"""A split virtqueue, seen from the device (virtio 1.2, section 2.7).

What orders the accesses
------------------------
Guest and device share the rings without a lock, on two processors at the same time. Each number in them is read and
written as a whole, by one machine instruction: a memoryview cast to "H" copies two aligned bytes. x86 keeps loads in
order, and stores in order (SDM vol. 3, section 9.2.2), and the interpreter makes one access after the other, so "the
elements first, then the index" (2.7.8.2) and "the index first, then the entries" (2.7.13) hold by themselves.

One order x86 does not keep: a load may be done before an *earlier store* to another address is visible to others. The
device has two such pairs, each the mirror of one in the driver (2.7.7.2, 2.7.10 and 2.7.13.4.1):

* it publishes the used index, then reads whether the driver wants an interrupt. The driver asks for one, then looks
  whether something was used. Were both loads done early, nobody would notify: the driver would wait for ever.
* it asks to be notified, then looks whether something became available.

Between the two must be a full barrier. Python has no fence, but taking a lock is one: every way to take a lock on x86
is a `lock`-prefixed instruction or XCHG, and these wait until all earlier stores are visible (SDM vol. 3, 9.2.3.9;
CPython's locks are POSIX semaphores, whose `sem_trywait` is LOCK CMPXCHG, and from 3.13 on its own mutexes, which are
too). The lock of the barrier belongs to the queue and is taken by nobody else, so it never waits; it costs 40 ns. The
device's own lock would not do: it was taken before the store. kvmpy runs on x86 only; elsewhere, where taking a lock
is only an acquire, this would need more.
"""

from __future__ import annotations

from _thread import allocate_lock
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from kvmpy.errors import UsageError
from kvmpy.virtio.chain import Chain
from kvmpy.virtio.descriptors import MalformedChain, read_chain
from kvmpy.virtio.guest_buffers import GuestBuffers

if TYPE_CHECKING:
    from kvmpy.memory import GuestMemory
    from kvmpy.virtio.device import VirtioDevice

__all__ = ["MAX_SIZE", "Virtqueue"]

T = TypeVar("T")

MAX_SIZE = 32768
"""Section 2.7: the size of a split virtqueue is a power of 2, at most 32768."""

BATCH = 1024
"""Chains that are handled for one notification. A guest that adds them as fast as they are handled must not keep a
thread for ever: the host input thread goes on, after the other devices."""

_NO_NOTIFY = 1  # VIRTQ_USED_F_NO_NOTIFY, section 2.7.10
_NO_INTERRUPT = 1  # VIRTQ_AVAIL_F_NO_INTERRUPT, section 2.7.7


MOST_PEEKED = 64
"""Chains that `Virtqueue.peek` answers."""


class Batch:
    """The context of `Virtqueue.batch`. It may be entered again within itself."""

    __slots__ = ("_queue",)

    def __init__(self, queue: Virtqueue) -> None:
        self._queue = queue

    def __enter__(self) -> None:
        self._queue.begin_batch()

    def __exit__(self, *_: object) -> None:
        self._queue.end_batch()


class Virtqueue:
    """Queue `index` of a device, with room for at most `size_max` entries.

    A device gets its chains by `handle`, or takes them itself with `take`; whatever is completed within one `batch`
    interrupts the driver once at most. All methods may be called from any thread; they take the device's lock.
    """

    def __init__(self, device: VirtioDevice, index: int, size_max: int) -> None:
        if not 0 < size_max <= MAX_SIZE or size_max & size_max - 1:
            raise UsageError(f"a virtqueue has a power of 2 of entries, at most {MAX_SIZE}, not {size_max!r}")
        self.device = device
        self.index = index
        self.size_max = size_max
        self.size = size_max
        self.addresses = (0, 0, 0)
        """Descriptor table, available ring ("driver area"), used ring ("device area")."""
        self.ready = False
        """Whether the driver has set the queue up (QueueReady)."""
        self.open = False
        """Whether the device may use it now: it is ready, and the device runs."""
        self._barrier = allocate_lock()
        self._in_flight: dict[Chain, int | None] = {}
        """Chains that were taken and not given back, in that order; with in-order use, those that are done, too."""
        self._batches = 0
        self._batch = Batch(self)
        self.reset()

    def reset(self) -> None:
        """Back to the state after a reset of the device (section 2.6.1 for one queue). Chains in flight are void."""
        self.ready = self.open = False
        self.size = self.size_max
        self.addresses = (0, 0, 0)
        self._table = self._available = self._used = self._elements = memoryview(b"")
        self._next = self._seen = 0  # indexes into the available ring: to be taken next, and seen so far
        self._put = self._published = 0  # indexes into the used ring
        self._event_idx = self._indirect = self._in_order = False
        self._silent = False  # VIRTQ_USED_F_NO_NOTIFY is set
        self._in_flight.clear()
        self._again: list[int] = []  # heads of chains that were in flight when the state was saved

    def set_up(self, memory: GuestMemory, size: int, addresses: tuple[int, int, int]) -> bool:
        """Take the rings into use. False: the size is wrong, or a ring is misaligned or not in RAM."""
        if not 0 < size <= self.size_max or size & size - 1:
            return False
        self._buffers = GuestBuffers(memory)
        ring = self._buffers.ring
        table = ring(addresses[0], 16 * size, 16)
        available = ring(addresses[1], 6 + 2 * size, 2)
        used = ring(addresses[2], 6 + 8 * size, 4, writable=True)
        if table is None or available is None or used is None:
            return False
        # The views stay: a driver that writes other addresses into the registers later does not move the rings.
        self._table = table
        self._available = available.cast("H")  # flags, idx, ring[size], used_event
        self._used = used.cast("H")  # flags, idx, then elements, then avail_event
        self._elements = used[4 : 4 + 8 * size].cast("I")  # le32 id; le32 len
        self._avail_event = 2 + 4 * size
        self.size, self._mask, self.addresses = size, size - 1, addresses
        self._next = self._seen = self._put = self._published = 0
        self._silent = False
        self.ready = True
        return True

    def negotiated(self, *, event_idx: bool, indirect: bool, in_order: bool) -> None:
        """What driver and device agreed on."""
        self._event_idx, self._indirect, self._in_order = event_idx, indirect, in_order

    @property
    def in_flight(self) -> int:
        """How many chains the device has taken and not given back."""
        return len(self._in_flight)

    # --- taking chains ----------------------------------------------------------------------------------------------

    def take(self) -> Chain | None:
        """The next chain that the driver made available. None: there is none, and the driver will notify of the next.

        What is malformed leads to DEVICE_NEEDS_RESET, and from then on there is none either.
        """
        with self.device.lock:
            return self._take()

    def _take(self) -> Chain | None:
        """`take`, with the lock held."""
        if not self.open:
            return None
        try:
            if self._again:
                chain = self._chain(self._again[0])
                del self._again[0]
            else:
                position = self._next
                if position == self._seen and not self._look():
                    return None
                chain = self._chain(self._available[2 + (position & self._mask)])
                self._next = position + 1 & 0xFFFF
        except MalformedChain as malformed:
            self.device.needs_reset(malformed.rule)
            return None
        self._in_flight[chain] = None
        return chain

    def _chain(self, head: int) -> Chain:
        return Chain(self, head, *read_chain(self._table, self.size, head, self._buffers, self._indirect))

    def _look(self) -> bool:
        """Whether the driver has made more available. If not, it has been asked to notify of the next (2.7.10)."""
        index = self._available[1]
        if index == self._next:
            if self._event_idx:
                self._used[self._avail_event] = index  # 2.7.10.1: notify when you write entry `index`
            elif self._silent:
                self._used[0] = 0
                self._silent = False
            with self._barrier:
                pass
            index = self._available[1]
            if index == self._next:
                return False
        # Each entry and each chain in flight takes a descriptor of its own, so there are never more (2.7.13.1).
        if (index - self._next & 0xFFFF) + len(self._in_flight) > self.size:
            raise MalformedChain("available_index")
        self._seen = index
        if not self._event_idx and not self._silent:
            self._used[0] = _NO_NOTIFY  # 2.7.10: we look again before we stop
            self._silent = True
        return True

    def peek(self, read: Callable[[memoryview, int, list[int], GuestBuffers, bool], list[T]]) -> list[T]:
        """The next chains, as far as they are of the usual shape: `read` is `read_three_buffers`, or its like. They are
        not taken, and `use` can complete them as they are; with the device's lock held all the time."""
        if not self.open or self._again or self._in_order:
            return []
        try:
            if not self._look():
                return []
        except MalformedChain as malformed:
            self.device.needs_reset(malformed.rule)
            return []
        available, mask, position = self._available, self._mask, self._next
        waiting = self._seen - position & 0xFFFF
        heads = [available[2 + (at & mask)] for at in range(position, position + min(waiting, MOST_PEEKED))]
        return read(self._table, self.size, heads, self._buffers, self._indirect)

    @property
    def ram(self) -> memoryview:
        """What the numbers of `peek` are places in."""
        return self._buffers.look()[2]

    def use(self, answers: list[tuple[int, int]]) -> None:
        """Take as many chains, the next ones, and complete them: their heads, and how many bytes were written."""
        put, mask, elements = self._put, self._mask, self._elements
        for head, written in answers:
            slot = 2 * (put & mask)
            elements[slot] = head
            elements[slot + 1] = written
            put += 1
        self._next = self._next + len(answers) & 0xFFFF
        self._put = self._used[1] = put & 0xFFFF  # after the elements: see `_put_used`

    def put_back(self, chain: Chain) -> None:
        """Undo the last `take`: the chain will be taken again. Raises UsageError for any other chain."""
        with self.device.lock:
            if chain not in self._in_flight:  # the device was reset meanwhile
                return
            if next(reversed(self._in_flight)) is not chain:
                raise UsageError("put_back() takes the chain that was taken last")
            del self._in_flight[chain]
            chain.done = True
            if self._again or self._available[2 + (self._next - 1 & self._mask)] != chain.head:
                self._again.insert(0, chain.head)
            else:
                self._next = self._next - 1 & 0xFFFF

    def run(
        self, handle: Callable[[Virtqueue, Chain], object], quick: Callable[[Virtqueue], int] | None = None
    ) -> None:
        """Call `handle(queue, chain)` for all chains that are available, as one batch.

        Before each, `quick(queue)` may answer some that are next, with `peek` and `use`, and says how many; after
        BATCH of both, the host input thread goes on later.
        A chain whose `handle` raised is put back; what was raised comes out.
        """
        with self.batch():
            left = BATCH
            while left > 0:
                if quick is not None and (done := quick(self)):
                    left -= done
                    continue
                left -= 1
                chain = self._take()
                if chain is None:
                    return
                try:
                    handle(self, chain)
                except BaseException:
                    if next(reversed(self._in_flight), None) is chain:
                        self.put_back(chain)
                    raise
        self.device.transport.process_later(self)

    # --- giving them back -------------------------------------------------------------------------------------------

    def batch(self) -> Batch:
        """Within this context the device's lock is held; at its end the driver is interrupted, if it wants that."""
        return self._batch

    def begin_batch(self) -> None:
        """What `with queue.batch():` does first."""
        self.device.lock.acquire()
        self._batches += 1

    def end_batch(self) -> None:
        """What it does at the end."""
        try:
            self._batches -= 1
            if not self._batches:
                self._publish()
        finally:
            self.device.lock.release()

    def complete(self, chain: Chain, written: int) -> None:
        """`Chain.complete` does it."""
        device = self.device
        with device.lock:
            if chain.done:
                raise UsageError(f"{chain!r} was completed already")
            chain.done = True
            in_flight = self._in_flight
            if chain not in in_flight:
                return
            if self._in_order:
                in_flight[chain] = written
                self._complete_in_order()
            else:
                del in_flight[chain]
                self._put_used(chain.head, written)
            if not self._batches:
                self._publish()
            if device.waiting_for_chains and not in_flight:
                device.chains_are_back()

    def _complete_in_order(self) -> None:
        """VIRTIO_F_IN_ORDER: chains are used in the order in which they were made available (section 2.7.9)."""
        in_flight = self._in_flight
        while in_flight:
            chain = next(iter(in_flight))
            written = in_flight[chain]
            if written is None:
                break
            del in_flight[chain]
            self._put_used(chain.head, written)

    def _put_used(self, head: int, written: int) -> None:
        if not self.ready:
            return
        put, elements = self._put, self._elements
        slot = 2 * (put & self._mask)
        elements[slot] = head
        elements[slot + 1] = written & 0xFFFF_FFFF
        # After the elements (2.7.8.2). A driver that polls sees it at once, and adds more while the batch goes on: the
        # device need not sleep in between. Whether to interrupt is a question for the end of the batch.
        self._put = self._used[1] = put + 1 & 0xFFFF

    def _publish(self) -> None:
        """Interrupt the driver, if it wants that for what was used since the last time (section 2.7.7.2)."""
        new, old = self._put, self._published
        if new == old or not self.ready:
            return
        self._published = new
        if not self.device.notifies:
            return
        with self._barrier:
            pass
        if self._event_idx:
            event = self._available[2 + self.size]  # used_event: interrupt when you write this entry
            wanted = (new - event - 1 & 0xFFFF) < (new - old & 0xFFFF)
        else:
            wanted = not self._available[0] & _NO_INTERRUPT
        if wanted:
            self.device.transport.used_notification(self)

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Where the rings are, how far they were read and written, and which chains are in flight."""
        return {
            "size": self.size, "addresses": list(self.addresses), "ready": self.ready,
            "next": self._next, "used": self._put,
            # What is done, but waits for its turn, is not in guest memory's used ring: it is done again.
            "in_flight": self._again + [chain.head for chain in self._in_flight],
        }  # fmt: skip

    def restore(self, memory: GuestMemory, state: dict[str, Any]) -> None:
        """Take back what `state` gave; the features are told separately. Guest memory is back already.

        Raises UsageError when the rings are not where that memory is.
        """
        self.reset()
        self.size, self.addresses = state["size"], tuple(state["addresses"])
        if state["ready"]:
            if not self.set_up(memory, self.size, self.addresses):
                raise UsageError(f"the rings of queue {self.index} are not in this guest's memory")
            self._next = self._seen = state["next"]
            self._put = self._published = state["used"]
            self._again = list(state["in_flight"])
