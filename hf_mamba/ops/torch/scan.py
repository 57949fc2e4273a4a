"""The torch backend: scan and convolution in PyTorch operations, with memory that grows linearly in the length.

The scan walks the sequence in chunks of `CHUNK` steps. Within a chunk everything but the recurrence is one operation on
(B, T, N, E); the recurrence is one fused multiply-add per step. Between chunks only the state survives, so the saved
tensors are the inputs and one state per chunk; the backward replays a chunk from its state before differentiating it.
These are plain functions without autograd: ops/operators.py makes differentiable operators of them.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mamba.ops.operands import Conv, Scan
from hf_mamba.ops.reference import compute_dtype, document_starts
from hf_mamba.sizes import SCAN_CHUNK, ceil_div

CHUNK = SCAN_CHUNK["torch"]

Optional = Tensor | None


def _without_autocast(function: Callable) -> Callable:
    """Keep the matrix products inside at the precision they are written in."""

    @functools.wraps(function)
    def call(s: Scan, *rest):
        with torch.autocast(s.x.device.type, enabled=False):
            return function(s, *rest)

    return call


@_without_autocast
def scan_forward(s: Scan, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (B, L, E), the final state (B, E, N), and with `save` the state before each chunk (B, chunks, N, E)."""
    dtype = compute_dtype(s.x.dtype)
    batch, length, width = s.x.shape
    decay_rates = s.A.to(dtype).t().contiguous()  # (N, E): channels last, as in every temporary below
    states = decay_rates.shape[0]
    state = _first_state(s.initial_state, batch, states, width, s.x, dtype)
    starts = None if s.seq_idx is None else document_starts(s.seq_idx)
    chunks = ceil_div(length, CHUNK) if save else 0
    saved = s.x.new_empty(batch, chunks, states, width, dtype=dtype)
    y = s.x.new_empty(batch, length, width)
    for number, cut in _chunks(length):
        if save:
            saved[:, number] = state
        delta, _ = _step_size(s.dt[:, cut], s.dt_bias, s.dt_softplus, dtype)
        u = s.x[:, cut].to(dtype)
        decay = _decay(delta, decay_rates, starts, cut)
        history = _recurrence(decay, delta * u, s.B[:, cut].to(dtype), state)  # (s.B, T, N, E)
        state = history[:, -1].clone()
        out = torch.matmul(s.C[:, cut].to(dtype)[:, :, None], history)[:, :, 0]  # (s.B, T, E)
        if s.D is not None:
            out = out.addcmul_(u, s.D.to(dtype))
        if s.z is not None:
            out = out.mul_(F.silu(s.z[:, cut].to(dtype)))
        y[:, cut] = out
    return y, state.transpose(1, 2).contiguous(), saved


