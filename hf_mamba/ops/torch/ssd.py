"""The torch backend's state space dual: chunks of `SSD_CHUNK` steps, all matrix products, memory linear in the length.

Within a chunk, with c_t the running sum of the log decays, S the state before it and S' the state after it:

    y_t = Σ_{s<=t} exp(c_t - c_s) (C_t · B_s) w_s x_s + exp(c_t) S C_t + D x_t
    S'  = exp(c_T) S + Σ_s exp(c_T - c_s) w_s x_s B_sᵀ

("Transformers are SSMs", Dao & Gu 2024, section 6.) Only S is kept, once per chunk. The heads of a group share B and C:
their products with S are one product with R·P columns, and nothing is repeated. These are plain functions without
autograd; ops/operators.py makes a differentiable operator of them.

Symbols: T steps of a chunk, G groups, R = H / G heads of a group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_mamba.ops.operands import Ssd
from hf_mamba.ops.reference import compute_dtype, document_starts
from hf_mamba.ops.sums import running_sum
from hf_mamba.ops.torch.scan import as_gradient
from hf_mamba.sizes import SSD_CHUNK, ceil_div

Optional = Tensor | None


def ssd_forward(s: Ssd, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (B, L, H, P), the final state (B, H, P, N), and with `save` the state before each chunk.

    The saved states are (B, chunks, H, P N).
    """
    batch, length, heads, width = s.x.shape
    groups, states = s.B.shape[2:]
    dtype = compute_dtype(s.x.dtype)
    state = _state(s, s.initial_state, dtype)
    y = s.x.new_empty(s.x.shape)
    saved = s.x.new_empty(batch, chunks(length) if save else 0, heads, width * states, dtype=dtype)
    documents = _documents(s.seq_idx)
    with torch.autocast(s.x.device.type, enabled=False):
        for number in range(chunks(length)):
            c = _chunk(s, number, documents, dtype)
            if save:
                saved[:, number] = state.view(batch, heads, width * states)
            out = (c.decay * c.products[:, :, None]) @ (c.x * c.w[..., None])  # (B, G, R, T, P)
            out += _by_head(c.C @ state.mT, c) * c.from_start[..., None]
            if s.D is not None:
                out.addcmul_(c.x, s.D.to(dtype).view(groups, -1, 1, 1))
            y[:, c.cut] = _by_token(out)
            state = _decayed(state, c) + _columns(c.x * (c.w * c.to_end)[..., None]).mT @ c.B
    final = state.reshape(batch, heads, width, states)
    return y, final if length else final.clone(), saved  # an output must not be an input


