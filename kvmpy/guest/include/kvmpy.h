/* All that kvmpy's machines offer to freestanding programs: ports, console, tests, the exit port, hypercalls. */

#ifndef KVMPY_H
#define KVMPY_H

#include <kvmpy/exit.h>
#include <kvmpy/hypercall.h>
#include <kvmpy/ktap.h>
#include <kvmpy/ports.h>
#include <kvmpy/serial.h>

#endif
