"""The same work in three ways, and how often each leaves the guest.

You learn: what makes a virtual machine slow is not its instructions, which the processor runs itself, but each exit to
the host. Emulated hardware has one for every register, character and sector; paravirtual devices have a few for a
request; a guest that cooperates, with many requests for one notification and memory that both sides see, has nearly
none. `kvmpy bench ways` does more of the same, with times and a picture; docs/three-ways.md explains it. The guest is a
program in C of the package (gcc, binutils).

Output::

                        emulated  paravirtual  cooperative
    print                   2000           75            2
    disk                    4192          768            2
    timestamps               100            0            0
    ticks                      0            0            0
    messages                4000         1000            0
    The cooperative guest prints with 1000 times fewer exits than the emulated one, and reads its disk with 2096.
"""

from kvmpy.bench.ways import WAYS, WORKLOADS, Amounts, three_ways
from kvmpy.guest.toolchain import ToolMissingError

AMOUNTS = Amounts(print=2000, disk=1 << 20, timestamps=100, ticks=10, messages=1000)

try:
    results = three_ways(AMOUNTS)
except ToolMissingError as error:
    raise SystemExit(str(error)) from None

print(" " * 16 + "".join(f"{way:>13}" for way in WAYS).removeprefix(" "))
for workload in WORKLOADS:
    exits = [results[way][workload].exits for way in WAYS]
    print(f"{workload:<15}" + "".join(f"{count:>13}" for count in exits))

emulated, _, cooperative = (results[way] for way in WAYS)
fewer = {name: emulated[name].exits // cooperative[name].exits for name in ("print", "disk")}
print(
    f"The cooperative guest prints with {fewer['print']} times fewer exits than the emulated one, "
    f"and reads its disk with {fewer['disk']}."
)
