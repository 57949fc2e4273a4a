"""The definitions: every operation as a plain PyTorch loop, in any dtype, on any device.

Nothing here is fast. Every other backend is tested against these functions, run in float64; ops/public.py documents
the arguments.

Symbols follow "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao, 2023): B batch, L length,
E inner width, N state size, k convolution kernel, Δ (`dt`) the input-dependent step. `seq_idx` (B, L) numbers the
packed documents of a row: wherever it changes, a new document starts and nothing may flow across.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mamba.ops.operands import Conv, ConvStep, Scan, Ssd, Step


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: fp32 for every storage dtype but float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def document_starts(seq_idx: Tensor) -> Tensor:
    """(B, L) bool: True where a new document begins. Never at t = 0, which continues the carried state."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


def selective_scan(s: Scan) -> tuple[Tensor, Tensor]:
    """The selective state space, step by step (paper, equations 2a-2b with the discretisation of its Algorithm 2).

        Δ_t = softplus(dt_t + dt_bias)
        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t
        y_t = (C_t · h_t + D x_t) · silu(z_t)

    Returns:
        y (B, L, E) in x's dtype, and the state after the last token (B, E, N) in fp32 (fp64 for fp64 input).
    """
    dtype = compute_dtype(s.x.dtype)
    delta = s.dt.to(dtype)
    if s.dt_bias is not None:
        delta = delta + s.dt_bias.to(dtype)
    if s.dt_softplus:
        delta = F.softplus(delta)
    u, A, B, C = s.x.to(dtype), s.A.to(dtype), s.B.to(dtype), s.C.to(dtype)
    batch, length, width = u.shape
    state = u.new_zeros(batch, width, A.shape[1]) if s.initial_state is None else s.initial_state.to(dtype)
    starts = None if s.seq_idx is None else document_starts(s.seq_idx)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None], 0.0)
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, E, N)
        state = decay * state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else u.new_zeros(batch, 0, width)
    if s.D is not None:
        y = y + u * s.D.to(dtype)
    if s.z is not None:
        y = y * F.silu(s.z.to(dtype))
    return y.to(s.x.dtype), state


def causal_conv1d(s: Conv) -> Tensor:
    """Depthwise causal convolution, y_t = act(bias + Σ_j weight_j x_{t-k+1+j}), over one document at a time."""
    dtype = compute_dtype(s.x.dtype)
    batch, length, width = s.x.shape
    taps = s.weight.shape[1]
    if s.initial_state is None:
        before = s.x.new_zeros(batch, taps - 1, width, dtype=dtype)
    else:
        before = s.initial_state.to(dtype).transpose(1, 2)  # (B, k-1, E)
    padded = torch.cat([before, s.x.to(dtype)], 1)
    if s.seq_idx is not None:
        # document 0 of the row is whatever came before it, too
        document = F.pad(document_starts(s.seq_idx).cumsum(1), (taps - 1, 0))
    y = s.x.new_zeros(batch, length, width, dtype=dtype)
    for j in range(taps):
        tap = padded[:, j : j + length]
        if s.seq_idx is not None:
            same = document[:, j : j + length] == document[:, taps - 1 :]
            tap = tap * same[..., None]
        y = y + tap * s.weight[:, j].to(dtype)
    if s.bias is not None:
        y = y + s.bias.to(dtype)
    return (F.silu(y) if s.silu else y).to(s.x.dtype)


