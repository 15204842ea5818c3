"""KVM_ENABLE_CAP, which VM and vCPU descriptors share (KVM API, section 4.37)."""

from kvmpy.errors import UsageError
from kvmpy.kvm.checked_struct import capability_number, filled, fits
from kvmpy.kvm.descriptor import Descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["enable_cap"]


def enable_cap(descriptor: Descriptor, capability: int, arguments: "Sequence[int]", flags: int) -> None:
    """Enable `capability` (a `Cap` or its number) with up to four 64-bit arguments, explained in chapters 6 and 7."""
    from kvmpy.abi.structs import kvm_enable_cap

    request = filled(kvm_enable_cap, cap=capability_number(capability), flags=flags)
    if len(arguments) > len(request.args):
        raise UsageError(f"a capability has at most {len(request.args)} arguments, not {len(arguments)}")
    for index, argument in enumerate(arguments):
        request.args[index] = fits(f"argument {index} of the capability", argument, 64)
    descriptor.ioctl("KVM_ENABLE_CAP", request)