@_without_autocast
def scan_backward(s: Scan, saved: Tensor, grad_y: Optional, grad_final: Optional) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state; an empty tensor for each that was not given."""
    dtype = compute_dtype(s.x.dtype)
    batch, length, width = s.x.shape
    decay_rates = s.A.to(dtype).t().contiguous()  # (N, E)
    starts = None if s.seq_idx is None else document_starts(s.seq_idx)
    grad_x, grad_dt, grad_B, grad_C = (t.new_empty(t.shape) for t in (s.x, s.dt, s.B, s.C))
    grad_z = s.x.new_empty(0) if s.z is None else s.z.new_empty(s.z.shape)
    grad_rates = torch.zeros_like(decay_rates)
    grad_D, grad_bias = decay_rates.new_zeros(width), decay_rates.new_zeros(width)
    # the gradient of the state after the chunk; each chunk replaces it by that of the state before
    if grad_final is None:
        carry = decay_rates.new_zeros(batch, decay_rates.shape[0], width)
    else:
        carry = grad_final.to(dtype).transpose(1, 2).contiguous()
    for number, cut in reversed(list(_chunks(length))):
        delta, slope = _step_size(s.dt[:, cut], s.dt_bias, s.dt_softplus, dtype)
        u, b, c = s.x[:, cut].to(dtype), s.B[:, cut].to(dtype), s.C[:, cut].to(dtype)
        decay = _decay(delta, decay_rates, starts, cut)
        history = _recurrence(decay, delta * u, b, saved[:, number])  # (s.B, T, N, E)

        grad_out = torch.zeros_like(u) if grad_y is None else grad_y[:, cut].to(dtype)  # (s.B, T, E)
        if s.z is not None:
            gate = s.z[:, cut].to(dtype)
            sigmoid = torch.sigmoid(gate)
            out = torch.matmul(c[:, :, None], history)[:, :, 0]
            if s.D is not None:
                out = out.addcmul_(u, s.D.to(dtype))
            grad_z[:, cut] = grad_out * out * sigmoid * (1 + gate * (1 - sigmoid))
            grad_out = grad_out * gate * sigmoid
        if s.D is not None:
            grad_D += (grad_out * u).sum((0, 1))

        grad_C[:, cut] = torch.matmul(history, grad_out[..., None])[..., 0]
        grad_history = c[..., None] * grad_out[:, :, None]  # (s.B, T, N, E), from the outputs alone
        grad_history[:, -1] += carry
        for t in range(u.shape[1] - 2, -1, -1):
            grad_history[:, t].addcmul_(decay[:, t + 1], grad_history[:, t + 1])
        grad_B[:, cut] = torch.matmul(grad_history, (delta * u)[..., None])[..., 0]
        grad_drive = torch.matmul(b[:, :, None], grad_history)[:, :, 0]  # of Δ·s.x, (s.B, T, E)

        decay.mul_(grad_history)  # now the gradient of h_{t-1}
        carry = decay[:, 0].clone()
        decay[:, 1:].mul_(history[:, :-1])
        decay[:, 0].mul_(saved[:, number])  # now the gradient of Δ·s.A
        grad_rates += (decay * delta[:, :, None]).sum((0, 1))
        grad_delta = (decay * decay_rates).sum(2).addcmul_(grad_drive, u)
        grad_u = grad_drive * delta
        if s.D is not None:
            grad_u.addcmul_(grad_out, s.D.to(dtype))
        grad_delta = grad_delta if slope is None else grad_delta * slope
        grad_bias += grad_delta.sum((0, 1))
        grad_x[:, cut] = grad_u
        grad_dt[:, cut] = grad_delta
    return (
        grad_x,
        grad_dt,
        as_gradient(grad_rates.t(), s.A),
        grad_B,
        grad_C,
        as_gradient(grad_D, s.D),
        grad_z,
        as_gradient(grad_bias, s.dt_bias),
        as_gradient(carry.transpose(1, 2), s.initial_state),
    )


def conv_forward(s: Conv, save: bool) -> tuple[Tensor, Tensor]:
    """The causal convolution as k shifted multiply-adds, (B, L, E); nothing is saved."""
    out = _conv_linear(s)
    return (F.silu(out) if s.silu else out).to(s.x.dtype), s.x.new_empty(0)


def conv_backward(s: Conv, saved: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, initial_state; an empty tensor for each that was not given."""
    dtype = compute_dtype(s.x.dtype)
    length, taps = s.x.shape[1], s.weight.shape[1]
    grad = _before_silu(grad_y.to(dtype), s) if s.silu else grad_y.to(dtype)
    padded = _with_history(s.x, s.initial_state, taps, dtype)
    grad_padded = torch.zeros_like(padded)
    grad_weight = s.weight.new_empty(s.weight.shape, dtype=dtype)
    for tap, mask in _taps(s.x, taps, s.seq_idx):
        masked = grad if mask is None else grad * mask
        grad_padded[:, tap : tap + length].addcmul_(masked, s.weight[:, tap].to(dtype))
        grad_weight[:, tap] = (masked * padded[:, tap : tap + length]).sum((0, 1))
    return (
        as_gradient(grad_padded[:, taps - 1 :], s.x),
        as_gradient(grad_weight, s.weight),
        as_gradient(grad.sum((0, 1)), s.bias),
        as_gradient(grad_padded[:, : taps - 1].transpose(1, 2), s.initial_state),
    )


