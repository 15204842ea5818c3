/*
 * Creates a VM with 16 MiB of RAM and a vCPU, runs it to its first exit (HLT), and closes it.
 *
 * Reads two numbers a line: how many VMs, and whether (1 or 0) another VM with a vCPU is there all the time. Prints for
 * each line how many nanoseconds that took.
 */
#include "plain_vm.h"

int main(void)
{
	unsigned long count;
	int beside, kvm = open_kvm();

	while (scanf("%lu %d", &count, &beside) == 2) {
		struct plain_vm other;
		uint64_t start;

		if (beside) {
			other = create_vm(kvm);
			add_vcpu(kvm, &other);
		}
		start = now_ns();
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
		if (beside)
			destroy_vm(&other);
	}
	return 0;
}
