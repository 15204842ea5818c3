/*
 * Runs a ROM image from the reset vector and answers every exit in the plainest loop there is.
 *
 * Reads paths of images, one a line; prints for each the number that the guest wrote to RESULT_PORT, byte by byte,
 * before it ended by a write to EXIT_PORT.
 */
#include "plain_vm.h"

#define RESULT_PORT 0x402
#define EXIT_PORT 0xF4
#define ROM_SIZE 0x10000

static uint64_t device_value; /* the device: it keeps what was written and gives it back */

static uint32_t run_guest(struct plain_vm *vm)
{
	uint32_t result = 0;

	for (;;) {
		struct kvm_run *run = vm->run;

		checked("KVM_RUN", ioctl(vm->vcpu, KVM_RUN, 0));
		if (run->exit_reason == KVM_EXIT_IO) {
			uint8_t *data = (uint8_t *)run + run->io.data_offset;

			if (run->io.port == RESULT_PORT) {
				result = result >> 8 | (uint32_t)*data << 24;
			} else if (run->io.port == EXIT_PORT) {
				return result;
			} else if (run->io.direction == KVM_EXIT_IO_OUT) {
				memcpy(&device_value, data, run->io.size);
			} else {
				memcpy(data, &device_value, run->io.size);
			}
		} else if (run->exit_reason == KVM_EXIT_MMIO) {
			if (run->mmio.is_write)
				memcpy(&device_value, run->mmio.data, run->mmio.len);
			else
				memcpy(run->mmio.data, &device_value, run->mmio.len);
		} else {
			fprintf(stderr, "exit reason %u\n", run->exit_reason);
			exit(1);
		}
	}
}

int main(void)
{
	char path[4096];
	int kvm = open_kvm();
	uint8_t *rom = private_memory(ROM_SIZE);

	while (fgets(path, sizeof path, stdin)) {
		struct plain_vm vm = { 0 };
		struct kvm_pit_config pit = { 0 };
		uint64_t identity_map = 0xFEFFC000;
		int image;

		path[strcspn(path, "\n")] = 0;
		image = (int)checked(path, open(path, O_RDONLY | O_CLOEXEC));
		checked("read", read(image, rom, ROM_SIZE));
		close(image);

		/* The same in-kernel devices as a kvmpy Machine has. */
		vm = create_vm(kvm);
		checked("KVM_SET_IDENTITY_MAP_ADDR", ioctl(vm.fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map));
		checked("KVM_SET_TSS_ADDR", ioctl(vm.fd, KVM_SET_TSS_ADDR, 0xFEFFD000ul));
		checked("KVM_CREATE_IRQCHIP", ioctl(vm.fd, KVM_CREATE_IRQCHIP, 0));
		checked("KVM_CREATE_PIT2", ioctl(vm.fd, KVM_CREATE_PIT2, &pit));
		add_memory(vm.fd, 1, KVM_MEM_READONLY, 0x100000000ul - ROM_SIZE, rom, ROM_SIZE);
		add_vcpu(kvm, &vm);
		printf("%u\n", run_guest(&vm));
		fflush(stdout);
		destroy_vm(&vm);
	}
	return 0;
}
