"""The cpu backend: compiled kernels (kernels/), called through ctypes. fp32 and bf16; the arithmetic is fp32.

They are C because the same algorithm in numba took 1.8 times as long (benchmarks/numba_scan.py, on AVX-512), and numba
brings a compiler of its own to install.
"""

import functools
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from hf_mamba.ops import operators
from hf_mamba.ops.cpu import build, structures, threads
from hf_mamba.ops.cpu.library import SMALL, dense, exact, gradient_of, library, library_of_any_size
from hf_mamba.ops.cpu.ssd import (
    gated_norm_backward,
    gated_norm_forward,
    gated_rms_norm,
    ssd,
    ssd_backward,
    ssd_forward,
    ssd_update,
)
from hf_mamba.ops.cpu.structures import address, strided
from hf_mamba.ops.operands import Conv, ConvStep, Scan, Step
from hf_mamba.ops.reference import document_starts
from hf_mamba.ops.torch import backend as torch_backend
from hf_mamba.ops.torch.scan import as_gradient
from hf_mamba.sizes import CPU_GROUP, CPU_ROWS, CPU_TAPS, SCAN_CHUNK, ceil_div

__all__ = [
    "add_rms_norm",
    "cannot_serve",
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_norm_backward",
    "gated_norm_forward",
    "gated_rms_norm",
    "linear",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_backward",
    "ssd_forward",
    "ssd_update",
    "unavailable",
]

logger = logging.getLogger("hf_mamba.ops")

Optional = Tensor | None

MAX_STATES = 256  # bounds the kernels' stack
WIDEST_HEAD = 256  # of ssd; with the states it bounds its kernels' stack, of 2 MB at most
LOG2E = math.log2(math.e)


@functools.cache
def unavailable(states: int = 16) -> str | None:
    """Why the kernels cannot be had on this machine; builds them the first time."""
    try:
        library(states)
    except build.BuildError as error:
        logger.warning(
            "No CPU kernels: %s The torch backend serves instead: a training step takes about three times as long.",
            error,
        )
        return str(error)
    return None


def cannot_serve(call) -> str | None:
    """Why this call needs another backend."""
    if call.device != "cpu":
        return f"it computes on the CPU, and the tensors are on {call.device}."
    if call.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {str(call.dtype).removeprefix('torch.')}."
    if "conv" in call.op:
        return None if call.states <= CPU_TAPS else f"its convolution has at most {CPU_TAPS} taps, not {call.states}."
    if not call.op.startswith(("selective_", "ssd")):
        return None
    if not 1 <= call.states <= MAX_STATES:
        return f"its state size is 1 to {MAX_STATES}, not {call.states}."
    if call.width > WIDEST_HEAD:
        return f"its heads have at most {WIDEST_HEAD} channels, not {call.width}."
    return unavailable(call.states) if call.op.startswith("selective_") else None


selective_scan = functools.partial(operators.selective_scan, backend="cpu")
causal_conv1d = functools.partial(operators.causal_conv1d, backend="cpu")


