"""What a struct of the kernel looks like when somebody prints it."""

from kvmpy.abi.structs import kvm_cpuid2, kvm_debugregs, kvm_lapic_state, kvm_vcpu_events, names, sized, struct


def test_fields_are_shown_by_name_and_numbers_in_hex() -> None:
    registers = kvm_debugregs(dr6=0xFFFF0FF0, dr7=0x400)
    registers.db[1] = 0x1000
    assert repr(registers).startswith("<kvm_debugregs db=[0 0x1000 0 0] dr6=0xffff0ff0 dr7=0x400 ")


def test_structs_in_structs_are_shown_and_padding_is_not() -> None:
    events = kvm_vcpu_events()
    events.exception.nr = 13
    text = repr(events)
    assert "exception=<" in text
    assert "nr=0xd" in text
    assert "pad" not in text
    assert "reserved" not in text


def test_long_arrays_are_counted() -> None:
    assert repr(kvm_lapic_state()) == "<kvm_lapic_state regs=[1024 entries]>"


def test_entries_of_a_flexible_array_are_shown_with_the_rest() -> None:
    table = sized(kvm_cpuid2, 1)()
    table.nent = 1
    assert repr(table).startswith("<kvm_cpuid2[1] nent=1 entries=[<kvm_cpuid_entry2 function=0 ")


def test_every_struct_can_be_printed() -> None:
    for name in names():
        assert name in repr(struct(name)())
