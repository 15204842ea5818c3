"""kvmpy: the KVM API in Python."""
