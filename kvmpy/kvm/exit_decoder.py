"""From the raw `struct kvm_run` to an exit object: one function per KVM_EXIT_* reason (KVM API, chapter 5).

Offsets are those of the union at byte 32 of struct kvm_run; u32[i] lies at byte 4 i, u64[i] at byte 8 i.
"""

from kvmpy import exits
from kvmpy._exit import Answer, Exit
from kvmpy.kvm.run_page import RunPage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["IO", "MEMORY_FAULT", "MMIO", "decode"]

IO, MMIO, MEMORY_FAULT = 2, 6, 39


def decode(page: RunPage) -> Exit:
    """The exit that `page` holds. Reads are answered with all ones until somebody replies."""
    reason = page.u32[2]
    decoder = _DECODERS.get(reason)
    return exits.UnknownExit(reason) if decoder is None else decoder(page)


def _io(page: RunPage) -> Exit:
    # direction u8 @32 (1: out), size u8 @33, port u16 @34, count u32 @36, data_offset u64 @40
    what, count, start = page.u32[8], page.u32[9], page.u64[5]
    out, size, port = what & 0xFF, what >> 8 & 0xFF, what >> 16
    length = size * count
    if out:
        return exits.IoOut(port, page.u8[start : start + length].tobytes(), size, count)
    page.u8[start : start + length] = b"\xff" * length
    return exits.IoIn(port, size, count, Answer(page, start, length))


def _mmio(page: RunPage) -> Exit:
    # phys_addr u64 @32, data u8[8] @40, len u32 @48, is_write u8 @52
    length = min(page.u32[12], 8)
    if page.u8[52]:
        return exits.MmioWrite(page.u64[4], page.u8[40 : 40 + length].tobytes())
    page.u8[40 : 40 + length] = b"\xff" * length
    return exits.MmioRead(page.u64[4], length, Answer(page, 40, length))


def _hypercall(page: RunPage) -> Exit:
    # nr u64 @32, args u64[6] @40, ret u64 @88, flags u64 @96
    return exits.Hypercall(page.u64[4], tuple(page.u64[5:11]), page.u64[12], Answer(page, 88, 8))


def _internal_error(page: RunPage) -> Exit:
    # suberror u32 @32, ndata u32 @36, data u64[16] @40; for an emulation failure these are flags u64 @40,
    # insn_size u8 @48, insn_bytes u8[15] @49, where flags bit 0 says that the bytes are there.
    suberror, count = page.u32[8], min(page.u32[9], 16)
    instruction = b""
    if suberror == 1 and count and page.u64[5] & 1:
        instruction = page.u8[49 : 49 + min(page.u8[48], 15)].tobytes()
    return exits.InternalError(suberror, tuple(page.u64[5 : 5 + count]), instruction)


def _read_msr(page: RunPage) -> Exit:
    # error u8 @32, reason u32 @40, index u32 @44, data u64 @48
    page.u8[32] = 1  # #GP unless somebody replies
    return exits.RdMsr(page.u32[11], page.u32[10], Answer(page, 48, 8), Answer(page, 32, 1))


def _write_msr(page: RunPage) -> Exit:
    page.u8[32] = 0
    return exits.WrMsr(page.u32[11], page.u64[6], page.u32[10], Answer(page, 32, 1))


def _system_event(page: RunPage) -> Exit:
    return exits.SystemEvent(page.u32[8], tuple(page.u64[5 : 5 + min(page.u32[9], 16)]))


_DECODERS: "dict[int, Callable[[RunPage], Exit]]" = {
    0: lambda page: exits.UnknownHardwareExit(page.u64[4]),
    1: lambda page: exits.ExceptionExit(page.u32[8], page.u32[9]),
    IO: _io,
    3: _hypercall,
    4: lambda page: exits.Debug(page.u32[8], page.u64[5], page.u64[6], page.u64[7]),
    5: lambda page: exits.Hlt(),
    MMIO: _mmio,
    7: lambda page: exits.IrqWindowOpen(),
    8: lambda page: exits.Shutdown(),
    9: lambda page: exits.FailEntry(page.u64[4], page.u32[10]),
    10: lambda page: exits.Interrupted(),
    11: lambda page: exits.SetTpr(),
    12: lambda page: exits.TprAccess(page.u64[4], bool(page.u32[10])),
    16: lambda page: exits.Nmi(),
    17: _internal_error,
    24: _system_event,
    26: lambda page: exits.IoapicEoi(page.u8[32]),
    27: lambda page: exits.HypervExit(page.u32[8], page.u8[40:288].tobytes()),
    29: _read_msr,
    30: _write_msr,
    31: lambda page: exits.DirtyRingFull(),
    32: lambda page: exits.ApResetHold(),
    33: lambda page: exits.BusLock(),
    34: lambda page: exits.XenExit(page.u32[8], page.u8[40:288].tobytes()),
    37: lambda page: exits.Notify(page.u32[8]),
    MEMORY_FAULT: lambda page: exits.MemoryFault(page.u64[5], page.u64[6], page.u64[4]),
    40: lambda page: exits.TdxExit(page.u64[5], page.u64[4], page.u8[48:288].tobytes()),
}
