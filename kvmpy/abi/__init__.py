"""The kernel's KVM interface as data: ioctl numbers, struct layouts, constants. Opens no file and runs nothing.

Names are the kernel's own (`<linux/kvm.h>` and x86's `<asm/kvm.h>`), so what is written here can be looked up there
and in the KVM API document (Documentation/virt/kvm/api.rst); "4.11" in a docstring is a section of that document.

* `kvmpy.abi.ioctls`: the table of ioctls, by file descriptor
* `kvmpy.abi.structs`: ctypes classes of the structs, and `sized()` for those that end in an array
* `kvmpy.abi.run_layout`: offsets into the shared `struct kvm_run`, for code that reads it through memoryviews
* `kvmpy.abi.exit_reasons`, `kvmpy.abi.capabilities`, `kvmpy.abi.flags`: constants
* `kvmpy.abi.confidential`: constants of SEV and TDX guests; `kvmpy.abi.guest_interfaces`: of Xen and Hyper-V guests
* `kvmpy.abi.withdrawn`: what old kernels had and new ones no longer answer
* `kvmpy.abi.newer`: which names are newer than the oldest header that the tests compare with, and since when
"""
