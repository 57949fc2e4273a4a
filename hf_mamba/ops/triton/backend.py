"""The Triton backend: every operation as a PyTorch operator, differentiable and opaque to torch.compile.

Serves fp32, bf16 and fp16 on NVIDIA GPUs of compute capability 8.0 and later, packed documents and carried states
included; all arithmetic is fp32. With TRITON_INTERPRET=1 set before Triton is imported it runs on the CPU, for
tests.

Everything is deterministic: nothing is added up by atomics. Gradients of gradients are
not defined.
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_mamba.ops import operators
from hf_mamba.ops.operands import Conv, GatedNorm, Norm, Scan, Ssd
from hf_mamba.ops.torch import backend as torch_backend

__all__ = [
    "add_rms_norm",
    "cannot_serve",
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "linear",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_update",
    "unavailable",
]

LARGEST_STATE = {"selective_scan": 128, "selective_state_update": 128, "ssd": 256, "ssd_update": 256}
WIDEST_HEAD = 128  # channels of a head of ssd
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

linear = torch.nn.functional.linear


def interpreted() -> bool:
    """Triton's CPU interpreter was asked for (it reads the same variable when the kernels are imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why the backend cannot run on this machine, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); PyTorch's CUDA wheels bring it along."
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device."
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; Triton's kernels need 8.0 or later."
    return None


def cannot_serve(call) -> str | None:
    """Why this call (`dispatch.Call`) is not for this backend, or None."""
    device = "cpu" if interpreted() else "cuda"
    if call.device != device:
        return f"the tensors are on {call.device}; the Triton backend needs them on {device}."
    if call.dtype not in DTYPES:
        return f"{call.dtype} input; the Triton kernels take fp32, bf16 and fp16."
    largest = LARGEST_STATE.get(call.op)
    if largest is not None and not 1 <= call.states <= largest:
        return f"state size {call.states}; the Triton kernels hold 1 to {largest} states."
    if call.width > WIDEST_HEAD:
        return f"heads of {call.width} channels; the Triton kernels hold at most {WIDEST_HEAD}."
    return None


def _launched(name: str, module: str = "launch") -> Callable[..., Any]:
    """Makes a function of a launch module, imported at its first call: Triton costs time and has to be installed."""

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"hf_mamba.ops.triton.{module}"), name)(*arguments)

    return launch


scan_forward, scan_backward = _launched("scan_forward"), _launched("scan_backward")
conv_forward, conv_backward = _launched("conv_forward"), _launched("conv_backward")
norm_forward, norm_backward = _launched("norm_forward"), _launched("norm_backward")
scan_step, conv_step = _launched("scan_step"), _launched("conv_step")
ssd_forward, ssd_backward = _launched("ssd_forward", "ssd_launch"), _launched("ssd_backward", "ssd_launch")
gated_norm_forward = _launched("gated_norm_forward", "ssd_launch")
gated_norm_backward = _launched("gated_norm_backward", "ssd_launch")
_ssd_update = _launched("ssd_update", "ssd_launch")

selective_state_update = functools.partial(operators.selective_state_update, backend="triton")
causal_conv1d_update = functools.partial(operators.causal_conv1d_update, backend="triton")


def _kernels(x: Tensor) -> str:
    """The backend that computes: an empty call is torch's, since no kernel starts for nothing."""
    return "triton" if x.numel() else "torch"


def selective_scan(s: Scan) -> tuple[Tensor, Tensor]:
    return operators.selective_scan(s, _kernels(s.x))


def causal_conv1d(s: Conv) -> Tensor:
    return operators.causal_conv1d(s, _kernels(s.x))


def ssd(s: Ssd) -> tuple[Tensor, Tensor]:
    return operators.ssd(s, _kernels(s.x))


def ssd_update(state: Tensor, x: Tensor, a: Tensor, w: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling() or not x.numel():
        return torch_backend.ssd_update(state, x, a, w, B, C, D)  # inductor fuses it
    return _ssd_update(state, x, a, w, B, C, D)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    if not x.numel():
        return torch_backend.gated_rms_norm(x, z, weight, eps, groups)
    return operators.gated_norm(GatedNorm(x, z, weight, eps, groups), "triton")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not x.numel():
        return torch_backend.rms_norm(x, weight, eps)
    return operators.norm(Norm(x, None, weight, eps), "triton")[0]


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = hidden + residual, kept in fp32: a block's residual sum and norm in one pass."""
    if not hidden.numel():
        return torch_backend.add_rms_norm(hidden, residual, weight, eps)
    return operators.norm(Norm(hidden, residual, weight, eps), "triton")
