"""The cpu backend's state space dual and gated norm: chunks as in ops/torch/ssd.py, computed by kernels/ssd.c.

A chunk's products are small, half of each is zero, and between them stand decays: one kernel keeps them in a core's
cache, where separate calls would send them through memory. States are (N, P) here.
"""

import functools

import torch
from torch import Tensor

from hf_mamba.ops import operators
from hf_mamba.ops.cpu import structures, threads
from hf_mamba.ops.cpu.library import SMALL, dense, exact, gradient_of, library_of_any_size
from hf_mamba.ops.cpu.structures import address, strided
from hf_mamba.ops.operands import GatedNorm, Ssd
from hf_mamba.ops.reference import document_starts
from hf_mamba.ops.torch import backend as torch_backend
from hf_mamba.ops.torch.scan import as_gradient
from hf_mamba.sizes import CPU_ROWS, SSD_CHUNK, ceil_div

Optional = Tensor | None

ssd = functools.partial(operators.ssd, backend="cpu")


def ssd_forward(s: Ssd, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H, P), the final state (B, H, P, N), and with `save` the states before chunks, (B, chunks, H, P N)."""
    work, keep = _work(s)
    batch, _, heads, width = s.x.shape
    groups, states = s.B.shape[2:]
    new = functools.partial(s.x.new_empty, dtype=torch.float32)
    y, final = s.x.new_empty(s.x.shape), new(batch, heads, states, width)
    saved = new(batch, work.chunks if save else 0, heads, width * states)
    products = new(batch, work.chunks, groups, SSD_CHUNK, SSD_CHUNK)
    work.y, work.products, work.final = strided(y), address(products), address(final)
    work.saved = address(saved) if save else None
    _run("ssd_products", work, s)
    _run("ssd_forward", work, s)
    del keep
    return y, final.mT.contiguous(), saved


def ssd_backward(s: Ssd, saved: Tensor, grad_y: Optional, grad_final: Optional) -> tuple[Tensor, ...]:
    """Gradients of x, a, w, B, C, D, initial_state; an empty tensor for each that was not given."""
    work, keep = _work(s)
    batch, length, heads, width = s.x.shape
    new = functools.partial(s.x.new_empty, dtype=torch.float32)
    grad_x, grad_B, grad_C = (gradient_of(t) for t in (s.x, s.B, s.C))
    grad_a, grad_w = new(batch, length, heads), new(batch, length, heads)
    grad_D = new(batch, work.chunks, heads)
    carries, grad_initial = new(saved.shape), new(batch, heads, s.B.shape[3], width)
    grad_y = None if grad_y is None else _by_rows(grad_y)
    grad_final = None if grad_final is None else exact(grad_final.mT)
    work.saved, work.carries, work.grad_final = address(saved), address(carries), address(grad_final)
    work.grad_y, work.grad_x, work.grad_B, work.grad_C = map(strided, (grad_y, grad_x, grad_B, grad_C))
    work.grad_a, work.grad_w, work.grad_D = address(grad_a), address(grad_w), address(grad_D)
    work.grad_initial = address(grad_initial)
    _run("ssd_carries", work, s)
    _run("ssd_backward", work, s)
    del keep
    return (
        *(grad_x, grad_a.to(s.a.dtype), grad_w.to(s.w.dtype), grad_B.to(s.B.dtype), grad_C.to(s.C.dtype)),
        as_gradient(grad_D.sum((0, 1)), s.D),
        as_gradient(grad_initial.mT, s.initial_state),
    )


def ssd_update(state: Tensor, x: Tensor, a: Tensor, w: Tensor, B: Tensor, C: Tensor, D: Optional = None) -> Tensor:
    """One step, with `state` (B, H, P, N) replaced in place. x: (B, H, P); a, w: (B, H); B, C: (B, G, N)."""
    if torch.compiler.is_compiling() or state.dtype != torch.float32 or not state.is_contiguous():
        return torch_backend.ssd_update(state, x, a, w, B, C, D)
    batch, heads, width = x.shape
    groups, states = B.shape[1:]
    x, B, C = (_by_rows(t[:, None])[:, 0] for t in (x, B, C))
    y = x.new_empty(x.shape)
    numbers = exact(a), exact(w), exact(D)
    rows = (structures.Tensor(t.data_ptr(), t.stride(0), 0, t.dtype == torch.bfloat16) for t in (x, B, C, y))
    work = structures.SsdStep(0, batch, heads, width, groups, states, *rows, *map(address, numbers), state.data_ptr())
    threads.run(library_of_any_size().ssd_step, work, serial=state.numel() < SMALL)
    return y


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    return operators.gated_norm(GatedNorm(x, z, weight, eps, groups), "cpu")


def gated_norm_forward(s: GatedNorm, save: bool) -> tuple[Tensor, Tensor]:
    """y (..., E), and 1/rms of each part of each row (rows, groups)."""
    work, keep = _norm_work(s)
    y = s.x.new_empty(s.x.shape)
    scale = s.x.new_empty(work.rows, s.groups, dtype=torch.float32)
    work.y, work.scale = strided(y.view(-1, work.width)), address(scale)
    threads.run(library_of_any_size().gated_norm_forward, work, serial=y.numel() < SMALL)
    del keep
    return y, scale


def gated_norm_backward(s: GatedNorm, scale: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z and weight."""
    work, keep = _norm_work(s)
    grad_y = dense(grad_y.reshape(-1, work.width))
    grad_x, grad_z = gradient_of(s.x), gradient_of(s.z)
    grad_weight = s.x.new_empty(ceil_div(work.rows, CPU_ROWS), work.width, dtype=torch.float32)
    work.scale, work.grad_weight = address(scale), address(grad_weight)
    work.grad_y = strided(grad_y)
    work.grad_x, work.grad_z = (strided(t.view(-1, work.width)) for t in (grad_x, grad_z))
    threads.run(library_of_any_size().gated_norm_backward, work, serial=grad_x.numel() < SMALL)
    del keep
    return grad_x, grad_z.to(s.z.dtype), grad_weight.sum(0).to(s.weight.dtype)


