"""The program whose start is measured: README's first, on a bare vCPU."""

from kvmpy import Hlt, IoOut, Kvm

CODE = bytes([0xBA, 0xF8, 0x03,   # mov dx, 0x3f8
              0x00, 0xD8,         # add al, bl
              0x04, 0x30,         # add al, '0'
              0xEE,               # out dx, al
              0xF4])  # hlt  # fmt: skip


def main() -> None:
    """Run a guest that adds two and two."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_ram(0x1000, size=0x1000)
        vm.memory.write(0x1000, CODE)
        vcpu = vm.create_vcpu()
        vcpu.set_real_mode(entry=0x1000)
        vcpu.regs.rax = 2
        vcpu.regs.rbx = 2
        for event in vcpu.exits():
            match event:
                case IoOut(port=0x3F8, data=data):
                    print(data.decode())
                case Hlt():
                    break


if __name__ == "__main__":
    main()
