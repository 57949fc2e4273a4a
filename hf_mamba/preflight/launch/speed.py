"""What this machine reaches, for `hf-mamba env`: matrix products by dtype, memory, the scan. It takes a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

BUDGET_S = 1.0  # of each measurement, after its first call
ROWS, WIDTH = 2048, 1024  # of the matrix products: a row of 2048 tokens and a layer of a small model
COPIED = 256 * 2**20  # bytes: more than any cache holds
SCANNED = (1, 1024, 1536, 16)  # rows, length, channels, states: a layer of the 130m presets


def measured() -> list[dict[str, Any]]:
    """[{"what", "dtype", "value", "unit"}], on the GPU where there is one, else on this process's CPU threads.

    The scan counts forward and backward.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rate = 2 * ROWS * WIDTH * WIDTH / _seconds(_product(device, dtype))
        found.append({"what": "matrix products", "dtype": name, "value": round(rate / 1e9, 1), "unit": "GFLOP/s"})
    rate = 2 * COPIED / _seconds(_copy(device))
    found.append({"what": "memory, read and written", "dtype": "", "value": round(rate / 1e9, 1), "unit": "GB/s"})
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rate = SCANNED[0] * SCANNED[1] / _seconds(_scan(device, dtype))
        found.append({"what": "scan of a 130m layer", "dtype": name, "value": round(rate), "unit": "tokens/s"})
    return found


def _seconds(call: Callable[[], object]) -> float:
    """The least time of a call, over those that fit in the budget and one at least."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()  # compiles, and touches the memory
    times = [once()]
    while sum(times) < BUDGET_S:
        times.append(once())
    return min(times)


def _product(device: str, dtype: Any) -> Callable[[], object]:
    import torch

    left = torch.ones(ROWS, WIDTH, device=device, dtype=dtype)
    right = torch.ones(WIDTH, WIDTH, device=device, dtype=dtype)
    return lambda: left @ right


def _copy(device: str) -> Callable[[], object]:
    import torch

    here = torch.ones(COPIED, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return lambda: there.copy_(here)


def _scan(device: str, dtype: Any) -> Callable[[], object]:
    import torch

    from hf_mamba.ops import selective_scan

    rows, length, channels, states = SCANNED

    def operand(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.1, device=device, dtype=dtype, requires_grad=True)

    x, dt, z = (operand(rows, length, channels) for _ in range(3))
    b, c = (operand(rows, length, states) for _ in range(2))
    decay = torch.full((channels, states), -1.0, device=device, requires_grad=True)

    def step() -> None:
        y = selective_scan(x, dt, decay, b, c, z=z)
        assert isinstance(y, torch.Tensor)
        y.sum().backward()

    return step