def _norm_work(s: GatedNorm) -> tuple[structures.GatedNorm, tuple]:
    """The kernel's arguments, and the tensors that must stay alive while it runs."""
    width = s.x.shape[-1]
    x, z, weight = dense(s.x.reshape(-1, width)), dense(s.z.reshape(-1, width)), dense(s.weight)
    rows = structures.Tensor(weight.data_ptr(), 0, 0, weight.dtype == torch.bfloat16)
    work = structures.GatedNorm(0, x.shape[0], width, s.groups, s.eps, strided(x), strided(z), rows)
    return work, (x, z, weight)


def _work(s: Ssd) -> tuple[structures.Ssd, tuple]:
    """The kernels' arguments, and the tensors that must stay alive while they run."""
    batch, length, heads, width = s.x.shape
    groups, states = s.B.shape[2:]
    x, B, C = _by_rows(s.x), _by_rows(s.B), _by_rows(s.C)
    a, w, D = exact(s.a), exact(s.w), exact(s.D)
    initial = None if s.initial_state is None else exact(s.initial_state.mT)
    starts = None if s.seq_idx is None else document_starts(s.seq_idx)
    work = structures.Ssd(
        *(0, batch, length, heads, width, groups, states, ceil_div(length, SSD_CHUNK)),
        *map(strided, (x, B, C, None)),
        *map(address, (a, w, D, initial, starts)),
    )
    return work, (x, B, C, a, w, D, initial, starts)


def _run(kernel: str, work: structures.Ssd, s: Ssd) -> None:
    work.next = 0
    threads.run(getattr(library_of_any_size(), kernel), work, serial=s.x.numel() * s.B.shape[3] < SMALL)


def _by_rows(t: Tensor) -> Tensor:
    """(B, L, H, P) in a dtype the kernels read, each row dense."""
    t = dense(t)
    return t if t.stride(2) == t.shape[3] or t.shape[2] == 1 else t.contiguous()
