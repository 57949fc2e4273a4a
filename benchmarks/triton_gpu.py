"""The Triton kernels beside mamba-ssm's and causal-conv1d's CUDA kernels: one GPU, one process, in alternation.

    python -m benchmarks.triton_gpu [--dtype bf16] [--repeats 20] [--out triton_gpu.csv]

`measure` is what `benchmarks.run gpu` calls. Each contender gets its inputs in its own layout, so no transposition is
timed. The scan is also timed at fixed numbers of segments, to check the rule in `triton_launch.split`.
"""

import argparse
import csv
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

# (B, L, E, N): the 2.8B model's layer at a full batch, the 130M's, long and short sequences, one document
SHAPES = (
    (8, 2048, 5120, 16),
    (8, 2048, 1536, 16),
    (1, 2048, 5120, 16),
    (1, 2048, 1536, 16),
    (1, 32768, 1536, 16),
    (64, 512, 1536, 16),
    (2, 2048, 1536, 64),
)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
Step = Callable[[], object]


def measure(
    shapes: tuple[tuple[int, int, int, int], ...] = SHAPES, dtype: str = "bf16", repeats: int = 20
) -> list[dict[str, object]]:
    """Rows of operation, shape, contender, phase ("forward" or "backward"), median, least and greatest milliseconds."""
    import torch

    table: list[dict[str, object]] = []
    for shape in shapes:
        for operation, contenders in (("scan", scan_contenders), ("convolution", conv_contenders)):
            steps = contenders(shape, getattr(torch, DTYPES[dtype]))
            for phase in ("forward", "backward"):
                times = alternate({name: pair[phase == "backward"] for name, pair in steps.items()}, repeats)
                table += [
                    {
                        "operation": operation,
                        "B,L,E,N": ",".join(map(str, shape)),
                        "dtype": dtype,
                        "contender": name,
                        "phase": phase,
                        "median_ms": round(statistics.median(ms), 4),
                        "least_ms": round(min(ms), 4),
                        "greatest_ms": round(max(ms), 4),
                    }
                    for name, ms in times.items()
                ]
            del steps
            torch.cuda.empty_cache()
    return table


def alternate(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every step, one run of each in turn, after warm-up."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-3, repeats):
        for name, step in steps.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            step()
            end.record()
            end.synchronize()
            if turn >= 0:
                times[name].append(begin.elapsed_time(end))
    return times


def forward_and_backward(function: Callable, inputs: list) -> tuple[Step, Step]:
    """A forward that saves for the backward, and a backward through a graph that is kept."""
    import torch

    for value in inputs:
        value.requires_grad_()
    y = function(*inputs)
    grad = torch.randn_like(y)
    return lambda: function(*inputs), lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def scan_contenders(shape: tuple[int, int, int, int], dtype) -> dict[str, tuple[Step, Step]]:
    import torch

    from hf_mamba.ops import triton_backend

    batch, length, width, states = shape
    x, dt, z = (torch.randn(batch, length, width, device="cuda", dtype=dtype) for _ in range(3))
    B, C = (torch.randn(batch, length, states, device="cuda", dtype=dtype) for _ in range(2))
    A = -torch.arange(1, states + 1, device="cuda", dtype=torch.float32).repeat(width, 1)
    D, bias = torch.ones(width, device="cuda"), torch.randn(width, device="cuda") - 4
    ours = [x, dt, A, B, C, D, z, bias]

    def triton(segments: int) -> tuple[Step, Step]:
        return forward_and_backward(partial(triton_backend.selective_scan, segments=segments), ours)

    found = {"triton": triton(0)} | {f"triton, {s} segments": triton(s) for s in (1, 2, 4, 8) if s * 64 < length}
    if importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        u, delta, gate, Bt, Ct = (v.detach().transpose(1, 2).contiguous() for v in (x, dt, z, B, C))
        theirs = [u, delta, A.clone().detach(), Bt, Ct, D.clone().detach(), gate, bias.clone().detach()]
        found["mamba-ssm"] = forward_and_backward(lambda *v: selective_scan_fn(*v, delta_softplus=True), theirs)
    return found


def conv_contenders(shape: tuple[int, int, int, int], dtype) -> dict[str, tuple[Step, Step]]:
    import torch

    from hf_mamba.ops import triton_backend

    batch, length, width, _ = shape
    x = torch.randn(batch, length, width, device="cuda", dtype=dtype)
    weight, bias = (torch.randn(*size, device="cuda", dtype=dtype) for size in ((width, 4), (width,)))
    found = {"triton": forward_and_backward(triton_backend.causal_conv1d, [x, weight, bias])}
    if importlib.util.find_spec("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        theirs = [x.detach().transpose(1, 2).contiguous(), weight.clone().detach(), bias.clone().detach()]
        found["causal-conv1d"] = forward_and_backward(lambda *v: causal_conv1d_fn(*v, activation="silu"), theirs)
    return found


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("triton_gpu.csv"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch sees no CUDA device: there is nothing to measure here.", file=sys.stderr)
        return 1
    table = measure(dtype=options.dtype, repeats=options.repeats)
    for row in table:
        print(*row.values(), sep="  ")
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
