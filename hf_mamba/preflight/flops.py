"""Floating-point operations of a token, by formula, and the peak rates of known GPUs.

A product with an (m, n) weight costs 2·m·n a token forward and twice that backward (input and weight gradients).
Symbols as in presets.py. tests/preflight/test_time.py holds the products against torch's FlopCounterMode, exactly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_mamba.presets import Geometry


@dataclass(frozen=True)
class TokenFlops:
    """Operations of one token, forward; `total` and `recomputed` are those of a training step."""

    gemm: int  # in_proj, x_proj, dt_proj, out_proj of all blocks
    scan: int  # 9·E·N + 6·E a block: exp(Δ A), its product, h, C·h; Δ x, D x and the gate
    conv: int  # 2·E·k a block
    head: int  # d·V
    out_proj: int  # the part of gemm that closes a block

    @property
    def forward(self) -> int:
        return self.gemm + self.scan + self.conv + self.head

    @property
    def training(self) -> int:
        """Forward and backward: the model's own operations, which MFU counts."""
        return 3 * self.forward

    def executed(self, gradient_checkpointing: bool) -> int:
        """With the blocks' forward once more where they are recomputed.

        Neither the head, nor out_proj: checkpointing stops at the last tensor that the backward needs.
        """
        return self.training + (self.forward - self.head - self.out_proj if gradient_checkpointing else 0)


def token_flops(g: Geometry) -> TokenFlops:
    """Operations of one token. The scan's 9·E·N follows the count of Mamba's own kernels (Δ·A, exp, Δ·B·x, h, C·h)."""
    d, E, N, R = g.hidden_size, g.intermediate_size, g.state_size, g.time_step_rank
    block = d * 2 * E + E * (R + 2 * N) + R * E + E * d
    layers = g.num_hidden_layers
    return TokenFlops(
        gemm=2 * layers * block,
        scan=layers * (9 * E * N + 6 * E),
        conv=layers * 2 * E * g.conv_kernel,
        head=2 * d * g.vocab_size,
        out_proj=2 * layers * E * d,
    )


@dataclass(frozen=True)
class Gpu:
    """Dense peak rates in TFLOP/s, without sparsity, by the vendor's data sheet; None where it has no such unit."""

    pattern: str  # of the name that the driver reports
    name: str
    bf16: float | None
    fp16: float | None
    fp32: float  # outside the tensor cores: PyTorch's default for fp32
    source: str


GPUS: tuple[Gpu, ...] = (
    Gpu(r"H200", "H200 SXM", 989.5, 989.5, 67.0, "NVIDIA H200 data sheet (half of the figures with sparsity)"),
    Gpu(r"H100.*PCIe", "H100 PCIe", 756.0, 756.0, 51.0, "NVIDIA H100 data sheet (half of the figures with sparsity)"),
    Gpu(r"H100.*NVL", "H100 NVL", 835.5, 835.5, 60.0, "NVIDIA H100 NVL data sheet (half of the figures with sparsity)"),
    Gpu(r"H100", "H100 SXM", 989.5, 989.5, 67.0, "NVIDIA H100 data sheet (half of the figures with sparsity)"),
    Gpu(r"B200(?!.*GB)", "B200", 2250.0, 2250.0, 75.0, "NVIDIA DGX B200 data sheet (an eighth of its dense figures)"),
    Gpu(r"A100", "A100", 312.0, 312.0, 19.5, "NVIDIA A100 data sheet"),
    Gpu(r"A10G", "A10G", 70.0, 70.0, 35.0, "NVIDIA A10G data sheet, as AWS publishes it"),
    Gpu(r"A10\b", "A10", 125.0, 125.0, 31.2, "NVIDIA A10 data sheet"),
    Gpu(r"A40\b", "A40", 149.7, 149.7, 37.4, "NVIDIA A40 data sheet"),
    Gpu(r"L40S", "L40S", 362.05, 362.05, 91.6, "NVIDIA L40S data sheet"),
    Gpu(r"L4\b", "L4", 121.0, 121.0, 30.3, "NVIDIA L4 data sheet (half of the figures with sparsity)"),
    Gpu(r"V100.*PCIE", "V100 PCIe", None, 112.0, 14.0, "NVIDIA V100 data sheet"),
    Gpu(r"V100", "V100 SXM2", None, 125.0, 15.7, "NVIDIA V100 data sheet"),
    Gpu(r"T4\b", "T4", None, 65.0, 8.1, "NVIDIA T4 data sheet"),
    Gpu(r"RTX 4090(?! D| Laptop)", "RTX 4090", 165.2, 165.2, 82.6, "NVIDIA Ada architecture paper, fp32 accumulation"),
    Gpu(r"RTX 3090(?! Ti)", "RTX 3090", 71.0, 71.0, 35.6, "NVIDIA GA102 architecture paper, fp32 accumulation"),
    Gpu(r"MI300X", "MI300X", 1307.4, 1307.4, 163.4, "AMD MI300X data sheet"),
    Gpu(r"MI250X", "MI250X", 383.0, 383.0, 47.9, "AMD MI250X data sheet"),
)


def find_gpu(device: str) -> Gpu | None:
    """The GPU of a driver's device name ("NVIDIA H100 80GB HBM3"), or None: an unknown device is not guessed."""
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, device, re.IGNORECASE)), None)


def peak_flops(device: str | None, dtype: str) -> float | None:
    """FLOP/s at the peak, or None where the device or its unit is unknown."""
    gpu = find_gpu(device) if device else None
    rate = getattr(gpu, dtype, None) if gpu else None
    return None if rate is None else rate * 1e12


def utilisation(g: Geometry, tokens_per_second: float, devices: int, device: str | None, dtype: str) -> float | None:
    """MFU: the model's own operations over the devices' peak (PaLM, appendix B); recomputation does not count."""
    peak = peak_flops(device, dtype)
    return None if peak is None else token_flops(g).training * tokens_per_second / (devices * peak)
