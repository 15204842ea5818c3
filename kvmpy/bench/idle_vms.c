/*
 * Keeps VMs with 16 MiB of RAM that have run to their first exit.
 *
 * Reads numbers, one a line: how many VMs more. Prints for each the resident memory of the process in KiB.
 */
#include "plain_vm.h"

static unsigned long resident_kib(void)
{
	char line[256];
	unsigned long kib = 0;
	FILE *rollup = fopen("/proc/self/smaps_rollup", "r");

	checked("smaps_rollup", rollup ? 0 : -1);
	while (fgets(line, sizeof line, rollup))
		if (sscanf(line, "Rss: %lu kB", &kib) == 1)
			break;
	fclose(rollup);
	return kib;
}

int main(void)
{
	unsigned long count;
	int kvm = open_kvm();

	while (scanf("%lu", &count) == 1) {
		for (unsigned long i = 0; i < count; i++) {
			struct plain_vm vm = create_vm(kvm);

			vm.ram[0x1000] = 0xF4; /* hlt */
			add_vcpu(kvm, &vm);
			start_in_real_mode(&vm, 0x1000);
			checked("KVM_RUN", ioctl(vm.vcpu, KVM_RUN, 0));
		}
		printf("%lu\n", resident_kib());
		fflush(stdout);
	}
	return 0;
}
