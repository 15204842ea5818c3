/* The end of the run, with a code: what kvmpy's debug-exit port gets. A test reads it as `exit_code`. */

#ifndef KVMPY_EXIT_H
#define KVMPY_EXIT_H

#include <kvmpy/ports.h>

#define KVMPY_DEBUG_EXIT 0xf4

static inline void __attribute__((noreturn)) kvmpy_exit(unsigned value)
{
    for (;;)
        kvmpy_out32(KVMPY_DEBUG_EXIT, value);
}

#endif
