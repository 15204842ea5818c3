/* Floating point as compilers make it: double, float, and long double on x87. `results` get the bits of what comes out.
   Built as a program of the host with -DHOST, and as a guest without it. */

typedef unsigned long long u64;

#define COUNT 20
#define SIZE 24

static volatile double seed = 1.25;
static double a[SIZE], b[SIZE];
static float f[SIZE], g[SIZE];
static int whole[SIZE];

static u64 bits(double value)
{
    union { double d; u64 u; } both = { .d = value };
    return both.u;
}

static u64 bits_of_long(long double value)
{
    union { long double d; u64 u[2]; } both = { .d = value };
    return both.u[0] ^ (both.u[1] & 0xffff) << 13;
}

static double root(double x)
{
    double y = x;
    for (int i = 0; i < 8; i++)
        y = 0.5 * (y + x / y);
    return y;
}

static void work(u64 *results)
{
    for (int i = 0; i < SIZE; i++) {
        a[i] = i * seed - 3.5;
        b[i] = 1 / (i + seed);
        f[i] = (float)(i / (seed * 7));
    }
    double dot = 0, largest = a[0];
    float least = f[0];
    int above = 0;
    long double sum = 0;
    for (int i = 0; i < SIZE; i++) {
        dot += a[i] * b[i];
        largest = a[i] * b[SIZE - 1 - i] > largest ? a[i] * b[SIZE - 1 - i] : largest;
        above += a[i] > b[i];
        g[i] = f[i] * f[i] - 1;
        least = g[i] < least ? g[i] : least;
        whole[i] = (int)(a[i] * 100);
        sum += (long double)a[i] / 3 - b[i] * sum;
    }
    float total = 0;
    for (int i = 0; i < SIZE; i++)
        total += f[i] / (g[i] + 3) + (float)whole[i];
    results[0] = bits(dot);
    results[1] = bits(largest);
    results[2] = bits(least);
    results[3] = above;
    results[4] = bits(total);
    results[5] = bits(root(seed + 0.75));
    results[6] = bits(__builtin_sqrt(seed));
    results[7] = (u64)(long long)(dot * 1e6);
    results[8] = bits((double)(long long)results[7] / 3);
    results[9] = bits(-dot);
    results[10] = bits(dot < 0 ? -dot : dot);
    results[11] = bits_of_long(sum);
    results[12] = bits_of_long(__builtin_sqrtl(sum * sum + 2));
    results[13] = sum > dot;
    results[14] = (u64)(long long)(sum * -1000);
    results[15] = bits((double)sum);
    results[16] = bits_of_long(-sum * whole[5]);
    results[17] = bits((float)sum + total);
    results[18] = (u64)whole[7] * whole[9];
    results[19] = bits(seed * (unsigned)whole[20]);
}

#ifdef HOST
#include <stdio.h>

int main(void)
{
    u64 results[COUNT];
    work(results);
    for (int i = 0; i < COUNT; i++)
        printf("%llx\n", results[i]);
}
#else
void _start(void)
{
    work((u64 *)0x300000);
    __asm__ volatile("outb %b0, $0xf4" : : "a"(1));
    for (;;)
        ;
}
#endif
