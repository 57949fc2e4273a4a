"""The torch backend's operations: chunked scan and convolution, and decode steps that torch.compile fuses."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mamba.ops import operators
from hf_mamba.ops.operands import ConvStep, Step
from hf_mamba.ops.reference import compute_dtype, negative_exp
from hf_mamba.ops.torch.norm import add_rms_norm, gated_rms_norm, rms_norm
from hf_mamba.ops.torch.scan import conv_backward, conv_forward, scan_backward, scan_forward
from hf_mamba.ops.torch.ssd import ssd_backward, ssd_forward, ssd_update

__all__ = [
    "add_rms_norm",
    "cannot_serve",
    "causal_conv1d",
    "causal_conv1d_update",
    "conv_backward",
    "conv_forward",
    "gated_rms_norm",
    "linear",
    "rms_norm",
    "scan_backward",
    "scan_forward",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_backward",
    "ssd_forward",
    "ssd_update",
    "unavailable",
]

linear = F.linear


def unavailable() -> str | None:
    return None


def cannot_serve(call) -> str | None:
    return None


selective_scan = functools.partial(operators.selective_scan, backend="torch")
causal_conv1d = functools.partial(operators.causal_conv1d, backend="torch")
ssd = functools.partial(operators.ssd, backend="torch")


def selective_state_update(s: Step) -> Tensor:
    dtype = compute_dtype(s.x.dtype)
    A = negative_exp(s.A) if s.A_is_log else s.A
    delta = s.dt.to(dtype)
    if s.dt_bias is not None:
        delta = delta + s.dt_bias.to(dtype)
    if s.dt_softplus:
        delta = F.softplus(delta)
    u = s.x.to(dtype)
    new = torch.exp(delta[..., None] * A.to(dtype)) * s.state.to(dtype)
    new = new + (delta * u)[..., None] * s.B.to(dtype)[:, None]  # (B, E, N)
    s.state.copy_(new)
    y = (new * s.C.to(dtype)[:, None]).sum(-1)
    if s.D is not None:
        y = y + u * s.D.to(dtype)
    if s.z is not None:
        y = y * F.silu(s.z.to(dtype))
    return y.to(s.x.dtype)


def causal_conv1d_update(s: ConvStep) -> Tensor:
    dtype = compute_dtype(s.x.dtype)
    window = torch.cat([s.state[..., 1:], s.x[..., None].to(s.state.dtype)], -1)  # (B, E, k)
    s.state.copy_(window)
    y = (window.to(dtype) * s.weight.to(dtype)).sum(-1)
    if s.bias is not None:
        y = y + s.bias.to(dtype)
    return (F.silu(y) if s.silu else y).to(s.x.dtype)
