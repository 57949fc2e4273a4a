"""What this card does at most, measured, and the least time that an operation could take on it."""

import csv
import importlib.metadata
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_session.step import Context
from benchmarks.gpu_session.timing import Step, alternate
from hf_mamba.preflight.cost.duration import device_name
from hf_mamba.preflight.cost.gpus import peak_flops

COUNTS = Path(__file__).parents[1] / "results" / "triton_compile.csv"
EXPS = 16  # of a multiprocessor and cycle: CUDA C++ Programming Guide, table of arithmetic throughputs
ISSUED = 4 * 32  # instructions of a multiprocessor and cycle, one a lane
PACKAGES = ("torch", "triton", "transformers", "accelerate", "deepspeed", "datasets", "mamba-ssm", "causal-conv1d")


class Work(NamedTuple):
    """What one call cannot do without."""

    bytes: float = 0  # each operand and result once
    exps: float = 0
    instructions: float = 0  # counted in our machine code, not the least that there could be
    flops: float = 0  # of matrix products
    products: str = "bf16"


def measure(context: Context) -> None:
    """The card, its software, and its rates."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    count, clock, memory = 1, 1e9, 0
    if not context.rehearse:
        properties = torch.cuda.get_device_properties(0)
        count, memory = properties.multi_processor_count, properties.total_memory
        ask = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
        clock = 1e6 * float(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()[0])
    context.report("", "multiprocessors", count, "", note=f"{device_name()}; {', '.join(versions)}")
    context.report("", "memory", memory / 1e9, "GB", note=f"{os.cpu_count()} processors")
    context.report("", "exps", count * clock * EXPS / 1e9, "G/s", note=f"{clock / 1e6:.0f} MHz at most")
    context.report("", "instructions", count * clock * ISSUED / 1e9, "G/s")
    size, square = context.pick((2**32, 8192), (2**20, 64))
    source = torch.ones(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    steps: dict[str, Step] = {"copy": lambda: target.copy_(source)}
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
        a, b = (torch.randn(square, square, device=context.device, dtype=dtype) for _ in range(2))
        steps[f"products, {name}"] = partial(torch.mm, a, b)
    torch.backends.cuda.matmul.allow_tf32 = True
    for name, times in alternate(steps, context.pick(10, 1)).items():
        if name == "copy":
            context.report("", name, 2 * size / times.ms / 1e6, "GB/s", note=str(times))
            continue
        peak = peak_flops(device_name(), "bf16")
        peak = None if peak is None else peak / 1e12 / (2 if "tf32" in name else 1)
        context.report("", name, 2 * square**3 / times.ms / 1e9, "TFLOP/s", peak, str(times))


def least_ms(context: Context, work: Work) -> tuple[float | None, str]:
    """The greatest of the times that each unit needs for its part, and which unit that is; None without its rates."""
    rates = {name: context.figure(f"card//{name}") for name in ("copy", "exps", "instructions")}
    rates["products"] = 1e3 * (context.figure(f"card//products, {work.products}") or 0)
    needs = {"copy": work.bytes, "exps": work.exps, "instructions": work.instructions, "products": work.flops}
    times = {name: needs[name] / rate / 1e6 for name, rate in rates.items() if rate}
    if not times:
        return None, ""
    return max(times.values()), ", ".join(f"{name} {ms:.3f}" for name, ms in times.items() if ms)


def instructions_per_update(kernel: str) -> float:
    """Of the largest loop of a scan's kernel, as benchmarks.triton_compile counted it for sm_90 at N = 16; or 0."""
    with COUNTS.open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["variant"], row["kernel"], row["arch"], row["N"]) == ("training", kernel, "sm_90", "16"):
                return float(row["per_update"] or 0)
    return 0
