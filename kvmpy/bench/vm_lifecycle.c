/*
 * Creates a VM with 16 MiB of RAM and a vCPU, runs it to its first exit (HLT), and closes it.
 *
 * Reads numbers, one a line: how many VMs. Prints for each how many nanoseconds that took.
 */
#include "plain_vm.h"

int main(void)
{
	unsigned long count;
	int kvm = open_kvm();

	while (scanf("%lu", &count) == 1) {
		uint64_t start = now_ns();

		for (unsigned long i = 0; i < count; i++) {
			struct plain_vm vm = create_vm(kvm);

			vm.ram[0x1000] = 0xF4; /* hlt */
			add_vcpu(kvm, &vm);
			start_in_real_mode(&vm, 0x1000);
			checked("KVM_RUN", ioctl(vm.vcpu, KVM_RUN, 0));
			destroy_vm(&vm);
		}
		printf("%lu\n", (unsigned long)(now_ns() - start));
		fflush(stdout);
	}
	return 0;
}
