"""Reading a descriptor chain that a driver wrote, and that may be anything (virtio 1.2, section 2.7.5)."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpy.virtio.guest_buffers import GuestBuffers

__all__ = ["MAX_INDIRECT", "MalformedChain", "ThreeBuffers", "read_chain", "read_single_buffers", "read_three_buffers"]

# struct virtq_desc (section 2.7.5): le64 addr; le32 len; le16 flags; le16 next. Each field is read once: a guest that
# changes a descriptor while it is looked at gets what is in bounds, or an error.
SIZE = 16
_read = Struct("<QIHH").unpack_from
_read_three = Struct("<QIHHQIHHQIHH").unpack_from
_NEXT, _WRITE, _INDIRECT = 1, 2, 4

MAX_INDIRECT = 1024
"""Entries that an indirect table may have. Section 2.7.5.3.1 allows no more than the queue has; Linux goes by the
device's own limit of segments instead, and monitors take 1024."""

MAX_BYTES = 1 << 32
"""Section 2.7.5.1: no chain is longer than 2^32 bytes in total."""


class MalformedChain(Exception):
    """The driver broke a rule of section 2.7: `rule` is its name, which is counted. It never leaves this layer."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


def read_chain(
    table: memoryview, size: int, head: int, buffers: GuestBuffers, indirect: bool,
) -> tuple[list[memoryview], list[memoryview], int, int]:  # fmt: skip
    """Follow the chain from `head` on: the views of its readable and of its writable part, and their bytes.

    `table` are the `size` descriptors of the queue. `indirect`: VIRTIO_F_INDIRECT_DESC is negotiated.
    Raises MalformedChain.
    """
    readable: list[memoryview] = []
    writable: list[memoryview] = []
    readable_bytes = writable_bytes = 0
    limit, index = size, head
    inside = False
    start, end, ram = buffers.look()  # where nearly all buffers lie
    while True:
        for _ in range(limit):
            if index >= limit:
                raise MalformedChain("descriptor_index")
            address, length, flags, index = _read(table, SIZE * index)
            if flags & _INDIRECT:
                break
            if flags & _WRITE:
                if length:
                    last = address + length
                    writable_bytes += length
                    if start <= address and last <= end:
                        writable.append(ram[address - start : last - start])
                    elif not buffers.add(address, length, True, writable):
                        raise MalformedChain("buffer_not_in_ram")
            elif length:
                last = address + length
                if writable_bytes:  # 2.7.4.2: what the device may write comes last
                    raise MalformedChain("readable_after_writable")
                readable_bytes += length
                if start <= address and last <= end:
                    readable.append(ram[address - start : last - start])
                elif not buffers.add(address, length, False, readable):
                    raise MalformedChain("buffer_not_in_ram")
            if not flags & _NEXT:
                if readable_bytes + writable_bytes > MAX_BYTES:
                    raise MalformedChain("chain_of_too_many_bytes")
                return readable, writable, readable_bytes, writable_bytes
        else:  # 2.7.5.3.1: not longer than the queue. That also ends loops, which section 2.7.5.1 forbids.
            raise MalformedChain("chain_too_long")
        # 2.7.5.3.1: only if negotiated, not within a table, and never with NEXT. 2.7.5.3.2: WRITE is ignored here.
        if not indirect or inside or flags & _NEXT:
            raise MalformedChain("indirect_not_allowed")
        table, limit = _indirect_table(address, length, buffers)
        index, inside = 0, True


ThreeBuffers = tuple[int, int, int, int, int, int, int]
"""Head of a chain, then where three buffers begin in RAM, and their bytes: one to be read, two to be written."""


def read_three_buffers(
    table: memoryview, size: int, heads: list[int], buffers: GuestBuffers, indirect: bool,
) -> list[ThreeBuffers]:  # fmt: skip
    """Follow those chains that have the shape of nearly all requests to a disk, up to the first that has another.

    That is: three descriptors in a row, in the queue's table or in a table of their own, and all buffers in the RAM
    that `buffers.look()` gives. So one look reads a chain. Whatever else there is, right or wrong, `read_chain` finds.
    """
    start, end, ram = buffers.look()
    found = []
    for head in heads:
        if head > size - 3:
            break
        one, one_bytes, flags, after_one, two, two_bytes, two_flags, after_two, three, three_bytes, three_flags, _ = (
            _read_three(table, SIZE * head)
        )
        first = head
        if flags == _INDIRECT:
            if one_bytes != 3 * SIZE or not indirect or one < start or one + one_bytes > end:
                break
            (
                one, one_bytes, flags, after_one, two, two_bytes, two_flags, after_two,
                three, three_bytes, three_flags, _,
            ) = _read_three(ram, one - start)  # fmt: skip
            first = 0
        if (
            flags != _NEXT or two_flags != _NEXT | _WRITE or three_flags != _WRITE
            or after_one != first + 1 or after_two != first + 2
            or one < start or two < start or three < start
            or one + one_bytes > end or two + two_bytes > end or three + three_bytes > end
        ):  # fmt: skip
            break
        found.append((head, one - start, one_bytes, two - start, two_bytes, three - start, three_bytes))
    return found


def read_single_buffers(
    table: memoryview, size: int, heads: list[int], buffers: GuestBuffers, indirect: bool,
) -> list[tuple[int, memoryview]]:  # fmt: skip
    """The same for chains of one buffer to be read: heads, and views of the buffers."""
    start, end, ram = buffers.look()
    found = []
    for head in heads:
        if head >= size:
            break
        address, length, flags, _ = _read(table, SIZE * head)
        if flags or not length or address < start or address + length > end:
            break
        found.append((head, ram[address - start : address - start + length]))
    return found


def _indirect_table(address: int, length: int, buffers: GuestBuffers) -> tuple[memoryview, int]:
    """An indirect table, and how many descriptors it has."""
    count, odd = divmod(length, SIZE)
    if odd or not 0 < count <= MAX_INDIRECT:
        raise MalformedChain("indirect_table_size")
    pieces: list[memoryview] = []
    if not buffers.add(address, length, False, pieces):
        raise MalformedChain("indirect_table_not_in_ram")
    return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces)), count