def ssd_backward(s: Ssd, saved: Tensor, grad_y: Optional, grad_final: Optional) -> tuple[Tensor, ...]:
    """Gradients of x, a, w, B, C, D, initial_state; an empty tensor for each that was not given.

    Each pair s <= t has e = (g_t · x_s) exp(c_t - c_s) (C_t · B_s) w_s, which it adds to the gradient of c_t and takes
    from the gradient of c_s; the states before and after the chunk do likewise. A log decay is part of every later sum.
    """
    batch, length, heads, width = s.x.shape
    groups, states = s.B.shape[2:]
    dtype = compute_dtype(s.x.dtype)
    grad_x, grad_a, grad_w, grad_B, grad_C = (t.new_empty(t.shape) for t in s[:5])
    grad_D = s.x.new_zeros(groups, heads // groups, dtype=dtype)
    carry = _state(s, grad_final, dtype)  # the gradient of the state after the chunk
    documents = _documents(s.seq_idx)
    with torch.autocast(s.x.device.type, enabled=False):
        for number in reversed(range(chunks(length))):
            c = _chunk(s, number, documents, dtype)
            state = saved[:, number].view(carry.shape)
            g = torch.zeros_like(c.x) if grad_y is None else _heads_first(grad_y[:, c.cut].to(dtype), groups)

            grad_v, grad_products, grad_w_pairs, grad_sum = _within(c, g)
            started = g * c.from_start[..., None]
            grad_sum += (_by_head(c.C @ state.mT, c) * started).sum(-1)
            started = _columns(started)
            grad_C[:, c.cut] = (grad_products @ c.B + started @ state).transpose(1, 2)

            ended = _by_head(c.B @ carry.mT, c) * c.to_end[..., None]  # (B, G, R, T, P)
            grad_v += ended
            grad_w_end = (ended * c.x).sum(-1)
            inputs = _columns(c.x * (c.w * c.to_end)[..., None])
            grad_B[:, c.cut] = (grad_products.mT @ c.C + inputs @ carry).transpose(1, 2)
            grad_sum -= grad_w_end * c.w
            after = _decayed(state, c) + inputs.mT @ c.B
            grad_sum[..., -1] += (after * carry).sum(-1).unflatten(2, (heads // groups, width)).sum(-1)

            grad_w[:, c.cut] = (grad_w_pairs + grad_w_end).flatten(1, 2).mT
            grad_log = running_sum(grad_sum.flip(-1)).flip(-1).flatten(1, 2).mT  # (B, T, H)
            grad_a[:, c.cut] = grad_log if c.starts is None else grad_log.masked_fill(c.starts[..., None], 0.0)
            grad_v *= c.w[..., None]
            if s.D is not None:
                grad_v.addcmul_(g, s.D.to(dtype).view(groups, -1, 1, 1))
                grad_D += (g * c.x).sum((0, 3, 4))
            grad_x[:, c.cut] = _by_token(grad_v)
            carry = _decayed(carry, c) + started.mT @ c.C
    return (
        *(grad_x, grad_a, grad_w, grad_B, grad_C),
        as_gradient(grad_D.flatten(), s.D),
        as_gradient(carry.view(batch, heads, width, states), s.initial_state),
    )


def ssd_update(state: Tensor, x: Tensor, a: Tensor, w: Tensor, B: Tensor, C: Tensor, D: Optional = None) -> Tensor:
    """One step, with `state` (B, H, P, N) replaced in place. x: (B, H, P); a, w: (B, H); B, C: (B, G, N)."""
    dtype = compute_dtype(x.dtype)
    batch, heads, width = x.shape
    grouped = (batch, B.shape[1], heads // B.shape[1])
    u = x.to(dtype).view(*grouped, width)
    decay, weight = a.to(dtype).exp().view(*grouped, 1, 1), w.to(dtype).view(*grouped, 1)
    new = state.to(dtype).reshape(*grouped, width, -1) * decay
    new = new + (u * weight)[..., None] * B.to(dtype)[:, :, None, None]  # (B, G, R, P, N)
    state.copy_(new.view(state.shape))
    y = (new * C.to(dtype)[:, :, None, None]).sum(-1)
    if D is not None:
        y = y + u * D.to(dtype).view(*grouped[1:], 1)
    return y.reshape(x.shape).to(x.dtype)


def chunks(length: int) -> int:
    return ceil_div(length, SSD_CHUNK)


class _Chunk(NamedTuple):
    """The operands of one chunk in the dtype of the arithmetic, and its decays; heads come before time."""

    cut: slice
    x: Tensor  # (B, G, R, T, P)
    w: Tensor  # (B, G, R, T)
    B: Tensor  # (B, G, T, N)
    C: Tensor  # (B, G, T, N)
    products: Tensor  # C_t · B_s, (B, G, T, T)
    decay: Tensor  # from s to t; zero where s > t and across documents, (B, G, R, T, T)
    from_start: Tensor  # of the state before the chunk, up to t; zero in later documents, (B, G, R, T)
    to_end: Tensor  # from s to the last step; zero in earlier documents, (B, G, R, T)
    starts: Optional  # a document starts here, (B, T)


def _chunk(s: Ssd, number: int, documents: Optional, dtype: torch.dtype) -> _Chunk:
    cut = slice(number * SSD_CHUNK, min((number + 1) * SSD_CHUNK, s.x.shape[1]))
    groups = s.B.shape[2]
    a, w = (t[:, cut].to(dtype).mT.unflatten(1, (groups, -1)) for t in (s.a, s.w))  # (B, G, R, T)
    B, C = (t[:, cut].to(dtype).transpose(1, 2) for t in (s.B, s.C))
    starts = edges = None
    steps = cut.stop - cut.start
    open_ = s.x.new_ones(steps, steps, dtype=torch.bool).tril_()
    if documents is not None:
        here = documents[:, cut]  # (B, T)
        before = documents[:, max(cut.start - 1, 0), None]
        starts = here != torch.cat([before, here[:, :-1]], 1)
        a = a.masked_fill(starts[:, None, None], 0.0)  # no pair uses it, and the sums stay small
        open_ = (open_ & (here[:, :, None] == here[:, None]))[:, None, None]
        edges = [(here == edge)[:, None, None] for edge in (before, here[:, -1:])]
    sums = running_sum(a)
    decay = (sums[..., None] - sums[..., None, :]).masked_fill_(~open_, -torch.inf).exp_()
    from_start, to_end = sums.exp(), (sums[..., -1:] - sums).exp()
    if edges is not None:
        from_start, to_end = from_start * edges[0], to_end * edges[1]
    return _Chunk(
        cut, _heads_first(s.x[:, cut].to(dtype), groups), w, B, C, C @ B.mT, decay, from_start, to_end, starts
    )


def _within(c: _Chunk, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the pairs of a chunk give to the gradients of w x, C · B, w and c_t."""
    grad_v = (c.decay * c.products[:, :, None]).mT @ g  # (B, G, R, T, P)
    pairs = (g @ c.x.mT).mul_(c.decay)  # (B, G, R, T, T)
    grad_products = (pairs * c.w[..., None, :]).sum(2)  # (B, G, T, T)
    pairs.mul_(c.products[:, :, None])
    grad_w = pairs.sum(-2)  # (B, G, R, T)
    grad_sum = (pairs @ c.w[..., None])[..., 0] - grad_w * c.w
    return grad_v, grad_products, grad_w, grad_sum


def _documents(seq_idx: Optional) -> Optional:
    """Numbers that grow at each change, (B, L): a number that comes back is a new document."""
    return None if seq_idx is None else document_starts(seq_idx).cumsum(1)


def _state(s: Ssd, state: Optional, dtype: torch.dtype) -> Tensor:
    """(B, G, R P, N), zeros when absent."""
    batch, _, heads, width = s.x.shape
    groups, states = s.B.shape[2:]
    shape = (batch, groups, heads // groups * width, states)
    return s.x.new_zeros(shape, dtype=dtype) if state is None else state.to(dtype).reshape(shape)


def _decayed(state: Tensor, c: _Chunk) -> Tensor:
    """The state (B, G, R P, N) after all of the chunk's decays."""
    return (state.unflatten(2, (c.w.shape[2], -1)) * c.from_start[..., -1, None, None]).flatten(2, 3)


def _heads_first(t: Tensor, groups: int) -> Tensor:
    """(B, T, H, P) as (B, G, R, T, P)."""
    return t.transpose(1, 2).unflatten(1, (groups, -1))


def _by_token(t: Tensor) -> Tensor:
    """(B, G, R, T, P) as (B, T, H, P)."""
    return t.flatten(1, 2).transpose(1, 2)


def _columns(t: Tensor) -> Tensor:
    """(B, G, R, T, P) as (B, G, T, R P)."""
    return t.transpose(2, 3).flatten(3)


def _by_head(t: Tensor, c: _Chunk) -> Tensor:
    """(B, G, T, R P) as (B, G, R, T, P)."""
    return t.unflatten(3, (c.w.shape[2], -1)).transpose(2, 3)
