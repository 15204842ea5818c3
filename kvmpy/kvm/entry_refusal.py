"""Why KVM or the processor refused the state of a vCPU: the rules behind an errno or a failed entry."""

from kvmpy.errors import EntryRefusedError, KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmpy.exits import FailEntry
    from kvmpy.kvm.vcpu import Vcpu
    from kvmpy.x86.entry_rules import Violation

__all__ = ["explain_entry_failure", "refused_sregs"]


def refused_sregs(vcpu: "Vcpu", ioctl: str, number: int) -> KvmError:
    """The exception for system registers that KVM_SET_SREGS answered with errno `number`."""
    from kvmpy.kvm.advice import advice_for
    from kvmpy.kvm.processor_limits import limits_of
    from kvmpy.x86.entry_rules import KVM, violations

    state = vcpu.cpu_state()
    # All of them: which one KVM minded it does not say, and some (EFER's bits) not every kernel minds.
    broken = violations(state, sets=(KVM,), processor=limits_of(vcpu.get_cpuid()))
    if broken:
        return EntryRefusedError(ioctl, number, broken)
    return KvmError(ioctl, number, advice_for("KVM_SET_SREGS", number))


def explain_entry_failure(vcpu: "Vcpu", failure: "FailEntry") -> "list[Violation]":
    """The rules of the processor's maker that the registers break; those that KVM repairs first are left out."""
    from kvmpy.x86.entry_rules import decode_entry_failure, violations

    maker = decode_entry_failure(failure.hardware_reason).set
    broken = violations(vcpu.cpu_state(), sets=() if maker is None else (maker,), memory=vcpu.vm.memory)
    return [violation for violation in broken if not violation.kvm_repairs]
