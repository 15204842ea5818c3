/* The KVM API as a plain C program uses it: what the programs beside this file share. */
#ifndef PLAIN_VM_H
#define PLAIN_VM_H

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define RAM_SIZE (16ul << 20)

/* fd: the VM; vcpu: its one processor; run: what the vCPU shares with the kernel; ram: guest address 0 on. */
struct plain_vm {
	int fd, vcpu, run_size;
	struct kvm_run *run;
	uint8_t *ram;
};

static inline long checked(const char *what, long answer)
{
	if (answer < 0) {
		fprintf(stderr, "%s: %s\n", what, strerror(errno));
		exit(1);
	}
	return answer;
}

static inline uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline int open_kvm(void)
{
	return (int)checked("open /dev/kvm", open("/dev/kvm", O_RDWR | O_CLOEXEC));
}

static inline void *private_memory(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	checked("mmap", memory == MAP_FAILED ? -1 : 0);
	return memory;
}

static inline void add_memory(int vm, uint32_t slot, uint32_t flags, uint64_t address, void *memory, size_t size)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .flags = flags, .guest_phys_addr = address, .memory_size = size,
		.userspace_addr = (uintptr_t)memory,
	};

	checked("KVM_SET_USER_MEMORY_REGION", ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
}

static inline void add_vcpu(int kvm, struct plain_vm *vm)
{
	void *run;

	vm->vcpu = (int)checked("KVM_CREATE_VCPU", ioctl(vm->fd, KVM_CREATE_VCPU, 0));
	vm->run_size = (int)checked("KVM_GET_VCPU_MMAP_SIZE", ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	run = mmap(NULL, (size_t)vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, 0);
	checked("mmap kvm_run", run == MAP_FAILED ? -1 : 0);
	vm->run = run;
}

static inline struct plain_vm create_vm(int kvm)
{
	struct plain_vm vm = { 0 };

	vm.fd = (int)checked("KVM_CREATE_VM", ioctl(kvm, KVM_CREATE_VM, 0));
	vm.ram = private_memory(RAM_SIZE);
	add_memory(vm.fd, 0, 0, 0, vm.ram, RAM_SIZE);
	return vm;
}

static inline void start_in_real_mode(const struct plain_vm *vm, uint16_t address)
{
	struct kvm_regs regs = { .rip = address, .rflags = 2 };
	struct kvm_sregs sregs;

	checked("KVM_GET_SREGS", ioctl(vm->vcpu, KVM_GET_SREGS, &sregs));
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	checked("KVM_SET_SREGS", ioctl(vm->vcpu, KVM_SET_SREGS, &sregs));
	checked("KVM_SET_REGS", ioctl(vm->vcpu, KVM_SET_REGS, &regs));
}

static inline void destroy_vm(struct plain_vm *vm)
{
	munmap(vm->run, (size_t)vm->run_size);
	close(vm->vcpu);
	close(vm->fd);
	munmap(vm->ram, RAM_SIZE);
}

#endif
