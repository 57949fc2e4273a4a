"""Floating-point operations of a token, by formula, and the peak rates of known GPUs.

A product with an (m, n) weight costs 2·m·n a token forward and twice that backward (input and weight gradients).
Symbols as in presets.py. tests/preflight/test_time.py holds the products against torch's FlopCounterMode, exactly.

Peak rates are the vendors' dense figures, without 2:4 sparsity, which data sheets from Hopper on and Ada's print in.
Every row was held against public tables that cite the data sheets, in November 2026: Lightning's
src/lightning/fabric/utilities/throughput.py (H100 SXM and PCIe, A100, V100, V100S, T4), nanochat's common.py (GB200,
B200, H200, H100 NVL, A40, L40S, L4, MI300X), composer's callbacks/speed_monitor.py (A10G: Lightning gives it the A10's
rate), glennklockwood.com/garden/processors (H100, B200), hpctech.co.jp (H100). Vector fp32 of the B200: NVIDIA's
comparison of GB200 NVL72 and HGX B200. A name that no row knows, or part of a GPU (MIG), has no peak here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Dense peak rates in TFLOP/s, without sparsity, by the vendor's data sheet; None where it has no such unit."""

    pattern: str  # of the name that the driver reports
    name: str
    bf16: float | None
    fp16: float | None
    fp32: float  # outside the tensor cores: PyTorch's default for fp32
    source: str
    memory_gb: int | None = None  # by the same sheet; None where cards of that name have several sizes


_HALF = "half of the figures with sparsity"

GPUS: tuple[Gpu, ...] = (  # the first that matches; a pattern begins and ends with a word
    Gpu(r"GB200", "GB200", 2500.0, 2500.0, 80.0, f"NVIDIA GB200 NVL72 data sheet ({_HALF})"),
    Gpu(r"B200", "B200", 2250.0, 2250.0, 75.0, f"NVIDIA HGX B200 data sheet ({_HALF})", 180),
    Gpu(r"H200 NVL", "H200 NVL", 835.5, 835.5, 60.0, f"NVIDIA H200 data sheet ({_HALF})", 141),
    Gpu(r"H200", "H200 SXM", 989.5, 989.5, 67.0, f"NVIDIA H200 data sheet ({_HALF})", 141),
    Gpu(r"H100.*PCIe", "H100 PCIe", 756.5, 756.5, 51.0, f"NVIDIA H100 data sheet ({_HALF})", 80),
    Gpu(r"H100.*NVL", "H100 NVL", 835.5, 835.5, 60.0, f"NVIDIA H100 NVL data sheet ({_HALF})", 94),
    Gpu(r"H100( SXM.*| .*HBM3)?", "H100 SXM", 989.5, 989.5, 67.0, f"NVIDIA H100 data sheet ({_HALF})", 80),
    Gpu(r"A100", "A100", 312.0, 312.0, 19.5, "NVIDIA A100 data sheet"),
    Gpu(r"A10G", "A10G", 70.0, 70.0, 35.0, "NVIDIA A10G data sheet, as AWS publishes it", 24),
    Gpu(r"A10", "A10", 125.0, 125.0, 31.2, "NVIDIA A10 data sheet", 24),
    Gpu(r"A40", "A40", 149.7, 149.7, 37.4, "NVIDIA A40 data sheet", 48),
    Gpu(r"L40S", "L40S", 362.05, 362.05, 91.6, "NVIDIA L40S data sheet", 48),
    Gpu(r"L4", "L4", 121.0, 121.0, 30.3, f"NVIDIA L4 data sheet ({_HALF})", 24),
    Gpu(r"V100S", "V100S", None, 130.0, 16.4, "NVIDIA V100 data sheet", 32),
    Gpu(r"V100.*PCIE", "V100 PCIe", None, 112.0, 14.0, "NVIDIA V100 data sheet"),
    Gpu(r"V100.*SXM2", "V100 SXM2", None, 125.0, 15.7, "NVIDIA V100 data sheet"),
    Gpu(r"T4", "T4", None, 65.0, 8.1, "NVIDIA T4 data sheet", 16),
    Gpu(
        r"RTX 4090(?! D| Laptop)",
        "RTX 4090",
        165.2,
        165.2,
        82.6,
        "NVIDIA Ada architecture paper, fp32 accumulation",
        24,
    ),
    Gpu(r"RTX 3090(?! Ti)", "RTX 3090", 71.0, 71.0, 35.6, "NVIDIA GA102 architecture paper, fp32 accumulation", 24),
    Gpu(r"MI300X", "MI300X", 1307.4, 1307.4, 163.4, "AMD MI300X data sheet", 192),
    Gpu(r"MI250X", "MI250X", 191.5, 191.5, 23.9, "AMD MI250X data sheet: a half, for one of its two devices", 64),
)


def find_gpu(device: str) -> Gpu | None:
    """The GPU of a driver's device name ("NVIDIA H100 80GB HBM3"), or None: an unknown device is not guessed."""
    if re.search(r"\bMIG\b", device):
        return None
    return next((gpu for gpu in GPUS if re.search(rf"\b(?:{gpu.pattern})\b", device, re.IGNORECASE)), None)


def memory_of(device: str) -> int | None:
    """A card's memory in bytes: the size that its name says ("A100-SXM4-80GB"), or its only one; None where unknown."""
    said = re.search(r"(?<![\w.])(\d+) ?GB\b", device, re.IGNORECASE)
    gpu = find_gpu(device)
    size = int(said[1]) if said else gpu.memory_gb if gpu else None
    return None if not size else size * 10**9


def peak_flops(device: str | None, dtype: str) -> float | None:
    """FLOP/s at the peak, or None where the device or its unit is unknown."""
    gpu = find_gpu(device) if device else None
    rate = getattr(gpu, dtype, None) if gpu else None
    return None if rate is None else rate * 1e12


def utilisation(
    flops_per_token: int, tokens_per_second: float, devices: int, device: str | None, dtype: str
) -> float | None:
    """MFU: the model's own operations over the devices' peak (PaLM, appendix B); recomputation does not count."""
    peak = peak_flops(device, dtype)
    return None if peak is None else flops_per_token * tokens_per_second / (devices * peak)
