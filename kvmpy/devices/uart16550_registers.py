"""The registers of a 16550 UART, bit by bit (PC16550D data sheet, "Registers").

Plain ints, as in all devices of a PC's board: an operation on an IntFlag costs more than a whole register access, and
making one takes a tenth of a millisecond of every start.
"""

__all__ = ["Fcr", "Ier", "Iir", "Lcr", "Lsr", "Mcr", "Msr"]

# Register offsets. 0 and 1 are the divisor latch while LCR.DLAB is set.
RBR_THR = 0
IER = 1
IIR_FCR = 2
LCR = 3
MCR = 4
LSR = 5
MSR = 6
SCR = 7

FIFO_SIZE = 16
TRIGGER_LEVELS = (1, 4, 8, 14)


class Ier:
    """Interrupt enable register."""

    ERBFI = 1 << 0  # received data available, character timeout
    ETBEI = 1 << 1  # transmitter holding register empty
    ELSI = 1 << 2  # receiver line status
    EDSSI = 1 << 3  # modem status


class Iir:
    """Interrupt identification register: the source of the highest priority (line status is the highest)."""

    MODEM_STATUS = 0x00
    NOT_PENDING = 0x01
    THR_EMPTY = 0x02
    RECEIVED_DATA = 0x04
    LINE_STATUS = 0x06
    CHARACTER_TIMEOUT = 0x0C
    FIFOS_ENABLED = 0xC0


class Fcr:
    """FIFO control register, write only."""

    ENABLE = 1 << 0
    RESET_RECEIVER = 1 << 1
    RESET_TRANSMITTER = 1 << 2
    DMA_MODE = 1 << 3
    TRIGGER_LSB = 1 << 6
    TRIGGER_MSB = 1 << 7


class Lcr:
    """Line control register."""

    WLS0 = 1 << 0
    WLS1 = 1 << 1
    STB = 1 << 2
    PEN = 1 << 3
    EPS = 1 << 4
    STICK_PARITY = 1 << 5
    SET_BREAK = 1 << 6
    DLAB = 1 << 7


class Mcr:
    """Modem control register. On a PC, OUT2 connects the interrupt output to the bus."""

    DTR = 1 << 0
    RTS = 1 << 1
    OUT1 = 1 << 2
    OUT2 = 1 << 3
    LOOP = 1 << 4


class Lsr:
    """Line status register."""

    DR = 1 << 0
    OE = 1 << 1
    PE = 1 << 2
    FE = 1 << 3
    BI = 1 << 4
    THRE = 1 << 5
    TEMT = 1 << 6
    FIFO_ERROR = 1 << 7


class Msr:
    """Modem status register: the four inputs, and whether each changed since the last read."""

    DCTS = 1 << 0
    DDSR = 1 << 1
    TERI = 1 << 2
    DDCD = 1 << 3
    CTS = 1 << 4
    DSR = 1 << 5
    RI = 1 << 6
    DCD = 1 << 7
