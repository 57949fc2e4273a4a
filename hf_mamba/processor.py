"""What this machine's processor can do, by the names of its instruction sets. No torch: a plan takes a moment."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


def description() -> str:
    """The line of instruction sets in /proc/cpuinfo; the processor's name where there is none."""
    return _line("flags", "Features") or platform.processor()


def model() -> str:
    """The name that its maker gave it: "AMD EPYC 9B14"."""
    return _line("model name").partition(":")[2].strip() or platform.processor()


@functools.cache
def bf16_unit() -> str | None:
    """The instruction set by which products of bf16 are faster than those of fp32 here; None where they are not.

    AMD's avx512_bf16 does twice the fp32 operations of a cycle. Intel's does half of them (oneDNN's 2048 x 1024 x 1024
    on a Xeon of the fourth generation: 215 ms against 113 ms): there only amx_bf16 is faster.
    """
    have = _instruction_sets()
    if "amx_bf16" in have:
        return "amx_bf16"
    return "avx512_bf16" if "avx512_bf16" in have and _line("vendor_id").endswith("AuthenticAMD") else None


def bf16_slowdown() -> str:
    """How much longer a product of bf16 takes than one of fp32, where bf16_unit() is None."""
    return "about twice" if "avx512_bf16" in _instruction_sets() else "27 to 30 times"


def _instruction_sets() -> set[str]:
    """Of /proc/cpuinfo; where there is none, what torch finds out."""
    if flags := _line("flags", "Features"):
        return set(flags.split())
    import torch

    return {name for name, there in torch.cpu.get_capabilities().items() if there is True}


def _line(*beginnings: str) -> str:
    """The first line of /proc/cpuinfo that begins so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(beginnings)), "")
