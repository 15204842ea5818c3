"""A C program calls Python: hypercalls of your own, with numbers, arguments and memory.

You learn: `HypercallChannel.on` gives a number to a Python function; the guest includes <kvmpy/hypercall.h> and calls
it like a function of its own. The arguments are 64-bit numbers, which may be addresses in the guest's memory. It takes
one exit a call, and works where VMCALL does not. The toolchain of `kvmpy.guest` compiles the program (gcc, binutils).

Output::

    the guest says: fib(30) please
    the guest got 832040
    call 9 is nobody's: -38
"""

from kvmpy import Machine, MiB
from kvmpy.boot import ElfImage
from kvmpy.devices import DebugExit, Hypercall, HypercallChannel
from kvmpy.guest.toolchain import GnuToolchain, ToolMissingError

SAY, FIBONACCI, REPORT = 1, 2, 3

PROGRAM = """
#include <kvmpy.h>

static const char wish[] = "fib(30) please";

void _start(void)
{
    kvmpy_hypercall(1, (unsigned long)wish, sizeof wish - 1, 0);
    kvmpy_hypercall(3, kvmpy_hypercall(2, 30, 0, 0), kvmpy_hypercall(9, 0, 0, 0), 0);
    kvmpy_exit(0);
}
"""


def say(call: Hypercall) -> None:
    address, length, *_ = call.arguments
    print("the guest says:", call.read(address, length).decode())


def fibonacci(call: Hypercall) -> int:
    a, b = 0, 1
    for _ in range(call.arguments[0]):
        a, b = b, a + b
    return a


def report(call: Hypercall) -> None:
    number, error, *_ = call.arguments
    print("the guest got", number)
    print("call 9 is nobody's:", error - (1 << 64))  # the guest's long is signed, an argument is not


try:
    program = GnuToolchain().compile_c(PROGRAM)
except ToolMissingError as error:
    raise SystemExit(str(error)) from None

with Machine(memory=4 * MiB) as machine:
    channel = machine.add(HypercallChannel())  # port 0x5C0 and, in memory, 0xFED80000
    channel.on(SAY, say)
    channel.on(FIBONACCI, fibonacci)
    channel.on(REPORT, report)
    machine.add(DebugExit())
    machine.load(ElfImage(program.elf))
    machine.run(timeout=10)