def scan_forward(s: Scan, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E), the final state (B, E, N), and with `save` the state before each chunk (B, chunks, N, E)."""
    work, keep = _scan_work(s)
    batch, _, width = s.x.shape
    states = s.A.shape[1]
    y = s.x.new_empty(s.x.shape)
    final = s.x.new_empty(batch, states, width, dtype=torch.float32)
    saved = s.x.new_empty(batch, work.chunks if save else 0, states, width, dtype=torch.float32)
    work.y, work.final, work.saved = strided(y), address(final), address(saved) if save else None
    threads.run(library(states).scan_forward, work, serial=y.numel() * states < SMALL)
    del keep
    return y, final.transpose(1, 2).contiguous(), saved


def scan_backward(s: Scan, saved: Tensor, grad_y: Optional, grad_final: Optional) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state; an empty tensor for each that was not given."""
    work, keep = _scan_work(s)
    batch, length, width = s.x.shape
    states = s.A.shape[1]
    grad_x, grad_dt, grad_z = (s.x.new_empty(0) if t is None else gradient_of(t) for t in (s.x, s.dt, s.z))
    new = functools.partial(s.x.new_empty, dtype=torch.float32)
    grad_initial, grad_A = new(batch, states, width), new(batch, states, width)
    grad_D, grad_bias = new(batch, width), new(batch, width)
    groups = ceil_div(width, CPU_GROUP)
    grad_B, grad_C = new(groups, batch, length, states), new(groups, batch, length, states)
    grad_y = None if grad_y is None else dense(grad_y)
    grad_final = None if grad_final is None else grad_final.float().transpose(1, 2).contiguous()
    work.saved, work.grad_final = address(saved), address(grad_final)
    work.grad_y, work.grad_x, work.grad_dt = strided(grad_y), strided(grad_x), strided(grad_dt)
    work.grad_z = strided(None if s.z is None else grad_z)
    work.grad_initial, work.grad_A = address(grad_initial), address(grad_A)
    work.grad_D, work.grad_bias = address(grad_D), address(grad_bias)
    work.grad_B, work.grad_C = address(grad_B), address(grad_C)
    threads.run(library(states).scan_backward, work, serial=s.x.numel() * states < SMALL)
    del keep
    return (
        grad_x,
        grad_dt.to(s.dt.dtype),
        as_gradient(grad_A.sum(0).t(), s.A),
        grad_B.sum(0).to(s.B.dtype),
        grad_C.sum(0).to(s.C.dtype),
        as_gradient(grad_D.sum(0), s.D),
        grad_z if s.z is None else grad_z.to(s.z.dtype),
        as_gradient(grad_bias.sum(0), s.dt_bias),
        as_gradient(grad_initial.transpose(1, 2), s.initial_state),
    )


def conv_forward(s: Conv, save: bool) -> tuple[Tensor, Tensor]:
    """y (B, L, E); nothing is saved."""
    work, keep = _conv_work(s)
    y = s.x.new_empty(s.x.shape)
    work.y = strided(y)
    threads.run(library_of_any_size().conv_forward, work, serial=y.numel() < SMALL)
    del keep
    return y, y.new_empty(0)


