"""Why the CPU kernels are C: the forward scan written for numba, beside the C one, on one thread, in one process.

    pip install numba && python -m benchmarks.numba_scan

The algorithm is the same (lanes are channels, a chunk of 32 steps at a time, the same polynomials, the same states
saved), and so are the results. Times are the thread's own, so other work on the machine counts less.
"""

import statistics
import sys
import time

import torch

try:
    import numba
    from llvmlite import ir
    from numba.extending import intrinsic
except ImportError:
    sys.exit("This comparison needs numba: pip install numba")
import numpy as np

from hf_mamba import ops

LANES, STEPS, STATES = 16, 32, 16
f32 = np.float32
LOW, MAGIC, LOG2E = f32(-126), f32(1.5 * 2**23), f32(1.4426950408889634)
E1, E2, E3, E4, E5 = (f32(c) for c in (0.69314698, 0.24022242, 0.05550734, 0.00967151, 0.00132647))
L1, L2, L3, L4 = (f32(c) for c in (0.33333208, 0.20010764, 0.14000902, 0.14005997))


@intrinsic
def bits(context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return numba.types.int32(numba.types.float32), generate


@intrinsic
def as_float(context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return numba.types.float32(numba.types.int32), generate


inlined = numba.njit(inline="always", fastmath={"contract"})


@inlined
def exp2(x):
    x = max(x, LOW)
    shifted = x + MAGIC
    f = x - (shifted - MAGIC)
    p = ((((E5 * f + E4) * f + E3) * f + E2) * f + E1) * f + f32(1)
    return as_float(bits(p) + (bits(shifted) << np.int32(23)))


@inlined
def softplus(x):
    w = exp2(-abs(x) * LOG2E)
    s = w / (w + f32(2))
    q = s * s
    return max(x, f32(0)) + f32(2) * s * ((((L4 * q + L3) * q + L2) * q + L1) * q + f32(1))


@numba.njit(fastmath={"contract"}, nogil=True, error_model="numpy")
def scan(x, dt, rates, B, C, D, z, bias, y, saved):
    """x, dt, z, y (L, E); rates (N, E), A log2(e); B, C (L, N); saved (chunks, N, E). L, E: multiples of 32 and 16."""
    length, width = x.shape
    state = np.zeros((width // LANES, STATES, LANES), np.float32)
    delta = np.empty((STEPS, LANES), np.float32)
    u, out = np.empty_like(delta), np.empty_like(delta)
    for chunk in range(length // STEPS):
        for block in range(width // LANES):
            e, t0 = block * LANES, chunk * STEPS
            for n in range(STATES):
                for i in range(LANES):
                    saved[chunk, n, e + i] = state[block, n, i]
            for t in range(STEPS):
                for i in range(LANES):
                    delta[t, i] = softplus(dt[t0 + t, e + i] + bias[e + i])
                    u[t, i] = delta[t, i] * x[t0 + t, e + i]
                    out[t, i] = D[e + i] * x[t0 + t, e + i]
            for n in range(STATES):
                h = state[block, n]
                for t in range(STEPS):
                    b, c = B[t0 + t, n], C[t0 + t, n]
                    for i in range(LANES):
                        h[i] = exp2(delta[t, i] * rates[n, e + i]) * h[i] + u[t, i] * b
                        out[t, i] += h[i] * c
            for t in range(STEPS):
                for i in range(LANES):
                    gate = z[t0 + t, e + i]
                    w = exp2(-abs(gate) * LOG2E)
                    y[t0 + t, e + i] = out[t, i] * gate * (f32(1) if gate > f32(0) else w) / (w + f32(1))


def main(length: int = 2048, width: int = 1536, rounds: int = 15) -> None:
    torch.set_num_threads(1)
    x, dt, z = torch.randn(length, width), torch.randn(length, width) - 4, torch.randn(length, width)
    B, C = torch.randn(length, STATES), torch.randn(length, STATES)
    A = -torch.arange(1.0, STATES + 1).repeat(width, 1)
    D, bias = torch.ones(width), torch.zeros(width)
    y, saved = torch.empty(length, width), torch.empty(length // STEPS, STATES, width)
    rates = (A.t() * float(LOG2E)).contiguous()
    arrays = [t.numpy() for t in (x, dt, rates, B, C, D, z, bias, y, saved)]
    inputs = [t[None].requires_grad_(t is x) for t in (x, dt)]  # a gradient is wanted: the states are saved

    def in_c() -> torch.Tensor:
        return ops.selective_scan(*inputs, A, B[None], C[None], D, z[None], bias)

    with ops.backend("cpu"):
        start = time.perf_counter()
        scan(*arrays)
        print(f"numba: first call {time.perf_counter() - start:.1f} s")
        error = (in_c()[0] - y).abs().max() / y.abs().max()
        times: dict[str, list[float]] = {"C": [], "numba": []}
        for _ in range(rounds):
            for name, run in (("C", in_c), ("numba", lambda: scan(*arrays))):
                start = time.thread_time()
                run()
                times[name].append(time.thread_time() - start)
    for name, values in times.items():
        print(f"{name:6s} {statistics.median(values) * 1e3:6.1f} ms, least {min(values) * 1e3:.1f}")
    ratio = statistics.median(b / a for a, b in zip(times["C"], times["numba"], strict=True))
    print(f"numba / C: {ratio:.2f}; largest difference of the results {error.item():.1e}")


if __name__ == "__main__":
    main()