def negative_exp(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in the dtype of the arithmetic."""
    return -torch.exp(A_log.to(compute_dtype(A_log.dtype)))


def selective_state_update(s: Step) -> Tensor:
    """One step of `selective_scan`, with the state replaced in place."""
    A = negative_exp(s.A) if s.A_is_log else s.A
    x, dt, B, C = (t[:, None] for t in (s.x, s.dt, s.B, s.C))
    z = None if s.z is None else s.z[:, None]
    y, state = selective_scan(Scan(x, dt, A, B, C, s.D, z, s.dt_bias, s.state, None, s.dt_softplus))
    s.state.copy_(state)
    return y[:, 0]


def causal_conv1d_update(s: ConvStep) -> Tensor:
    """One step of `causal_conv1d`: pushes x into the state in place and returns the output (B, E)."""
    s.state.copy_(torch.cat([s.state[..., 1:], s.x[..., None].to(s.state.dtype)], -1))
    return causal_conv1d(Conv(s.x[:, None], s.weight, s.bias, s.state[..., :-1], None, s.silu))[:, 0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, weight · x / sqrt(mean(x²) + eps), statistics in fp32; returns weight's dtype."""
    dtype = compute_dtype(x.dtype)
    x = x.to(dtype)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (weight.to(dtype) * x).to(weight.dtype)


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = residual + hidden in the wider of their dtypes."""
    total = residual + hidden
    return rms_norm(total, weight, eps), total


def ssd(s: Ssd) -> tuple[Tensor, Tensor]:
    """The state space dual, step by step ("Transformers are SSMs", Dao & Gu 2024): one decay per head and step.

        h_t = exp(a_t) h_{t-1} + w_t x_t B_tᵀ
        y_t = h_t C_t + D x_t

    Returns:
        y (B, L, H, P) in x's dtype, and the state after the last token (B, H, P, N) in fp32 (fp64 for fp64 input).
    """
    dtype = compute_dtype(s.x.dtype)
    batch, length, heads, width = s.x.shape
    u, decay, weight = s.x.to(dtype), torch.exp(s.a.to(dtype)), s.w.to(dtype)
    B, C = (t.to(dtype).repeat_interleave(heads // t.shape[2], 2) for t in (s.B, s.C))  # (B, L, H, N)
    state = u.new_zeros(batch, heads, width, B.shape[3]) if s.initial_state is None else s.initial_state.to(dtype)
    starts = None if s.seq_idx is None else document_starts(s.seq_idx)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None, None], 0.0)
        drive = (weight[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]  # (B, H, P, N)
        state = decay[:, t, :, None, None] * state + drive
        outputs.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else u.new_zeros(batch, 0, heads, width)
    if s.D is not None:
        y = y + u * s.D.to(dtype)[:, None]
    return y.to(s.x.dtype), state


def ssd_update(state: Tensor, x: Tensor, a: Tensor, w: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """One step of `ssd`: updates `state` (B, H, P, N) in place. x: (B, H, P); a, w: (B, H); B, C: (B, G, N)."""
    y, new_state = ssd(Ssd(x[:, None], a[:, None], w[:, None], B[:, None], C[:, None], D, state))
    state.copy_(new_state)
    return y[:, 0]


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """RMSNorm of x silu(z) over each of `groups` equal parts of the last axis, times weight; returns x's dtype."""
    dtype = compute_dtype(x.dtype)
    gated = (x.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (groups, -1))
    gated = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (gated.flatten(-2) * weight.to(dtype)).to(x.dtype)


linear = F.linear


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    num_items: Tensor | int | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` against labels, with the whole logits in memory.

    Args:
        hidden: (M, d). weight: (V, d). bias: (V,). labels: (M,) int64; `ignore_index` rows do not count.
        num_items: divide the sum by this instead of by the number of rows that count (gradient accumulation).
        z_loss: weight of logsumexp², which keeps the logits from drifting (PaLM, section 5).

    Returns:
        A scalar, fp32 or float64.
    """
    dtype = compute_dtype(hidden.dtype)
    logits = F.linear(hidden, weight, bias).to(dtype)  # (M, V)
    counted = labels != ignore_index
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    if z_loss:
        loss = loss + z_loss * (torch.logsumexp(logits, -1).square() * counted).sum()
    return loss / (counted.sum() if num_items is None else num_items)


def gradients(definition: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Tensor | None]) -> list[Any]:
    """The gradients of a definition, to be differentiated again, where fused ones are constants to autograd.

    Args:
        definition: called with the inputs; returns a tensor or several.
        inputs: any values. grads: those of the results, None where there is none.

    Returns:
        One for each input, None where it wants none.
    """
    with torch.enable_grad():
        # aliases, because an input may be computed from another one, and partial derivatives are asked for
        inputs = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
        results = definition(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    given = [number for number, grad in enumerate(grads) if grad is not None]
    outputs, weights = [results[n] for n in given], [grads[n] for n in given]
    wanted = [isinstance(t, Tensor) and t.requires_grad for t in inputs]
    tensors = [t for t, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(outputs, tensors, weights, create_graph=True, allow_unused=True))
    return [next(found) if is_wanted else None for is_wanted in wanted]


def unavailable() -> str | None:
    """The definitions run everywhere."""
    return None


def cannot_serve(call: object) -> str | None:
    """The definitions serve every call."""
    return None
