"""A guest under a microscope: every single instruction, and which registers it changed.

You learn: after `vcpu.single_step()` each run comes back after one instruction, with a `Debug` exit that says where the
processor is; `regs.copy()` is a plain value to compare with. A `jmp` or `loop` is seen going where it goes.

Output::

    0x1000  mov ax, 1        rax 0x0 -> 0x1
    0x1003  mov cx, 3        rcx 0x0 -> 0x3
    0x1006  add ax, ax       rax 0x1 -> 0x2
    0x1008  loop double      rcx 0x3 -> 0x2
    0x1006  add ax, ax       rax 0x2 -> 0x4
    0x1008  loop double      rcx 0x2 -> 0x1
    0x1006  add ax, ax       rax 0x4 -> 0x8
    0x1008  loop double      rcx 0x1 -> 0x0
    0x100a  hlt
"""

from kvmpy import Debug, Hlt, Kvm
from kvmpy.x86.registers import GENERAL_REGISTERS

PROGRAM = {
    0x1000: ("b8 01 00", "mov ax, 1"),
    0x1003: ("b9 03 00", "mov cx, 3"),
    0x1006: ("01 c0", "add ax, ax"),
    0x1008: ("e2 fc", "loop double"),
    0x100A: ("f4", "hlt"),
}
WATCHED = [name for name in GENERAL_REGISTERS if name not in ("rip", "rflags")]

with Kvm() as kvm, kvm.create_vm() as vm:
    vm.add_ram(0x1000, size=0x1000)
    for address, (code, _) in PROGRAM.items():
        vm.memory.write(address, bytes.fromhex(code))
    vcpu = vm.create_vcpu()
    vcpu.set_real_mode(entry=0x1000)
    vcpu.single_step()

    before = vcpu.regs.copy()
    while before.rip in PROGRAM:
        event = vcpu.run()
        if not isinstance(event, Debug | Hlt):  # stepping over HLT is one or the other: hosts differ
            raise SystemExit(f"unexpected: {event}")
        after = vcpu.regs.copy()
        changes = [
            f"{name} {getattr(before, name):#x} -> {getattr(after, name):#x}"
            for name in WATCHED
            if getattr(before, name) != getattr(after, name)
        ]
        print(f"{before.rip:#x}  {PROGRAM[before.rip][1]:<16} {', '.join(changes)}".rstrip())
        before = after
