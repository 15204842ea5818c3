/*
 * Stands in for the KVM_RUN ioctl: comes back at once with the same exit, which leaves the cost of Python alone.
 *
 * Like KVM it sets the exit reason each time (the run loop overwrites it), and like ioctl() it takes three arguments
 * and answers 0. After `left` exits of that kind comes one KVM_EXIT_HLT.
 */
#include <linux/kvm.h>
#include <stdint.h>

static struct kvm_run *run;
static uint32_t reason;
static unsigned long left;

void stub_begin(void *page, unsigned int exit_reason, unsigned long count)
{
	run = page;
	reason = exit_reason;
	left = count;
}

int stub_run(int fd, unsigned long request, long argument)
{
	(void)fd;
	(void)request;
	(void)argument;
	if (left == 0) {
		run->exit_reason = KVM_EXIT_HLT;
	} else {
		left--;
		run->exit_reason = reason;
	}
	return 0;
}
