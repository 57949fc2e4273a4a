"""The state space dual as a PyTorch operator: differentiable, and opaque to torch.compile.

One operator serves every backend that has `ssd_forward` and `ssd_backward`. It saves its inputs and one state per
chunk. Operators may not return None, so a gradient that nobody asked for leaves the backward operator as an empty
tensor.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_mamba.ops.operands import Ssd
from hf_mamba.ops.reference import compute_dtype
from hf_mamba.ops.torch import ssd as chunked

Optional = Tensor | None

IMPLEMENTATIONS: dict[str, ModuleType] = {"torch": chunked}


def apply(s: Ssd, backend: str) -> tuple[Tensor, Tensor]:
    """y (B, L, H, P) and the final state (B, H, P, N)."""
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in s[:7])
    return ssd(*s, save, backend)[:2]


@torch.library.custom_op("hf_mamba::ssd", mutates_args=())
def ssd(
    x: Tensor,
    a: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional,
    initial_state: Optional,
    seq_idx: Optional,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return IMPLEMENTATIONS[backend].ssd_forward(Ssd(x, a, w, B, C, D, initial_state, seq_idx), save)


@ssd.register_fake
def _(x, a, w, B, C, D, initial_state, seq_idx, save, backend):
    batch, length, heads, width = x.shape
    states, dtype = B.shape[3], compute_dtype(x.dtype)
    chunks = chunked.chunks(length) if save else 0
    return (
        x.new_empty(batch, length, heads, width),
        x.new_empty(batch, heads, width, states, dtype=dtype),
        x.new_empty(batch, chunks, heads, width, states, dtype=dtype),
    )


@torch.library.custom_op("hf_mamba::ssd_backward", mutates_args=())
def ssd_backward(
    grad_y: Optional,
    grad_final: Optional,
    x: Tensor,
    a: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional,
    initial_state: Optional,
    seq_idx: Optional,
    saved: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    s = Ssd(x, a, w, B, C, D, initial_state, seq_idx)
    return IMPLEMENTATIONS[backend].ssd_backward(s, grad_y, grad_final, saved)


@ssd_backward.register_fake
def _(grad_y, grad_final, x, a, w, B, C, D, initial_state, seq_idx, saved, backend):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, a, w, B, C, D, initial_state))


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *operands, _, ctx.backend = inputs
    ctx.save_for_backward(*operands, output[2])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_y: Optional, grad_final: Optional, _: Optional) -> tuple:
    *operands, saved = ctx.saved_tensors
    if grad_y is None and grad_final is None:
        return (None,) * 10
    grads = ssd_backward(grad_y, grad_final, *operands, saved, ctx.backend)
    given = (None if t is None else grad for t, grad in zip(operands, grads, strict=False))
    return (*given, None, None, None)


ssd.register_autograd(_gradient, setup_context=_context)