def _before_silu(grad: Tensor, s: Conv) -> Tensor:
    """The gradient of the convolution's sum; what it takes is gone when it returns."""
    out = _conv_linear(s)
    sigmoid = torch.sigmoid(out)
    return grad * sigmoid * (1 + out * (1 - sigmoid))


def _chunks(length: int) -> Iterator[tuple[int, slice]]:
    for number, start in enumerate(range(0, length, CHUNK)):
        yield number, slice(start, min(start + CHUNK, length))


def _first_state(initial: Optional, batch: int, states: int, width: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N, E)"""
    if initial is None:
        return x.new_zeros(batch, states, width, dtype=dtype)
    return initial.to(dtype).transpose(1, 2).contiguous()


def _step_size(dt: Tensor, bias: Optional, softplus: bool, dtype: torch.dtype) -> tuple[Tensor, Optional]:
    """Δ and dΔ/d(dt), both (B, T, E); None stands for a derivative of one."""
    raw = dt.to(dtype)
    if bias is not None:
        raw = raw + bias.to(dtype)
    return (F.softplus(raw), torch.sigmoid(raw)) if softplus else (raw, None)


def _decay(delta: Tensor, decay_rates: Tensor, starts: Optional, cut: slice) -> Tensor:
    """exp(Δ A), zero where a document starts, (B, T, N, E)."""
    decay = torch.exp_(delta[:, :, None] * decay_rates)
    return decay if starts is None else decay.masked_fill_(starts[:, cut, None, None], 0.0)


def _recurrence(decay: Tensor, drive: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """All states of a chunk: h_t = decay_t h_{t-1} + B_t (Δx)_t, (B, T, N, E)."""
    history = b[..., None] * drive[:, :, None]
    history[:, 0].addcmul_(decay[:, 0], state)
    for t in range(1, history.shape[1]):
        history[:, t].addcmul_(decay[:, t], history[:, t - 1])
    return history


def as_gradient(value: Tensor, of: Optional) -> Tensor:
    """A dense copy in the dtype of what it is the gradient of: an operator's outputs must not share memory."""
    if of is None:
        return value.new_empty(0)
    return value.to(of.dtype, copy=True, memory_format=torch.contiguous_format)


def _with_history(x: Tensor, initial: Optional, taps: int, dtype: torch.dtype) -> Tensor:
    """x with the k-1 inputs before it, (B, k-1+L, E)."""
    if initial is None:
        return F.pad(x.to(dtype), (0, 0, taps - 1, 0))
    return torch.cat([initial.to(dtype).transpose(1, 2), x.to(dtype)], 1)


def _taps(x: Tensor, taps: int, seq_idx: Optional) -> Iterator[tuple[int, Optional]]:
    """Each tap with the mask (B, L, 1) of the tokens whose document it stays in."""
    if seq_idx is None:
        yield from ((tap, None) for tap in range(taps))
        return
    # what came before the row belongs to its first document, number 0
    document = F.pad(document_starts(seq_idx).cumsum(1), (taps - 1, 0))
    for tap in range(taps):
        same = document[:, tap : tap + x.shape[1]] == document[:, taps - 1 :]
        yield tap, same[..., None]


def _conv_linear(s: Conv) -> Tensor:
    """The convolution before its activation, (B, L, E)."""
    dtype = compute_dtype(s.x.dtype)
    length, taps = s.x.shape[1], s.weight.shape[1]
    padded = _with_history(s.x, s.initial_state, taps, dtype)
    out = torch.zeros_like(s.x, dtype=dtype) if s.bias is None else s.bias.to(dtype).expand(s.x.shape).clone()
    for tap, mask in _taps(s.x, taps, s.seq_idx):
        window = padded[:, tap : tap + length]
        out.addcmul_(window if mask is None else window * mask, s.weight[:, tap].to(dtype))
    return out
