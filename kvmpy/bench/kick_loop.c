/*
 * Kicks a guest that computes for ever out of KVM_RUN, by immediate_exit and a signal to the thread that runs it.
 *
 * Reads numbers, one a line: how many kicks. Prints for each line the nanoseconds from kick to return, all in one line.
 */
#define _GNU_SOURCE
#include "plain_vm.h"

#include <pthread.h>
#include <semaphore.h>
#include <signal.h>

static struct plain_vm vm;
static sem_t started, returned;
static uint64_t returned_at;

static void ignore(int number)
{
	(void)number;
}

static void *run_vcpu(void *nothing)
{
	for (;;) {
		sem_post(&started);
		if (ioctl(vm.vcpu, KVM_RUN, 0) == 0 || errno != EINTR) {
			fprintf(stderr, "the guest came back by itself, exit reason %u\n", vm.run->exit_reason);
			exit(1);
		}
		returned_at = now_ns();
		vm.run->immediate_exit = 0;
		sem_post(&returned);
	}
	return nothing;
}

int main(void)
{
	static const uint8_t jump_to_itself[] = { 0xEB, 0xFE };
	struct timespec pause = { .tv_nsec = 300000 };
	struct sigaction action = { .sa_handler = ignore };
	unsigned long count;
	pthread_t thread;
	int kvm = open_kvm();

	vm = create_vm(kvm);
	memcpy(vm.ram + 0x1000, jump_to_itself, sizeof jump_to_itself);
	add_vcpu(kvm, &vm);
	start_in_real_mode(&vm, 0x1000);
	sigaction(SIGUSR1, &action, NULL);
	sem_init(&started, 0, 0);
	sem_init(&returned, 0, 0);
	checked("pthread_create", -pthread_create(&thread, NULL, run_vcpu, NULL));
	while (scanf("%lu", &count) == 1) {
		for (unsigned long i = 0; i < count; i++) {
			uint64_t kicked_at;

			sem_wait(&started);
			nanosleep(&pause, NULL); /* by now the guest runs */
			kicked_at = now_ns();
			vm.run->immediate_exit = 1;
			pthread_kill(thread, SIGUSR1);
			sem_wait(&returned);
			printf("%lu ", (unsigned long)(returned_at - kicked_at));
		}
		printf("\n");
		fflush(stdout);
	}
	return 0;
}
