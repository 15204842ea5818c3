"""The x86 processor as pure values: registers, segments, modes, page tables, CPUID, entry rules, event delivery.

Nothing here opens a file or knows KVM; all of it runs on any computer.
"""
