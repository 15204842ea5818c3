/* Are a process's own x87, SSE and AVX registers still its own after others have run? `vector_state SEED ROUNDS`.
 *
 * Fills YMM0 to YMM15 and an x87 register with values that follow from the seed, lets others run (sched_yield, by hand:
 * no code of the C library in between), and compares; for a third of a second at least, so that on a quick processor,
 * too, one has not ended before the next begins. Then a sum in floating point, whose digits are known.
 * Prints `SEED ok, SWITCHES switches, sum SUM`, or what differed.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>

typedef uint64_t registers[16][4] __attribute__((aligned(32)));

static void fill(registers values, uint64_t x)
{
	for (int i = 0; i < 16; i++)
		for (int k = 0; k < 4; k++) {
			x ^= x << 13, x ^= x >> 7, x ^= x << 17;
			values[i][k] = x;
		}
}

static double let_others_run(registers in, registers out, double number)
{
	long call = SYS_sched_yield;
	asm volatile(
		"fldl %[number]\n\t"
		"vmovdqa 0*32(%[in]), %%ymm0;  vmovdqa 1*32(%[in]), %%ymm1;  vmovdqa 2*32(%[in]), %%ymm2\n\t"
		"vmovdqa 3*32(%[in]), %%ymm3;  vmovdqa 4*32(%[in]), %%ymm4;  vmovdqa 5*32(%[in]), %%ymm5\n\t"
		"vmovdqa 6*32(%[in]), %%ymm6;  vmovdqa 7*32(%[in]), %%ymm7;  vmovdqa 8*32(%[in]), %%ymm8\n\t"
		"vmovdqa 9*32(%[in]), %%ymm9;  vmovdqa 10*32(%[in]), %%ymm10; vmovdqa 11*32(%[in]), %%ymm11\n\t"
		"vmovdqa 12*32(%[in]), %%ymm12; vmovdqa 13*32(%[in]), %%ymm13; vmovdqa 14*32(%[in]), %%ymm14\n\t"
		"vmovdqa 15*32(%[in]), %%ymm15\n\t"
		"syscall\n\t"
		"vmovdqa %%ymm0, 0*32(%[out]);  vmovdqa %%ymm1, 1*32(%[out]);  vmovdqa %%ymm2, 2*32(%[out])\n\t"
		"vmovdqa %%ymm3, 3*32(%[out]);  vmovdqa %%ymm4, 4*32(%[out]);  vmovdqa %%ymm5, 5*32(%[out])\n\t"
		"vmovdqa %%ymm6, 6*32(%[out]);  vmovdqa %%ymm7, 7*32(%[out]);  vmovdqa %%ymm8, 8*32(%[out])\n\t"
		"vmovdqa %%ymm9, 9*32(%[out]);  vmovdqa %%ymm10, 10*32(%[out]); vmovdqa %%ymm11, 11*32(%[out])\n\t"
		"vmovdqa %%ymm12, 12*32(%[out]); vmovdqa %%ymm13, 13*32(%[out]); vmovdqa %%ymm14, 14*32(%[out])\n\t"
		"vmovdqa %%ymm15, 15*32(%[out])\n\t"
		"fstpl %[number]\n\t"
		: "+a"(call), [number] "+m"(number)
		: [in] "r"(in), [out] "r"(out)
		: "rcx", "r11", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
		  "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
	return number;
}

/* 1 + 1/4 + 1/9 + ..., four terms at a time. */
static double sum_of_squares(int terms)
{
	__m256d sum = _mm256_setzero_pd(), one = _mm256_set1_pd(1), step = _mm256_set1_pd(4);
	__m256d n = _mm256_set_pd(4, 3, 2, 1);
	for (int i = 0; i < terms; i += 4, n = _mm256_add_pd(n, step))
		sum = _mm256_add_pd(sum, _mm256_div_pd(one, _mm256_mul_pd(n, n)));
	double parts[4];
	_mm256_storeu_pd(parts, sum);
	return parts[0] + parts[1] + parts[2] + parts[3];
}

static double seconds(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec * 1e-9;
}

int main(int count, char **argv)
{
	if (count != 3)
		return 2;
	long seed = atol(argv[1]), rounds = atol(argv[2]);
	registers in, out;
	double end = seconds() + 1. / 3;
	for (long round = 0; round < rounds || seconds() < end; round++) {
		double number = seed + round / 8.0;
		fill(in, seed * 1000003 + round + 1);
		memset(out, 0, sizeof out);
		double after = let_others_run(in, out, number);
		for (int i = 0; i < 16; i++)
			if (memcmp(in[i], out[i], sizeof in[i])) {
				printf("%ld: ymm%d has changed in round %ld\n", seed, i, round);
				return 1;
			}
		if (after != number) {
			printf("%ld: st(0) has changed in round %ld: %g instead of %g\n", seed, round, after, number);
			return 1;
		}
	}
	struct rusage usage;
	getrusage(RUSAGE_SELF, &usage);
	printf("%ld ok, %ld switches, sum %.15f\n", seed, usage.ru_nvcsw + usage.ru_nivcsw, sum_of_squares(1 << 22));
	return 0;
}
