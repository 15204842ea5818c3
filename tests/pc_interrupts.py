"""Assembly by which real-mode guests take interrupts from a PC's two interrupt controllers (Intel 8259A)."""

from collections.abc import Mapping

__all__ = ["END_OF_INTERRUPT", "FIRST_VECTOR", "SECOND_VECTOR", "take_interrupts"]

FIRST_VECTOR, SECOND_VECTOR = 0x20, 0x28
"""Vectors of IRQ 0 and IRQ 8: a BIOS has IRQ 0 at 8, where a guest would mistake a double fault for it."""

END_OF_INTERRUPT = "mov al, 0x20; out 0x20, al"
"""For IRQs 0 to 7; changes AL."""


def take_interrupts(handlers: Mapping[int, str]) -> str:
    """Code that programs both controllers and lets IRQ number -> label through, all others masked.

    Changes AX; CS and DS are to be 0, interrupts are to be off.
    """
    mask = 0xFFFF & ~sum(1 << irq for irq in handlers)
    if mask >> 8 != 0xFF:
        mask &= ~(1 << 2)  # the second controller hangs on input 2 of the first
    vectors = "".join(
        f"mov word ptr [{4 * vector}], offset {label}; mov word ptr [{4 * vector + 2}], 0\n"
        for irq, label in handlers.items()
        for vector in (FIRST_VECTOR + irq if irq < 8 else SECOND_VECTOR + irq - 8,)
    )
    # ICW1 edge triggered, cascade, ICW4 follows; ICW2 the vector; ICW3 the cascade; ICW4 8086; OCW1 the mask.
    first = (0x20, 0x11), (0x21, FIRST_VECTOR), (0x21, 0x04), (0x21, 0x01), (0x21, mask & 0xFF)
    second = (0xA0, 0x11), (0xA1, SECOND_VECTOR), (0xA1, 0x02), (0xA1, 0x01), (0xA1, mask >> 8)
    return vectors + "".join(f"mov al, {value}; out {port}, al\n" for port, value in first + second)
