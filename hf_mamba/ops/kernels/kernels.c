/* The cpu backend's kernels: selective scan, state space dual, causal convolution, a decode step of each, norms, thin
 * products.
 *
 * Lanes are channels, time is serial, the states stay in registers. Plain C with GCC vector extensions (GCC or Clang,
 * any architecture); build.py compiles it for one state size STATES and defines STEPS, CHUNK, GROUP, ROWS and MAX_TAPS
 * from sizes.py. No runtime, no threads of its own: a kernel is a function that takes units of work from a shared counter
 * until none is left, and any number of threads may run it.
 * A unit and its order of summation do not depend on the number of threads, so results do not either.
 * -ffast-math must stay off: it breaks the exponential.
 */

#include "lanes.h"

#include "scan.c"

#include "convolution.c"

#include "ssd.c"

#include "gated_norm.c"

#include "decode.c"

#include "layout.c"
