"""Linux: bzImage and vmlinux, by the boot protocols of the kernel's documentation and by PVH.

* `kernel`: `LinuxKernel`, the image that a machine loads
* `setup_header`, `bzimage`: what is in a bzImage
* `boot_params`, `pvh`: what a kernel is told, by the boot protocol and by PVH
* `entry_states`: the state of the processor for each entry
* `command_line`, `initrd`: what comes along
"""

from kvmpy.boot.linux.boot_params import SetupData
from kvmpy.boot.linux.kernel import LinuxKernel

__all__ = ["LinuxKernel", "SetupData"]