def conv_backward(s: Conv, saved: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, initial_state; an empty tensor for each that was not given."""
    work, keep = _conv_work(s)
    batch, length, width = s.x.shape
    taps = s.weight.shape[1]
    grad_y, grad_x = dense(grad_y), s.x.new_empty(s.x.shape)
    partial = s.x.new_empty(batch * ceil_div(length, CPU_ROWS), taps + 1, width, dtype=torch.float32)
    grad_initial = None
    if s.initial_state is not None:
        grad_initial = s.x.new_zeros(batch, taps - 1, width, dtype=torch.float32)
    work.grad_y, work.grad_x = strided(grad_y), strided(grad_x)
    work.grad_weight, work.grad_initial = address(partial), address(grad_initial)
    threads.run(library_of_any_size().conv_backward, work, serial=s.x.numel() < SMALL)
    del keep
    total = partial.sum(0)  # (k + 1, E)
    return (
        grad_x,
        as_gradient(total[:taps].t(), s.weight),
        as_gradient(total[taps], s.bias),
        s.x.new_empty(0) if grad_initial is None else as_gradient(grad_initial.transpose(1, 2), s.initial_state),
    )


def selective_state_update(s: Step) -> Tensor:
    if torch.compiler.is_compiling() or s.state.dtype != torch.float32 or not s.state.is_contiguous():
        return torch_backend.selective_state_update(s)
    x, dt, B, C = dense(s.x), dense(s.dt), dense(s.B), dense(s.C)
    z = None if s.z is None else dense(s.z)
    A, D, dt_bias = s.A.float().contiguous(), exact(s.D), exact(s.dt_bias)
    y = x.new_empty(x.shape)
    (batch, width), states = x.shape, A.shape[1]
    work = structures.Step(
        *(0, batch, width, s.dt_softplus, s.A_is_log),
        *map(strided, (x, dt, z, B, C, y)),
        *map(address, (A, D, dt_bias, s.state)),
    )
    threads.run(library(states).scan_step, work, serial=s.state.numel() < SMALL)
    return y


def causal_conv1d_update(s: ConvStep) -> Tensor:
    supported = s.state.dtype in (torch.float32, torch.bfloat16) and s.state.stride(-1) == 1
    if torch.compiler.is_compiling() or not supported:
        return torch_backend.causal_conv1d_update(s)
    x, weight, bias = dense(s.x), dense(s.weight), exact(s.bias)
    y = x.new_empty(x.shape)
    (batch, width), taps = x.shape, weight.shape[1]
    rows = structures.Tensor(weight.data_ptr(), 0, weight.stride(0), weight.dtype == torch.bfloat16)
    work = structures.ConvStep(
        *(0, batch, width, taps, s.silu),
        *(strided(x), strided(y), rows, address(bias), strided(s.state)),
    )
    threads.run(library_of_any_size().conv_step, work, serial=s.state.numel() < SMALL)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One fused call where no gradient is wanted: beside decoding's matrix products, calls are what takes time."""
    return _norm(x, None, weight, eps)[0] if _norm_served(x, weight) else torch_backend.rms_norm(x, weight, eps)


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if _norm_served(hidden, weight) and residual.is_contiguous():
        return _norm(hidden, residual, weight, eps)
    return torch_backend.add_rms_norm(hidden, residual, weight, eps)


def _norm_served(x: Tensor, weight: Tensor) -> bool:
    served = x.is_contiguous() and {x.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}
    return served and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _norm(x: Tensor, residual: Optional, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=weight.dtype)
    total = x if residual is None else x.new_empty(x.shape, dtype=torch.float32)
    width = x.shape[-1]
    dense = (structures.Tensor(t.data_ptr(), 0, width, t.dtype == torch.bfloat16) for t in (x, weight, y))
    work = structures.Norm(0, x.numel() // width, width, eps, *dense, address(residual), total.data_ptr())
    threads.run(library_of_any_size().norm_forward, work, serial=x.numel() < SMALL)
    return y, total


def linear(x: Tensor, weight: Tensor, bias: Optional = None) -> Tensor:
    """A few rows at the speed of memory: torch's own product of one row took 1.7 times as long in fp32."""
    served = {type(weight), type(x)} <= {Tensor, Parameter} and x.dtype == weight.dtype and weight.stride(-1) == 1
    if not served or (bias is not None and bias.dtype not in (torch.float32, torch.bfloat16)):
        return F.linear(x, weight, bias)
    rows, width = weight.shape
    flat = x.reshape(-1, width)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    is_bf16, count = x.dtype == torch.bfloat16, flat.shape[0]
    work = structures.Linear(
        *(0, rows, width, count),
        structures.Tensor(weight.data_ptr(), 0, weight.stride(0), is_bf16),
        structures.Tensor() if bias is None else structures.Tensor(bias.data_ptr(), 0, 0, bias.dtype == torch.bfloat16),
        structures.Tensor(flat.data_ptr(), 0, flat.stride(0), is_bf16),
        structures.Tensor(y.data_ptr(), 0, rows, is_bf16),
    )
    threads.run(library_of_any_size().linear_forward, work, serial=rows * width * count < SMALL)
    return y


def _scan_work(s: Scan) -> tuple[structures.Scan, tuple]:
    """The kernel's arguments, and the tensors that must stay alive while it runs."""
    batch, length, width = s.x.shape
    x, dt, B, C = dense(s.x), dense(s.dt), dense(s.B), dense(s.C)
    z = None if s.z is None else dense(s.z)
    A = s.A.float().t().mul(LOG2E).contiguous()
    D, dt_bias = exact(s.D), exact(s.dt_bias)
    initial = None if s.initial_state is None else s.initial_state.float().transpose(1, 2).contiguous()
    starts = None if s.seq_idx is None else document_starts(s.seq_idx)
    work = structures.Scan(
        *(0, batch, length, width, ceil_div(length, SCAN_CHUNK["cpu"]), s.dt_softplus),
        *map(strided, (x, dt, z, B, C, None)),
        *map(address, (A, D, dt_bias, initial, starts)),
    )
    return work, (x, dt, z, A, B, C, D, dt_bias, initial, starts)


def _conv_work(s: Conv) -> tuple[structures.Conv, tuple]:
    """The kernel's arguments, and the tensors that must stay alive while it runs."""
    batch, length, width = s.x.shape
    x, bias = dense(s.x), exact(s.bias)
    weight = s.weight.float().t().contiguous()
    initial = None if s.initial_state is None else s.initial_state.float().transpose(1, 2).contiguous()
    starts = None if s.seq_idx is None else document_starts(s.seq_idx)
    work = structures.Conv(
        *(0, batch, length, width, weight.shape[0], s.silu),
        *(strided(x), strided(None)),
        *map(address, (weight, bias, initial, starts)),
    )
    return work, (x, weight, bias, initial, starts)
