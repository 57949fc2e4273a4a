"""The torch backend's operations: chunked scan and convolution, and decode steps that torch.compile fuses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mamba.ops import dual
from hf_mamba.ops import operators as library
from hf_mamba.ops.operands import Ssd
from hf_mamba.ops.reference import activate, compute_dtype, negative_exp
from hf_mamba.ops.torch.norm import add_rms_norm, gated_rms_norm, rms_norm
from hf_mamba.ops.torch.ssd import ssd_update

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

Optional = Tensor | None

linear = F.linear


def unavailable() -> str | None:
    return None


def cannot_serve(call) -> str | None:
    return None


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional = None,
    z: Optional = None,
    dt_bias: Optional = None,
    dt_softplus: bool = True,
    initial_state: Optional = None,
    seq_idx: Optional = None,
    return_final_state: bool = False,
    backend: str = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    floats = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floats)
    y, state, _ = library.selective_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, save, backend
    )
    return (y, state) if return_final_state else y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Optional = None,
    activation: str | None = "silu",
    initial_state: Optional = None,
    seq_idx: Optional = None,
    backend: str = "torch",
) -> Tensor:
    return library.causal_conv1d(x, weight, bias, activation == "silu", initial_state, seq_idx, backend)


def ssd(
    x: Tensor,
    a: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional = None,
    initial_state: Optional = None,
    seq_idx: Optional = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    y, state = dual.apply(Ssd(x, a, w, B, C, D, initial_state, seq_idx), "torch")
    return (y, state) if return_final_state else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional = None,
    z: Optional = None,
    dt_bias: Optional = None,
    dt_softplus: bool = True,
    A_is_log: bool = False,
) -> Tensor:
    dtype = compute_dtype(x.dtype)
    A = negative_exp(A) if A_is_log else A
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    u = x.to(dtype)
    new = torch.exp(delta[..., None] * A.to(dtype)) * state.to(dtype)
    new = new + (delta * u)[..., None] * B.to(dtype)[:, None]  # (B, E, N)
    state.copy_(new)
    y = (new * C.to(dtype)[:, None]).sum(-1)
    if D is not None:
        y = y + u * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Optional = None, activation: str | None = "silu"
) -> Tensor:
    dtype = compute_dtype(x.dtype)
    window = torch.cat([conv_state[..., 1:], x[..., None].to(conv_state.dtype)], -1)  # (B, E, k)
    conv_state.copy_(window)
    y = (window.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return activate(y, activation).to(x.dtype)
