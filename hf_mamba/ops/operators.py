"""Scan and convolution as PyTorch operators: differentiable, and opaque to torch.compile.

One operator serves the torch and the cpu backend: `backend` names the implementation. Both save the same tensors, the
inputs and one state per `CHUNK` steps. Operators may not return None, so a gradient that nobody asked for leaves the
backward operator as an empty tensor.
"""

import functools
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_mamba.ops.reference import compute_dtype
from hf_mamba.ops.torch import scan as chunked

Optional = Tensor | None


# backend -> the module with its scan_forward, scan_backward, conv_forward and conv_backward
IMPLEMENTATIONS = {"torch": "hf_mamba.ops.torch.scan", "cpu": "hf_mamba.ops.cpu.kernels"}


@functools.cache
def implementation(backend: str) -> ModuleType:
    """Imports a backend's implementation by name, because that module uses these operators itself."""
    return import_module(IMPLEMENTATIONS[backend])


@torch.library.custom_op("hf_mamba::selective_scan", mutates_args=())
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional,
    z: Optional,
    dt_bias: Optional,
    dt_softplus: bool,
    initial_state: Optional,
    seq_idx: Optional,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(backend).scan_forward(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, save
    )


@selective_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, save, backend):
    batch, length, width = x.shape
    states, dtype = A.shape[1], compute_dtype(x.dtype)
    chunks = (length + chunked.CHUNK - 1) // chunked.CHUNK if save else 0
    return (
        x.new_empty(batch, length, width),
        x.new_empty(batch, width, states, dtype=dtype),
        x.new_empty(batch, chunks, states, width, dtype=dtype),
    )


@torch.library.custom_op("hf_mamba::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    grad_y: Optional,
    grad_final: Optional,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional,
    z: Optional,
    dt_bias: Optional,
    dt_softplus: bool,
    initial_state: Optional,
    seq_idx: Optional,
    saved: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return implementation(backend).scan_backward(
        grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, saved
    )


@selective_scan_backward.register_fake
def _(
    grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, saved, backend
):  # fmt: skip
    return tuple(
        x.new_empty(0) if t is None else _dense_like(t) for t in (x, dt, A, B, C, D, z, dt_bias, initial_state)
    )


def _scan_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *arguments, _, backend = inputs
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx = arguments
    ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, output[2])
    ctx.dt_softplus, ctx.backend = dt_softplus, backend
    ctx.set_materialize_grads(False)


def _scan_gradient(ctx: Any, grad_y: Optional, grad_final: Optional, _: Optional) -> tuple:
    x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, saved = ctx.saved_tensors
    if grad_y is None and grad_final is None:
        return (None,) * 13
    gx, gdt, gA, gB, gC, gD, gz, gbias, ginitial = selective_scan_backward(
        grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, initial_state, seq_idx, saved, ctx.backend
    )
    return (
        *(gx, gdt, gA, gB, gC),
        *(None if t is None else g for t, g in ((D, gD), (z, gz), (dt_bias, gbias))),
        None,
        None if initial_state is None else ginitial,
        *(None, None, None),
    )


selective_scan.register_autograd(_scan_gradient, setup_context=_scan_context)


@torch.library.custom_op("hf_mamba::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Optional,
    silu: bool,
    initial_state: Optional,
    seq_idx: Optional,
    backend: str,
) -> Tensor:
    return implementation(backend).conv_forward(x, weight, bias, silu, initial_state, seq_idx)


@causal_conv1d.register_fake
def _(x, weight, bias, silu, initial_state, seq_idx, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op("hf_mamba::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Optional,
    silu: bool,
    initial_state: Optional,
    seq_idx: Optional,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return implementation(backend).conv_backward(grad_y, x, weight, bias, silu, initial_state, seq_idx)


@causal_conv1d_backward.register_fake
def _(grad_y, x, weight, bias, silu, initial_state, seq_idx, backend):
    return tuple(x.new_empty(0) if t is None else _dense_like(t) for t in (x, weight, bias, initial_state))


def _conv_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.silu, initial_state, seq_idx, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, seq_idx)


def _conv_gradient(ctx: Any, grad_y: Tensor) -> tuple:
    x, weight, bias, initial_state, seq_idx = ctx.saved_tensors
    gx, gw, gb, gi = causal_conv1d_backward(grad_y, x, weight, bias, ctx.silu, initial_state, seq_idx, ctx.backend)
    return gx, gw, None if bias is None else gb, None, None if initial_state is None else gi, None, None


causal_conv1d.register_autograd(_conv_gradient, setup_context=_conv_context)


def _dense_like(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)
