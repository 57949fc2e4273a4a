"""What this machine's processor can do, by the names of its instruction sets. No torch: a plan takes a moment."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

# They multiply bf16 at least as fast as fp32. Without one of them bf16 products take 27 to 30 times as long as fp32's.
BF16_UNITS = ("amx_bf16", "avx512_bf16")


def description() -> str:
    """The line of instruction sets in /proc/cpuinfo; the processor's name where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@functools.cache
def bf16_unit() -> str | None:
    """The instruction set that makes bf16 worth while on this processor; None where it has none."""
    have = set(description().split()) if Path("/proc/cpuinfo").exists() else _torch_names()
    return next((unit for unit in BF16_UNITS if unit in have), None)


def _torch_names() -> set[str]:
    import torch

    return {name for name, there in torch.cpu.get_capabilities().items() if there is True}
