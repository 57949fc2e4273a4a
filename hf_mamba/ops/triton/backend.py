"""The Triton backend: every operation as a PyTorch operator, differentiable and opaque to torch.compile.

Serves fp32, bf16 and fp16 on NVIDIA GPUs of compute capability 8.0 and later, packed documents and carried states
included; all arithmetic is fp32. With TRITON_INTERPRET=1 set before Triton is imported it runs on the CPU, for
tests.

`torch.use_deterministic_algorithms(True)` makes the scan's backward sum dB and dC in a fixed order, at the price of
one (B, L, N) fp32 buffer each per 32 channels; everything else is deterministic always. Gradients of gradients are
not defined.
"""

import os
from typing import Any

import torch
from torch import Tensor

from hf_mamba.ops.reference import negative_exp
from hf_mamba.ops.triton.launch import chunks

Optional = Tensor | None
LARGEST_STATE = 128
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
    if call.op in ("selective_scan", "selective_state_update") and not 1 <= call.states <= LARGEST_STATE:
        return f"state size {call.states}; the Triton kernels hold 1 to {LARGEST_STATE} states."
    return None


def launcher() -> Any:
    """The kernels' host side, imported at the first call: importing Triton costs time and needs it installed."""
    from hf_mamba.ops.triton import launch as triton_launch

    return triton_launch


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
    segments: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.selective_scan`; `segments` overrides the number of parts that the sequence is split into (0: by rule)."""
    floats = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floats)
    y, last, _ = scan_op(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, save, segments)
    return (y, last) if return_final_state else y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Optional = None,
    activation: str | None = "silu",
    initial_state: Optional = None,
    seq_idx: Optional = None,
) -> Tensor:
    """`ops.causal_conv1d`."""
    return conv_op(x, weight, bias, activation == "silu", initial_state, seq_idx)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm`."""
    return norm_op(x, None, weight, eps)[0]


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = hidden + residual, kept in fp32: a block's residual sum and norm in one pass.

    hidden: (..., d) of any served dtype. residual: (..., d). weight: (d,).
    """
    normed, total, _ = norm_op(hidden, residual, weight, eps)
    return normed, total


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
    """`ops.selective_state_update`."""
    A = negative_exp(A) if A_is_log else A
    return state_update_op(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Optional = None, activation: str | None = "silu"
) -> Tensor:
    """`ops.causal_conv1d_update`."""
    return conv_update_op(x, conv_state, weight, bias, activation == "silu")


# Operators may not return None: a gradient that nobody asked for is an empty tensor.


@torch.library.custom_op("hf_mamba::triton_scan", mutates_args=())
def scan_op(
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
    segments: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        last = x.new_zeros(x.shape[0], x.shape[2], A.shape[1], dtype=torch.float32)
        saved = last.new_empty(x.shape[0], chunks(x, save), A.shape[1], x.shape[2])
        return x.new_empty(x.shape), last if initial_state is None else last + initial_state, saved
    return launcher().scan_forward(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, save, segments)


@scan_op.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, save, segments):
    batch, length, width = x.shape
    last = x.new_empty(batch, width, A.shape[1], dtype=torch.float32)
    saved = last.new_empty(batch, chunks(x, save), A.shape[1], width)
    return x.new_empty(batch, length, width), last, saved


@torch.library.custom_op("hf_mamba::triton_scan_backward", mutates_args=())
def scan_backward_op(
    grad_y: Tensor,
    grad_last: Optional,
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
    segments: int,
) -> list[Tensor]:
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    if x.numel() == 0:
        gradients = [zeros_or_empty(t, x) for t in inputs]
        if initial_state is not None and grad_last is not None:
            gradients[-1] = grad_last.to(initial_state.dtype).clone()
        return gradients
    return list(
        launcher().scan_backward(
            grad_y, grad_last, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, saved, segments
        )
    )


@scan_backward_op.register_fake
def _(
    grad_y, grad_last, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, saved, segments
):  # fmt: skip
    return [zeros_or_empty(t, x) for t in (x, dt, A, B, C, D, z, dt_bias, initial_state)]


def scan_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, initial_state, seq_idx, _, ctx.segments = inputs
    ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, output[2])
    ctx.set_materialize_grads(False)


def scan_gradient(ctx: Any, grad_y: Optional, grad_last: Optional, _: Optional) -> tuple:
    x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, saved = ctx.saved_tensors
    if grad_y is None and grad_last is None:
        return (None,) * 13
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = scan_backward_op(
        grad_y, grad_last, x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, initial_state, seq_idx, saved, ctx.segments
    )
    return (
        *(dx, ddt, dA, dB, dC),
        *(None if t is None else d for t, d in ((D, dD), (z, dz), (dt_bias, dbias))),
        None,
        None if initial_state is None else dinitial,
        *(None, None, None),
    )


scan_op.register_autograd(scan_gradient, setup_context=scan_context)


@torch.library.custom_op("hf_mamba::triton_conv", mutates_args=())
def conv_op(
    x: Tensor, weight: Tensor, bias: Optional, silu: bool, initial_state: Optional, seq_idx: Optional
) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(x.shape)
    return launcher().conv_forward(x, weight, bias, silu, initial_state, seq_idx)


@conv_op.register_fake
def _(x, weight, bias, silu, initial_state, seq_idx):
    return x.new_empty(x.shape)


@torch.library.custom_op("hf_mamba::triton_conv_backward", mutates_args=())
def conv_backward_op(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Optional,
    silu: bool,
    initial_state: Optional,
    seq_idx: Optional,
) -> list[Tensor]:
    if x.numel() == 0:
        return [zeros_or_empty(t, x) for t in (x, weight, bias, initial_state)]
    return list(launcher().conv_backward(grad_y, x, weight, bias, silu, initial_state, seq_idx))


@conv_backward_op.register_fake
def _(grad_y, x, weight, bias, silu, initial_state, seq_idx):
    return [zeros_or_empty(t, x) for t in (x, weight, bias, initial_state)]


def conv_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.silu, initial_state, seq_idx = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, seq_idx)


def conv_gradient(ctx: Any, grad_y: Tensor) -> tuple:
    x, weight, bias, initial_state, seq_idx = ctx.saved_tensors
    dx, dweight, dbias, dinitial = conv_backward_op(grad_y, x, weight, bias, ctx.silu, initial_state, seq_idx)
    return dx, dweight, None if bias is None else dbias, None, None if initial_state is None else dinitial, None


conv_op.register_autograd(conv_gradient, setup_context=conv_context)


@torch.library.custom_op("hf_mamba::triton_norm", mutates_args=())
def norm_op(x: Tensor, residual: Optional, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        total = x.new_empty(x.shape if residual is not None else (0,), dtype=torch.float32)
        return x.new_empty(x.shape, dtype=weight.dtype), total, x.new_empty(0, dtype=torch.float32)
    return launcher().norm_forward(x, residual, weight, eps)


@norm_op.register_fake
def _(x, residual, weight, eps):
    exact = x.new_empty(x.shape if residual is not None else (0,), dtype=torch.float32)
    count = 1
    for size in x.shape[:-1]:
        count *= size
    return x.new_empty(x.shape, dtype=weight.dtype), exact, exact.new_empty(count)


@torch.library.custom_op("hf_mamba::triton_norm_backward", mutates_args=())
def norm_backward_op(
    grad_y: Tensor, grad_total: Optional, x: Tensor, weight: Tensor, rstd: Tensor, hidden_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        exact = x.new_empty(x.shape if grad_total is not None else (0,), dtype=torch.float32)
        return x.new_empty(x.shape, dtype=hidden_dtype), exact, torch.zeros_like(weight)
    return launcher().norm_backward(grad_y, grad_total, x, weight, rstd, hidden_dtype)


@norm_backward_op.register_fake
def _(grad_y, grad_total, x, weight, rstd, hidden_dtype):
    exact = x.new_empty(x.shape if grad_total is not None else (0,), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=hidden_dtype), exact, weight.new_empty(weight.shape)


def norm_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, _ = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight, output[2])
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype


def norm_gradient(ctx: Any, grad_y: Tensor, grad_total: Tensor, _: Optional) -> tuple:
    x, weight, rstd = ctx.saved_tensors
    hidden_dtype, residual_dtype = ctx.dtypes
    alone = residual_dtype is None
    dx, dtotal, dweight = norm_backward_op(grad_y, None if alone else grad_total, x, weight, rstd, hidden_dtype)
    return dx, None if alone else dtotal.to(residual_dtype), dweight, None


norm_op.register_autograd(norm_gradient, setup_context=norm_context)


@torch.library.custom_op("hf_mamba::triton_state_update", mutates_args=("state",))
def state_update_op(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional,
    z: Optional,
    dt_bias: Optional,
    dt_softplus: bool,
) -> Tensor:
    own = state.contiguous()
    y = launcher().state_update(own, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    if own is not state:
        state.copy_(own)
    return y


@state_update_op.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return x.new_empty(x.shape)


@torch.library.custom_op("hf_mamba::triton_conv_update", mutates_args=("conv_state",))
def conv_update_op(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Optional, silu: bool) -> Tensor:
    own = conv_state.contiguous()
    y = launcher().conv_update(x, own, weight, bias, silu)
    if own is not conv_state:
        conv_state.copy_(own)
    return y


@conv_update_op.register_fake
def _(x, conv_state, weight, bias, silu):
    return x.new_empty(x.shape)


def zeros_or_empty(t: Optional, like: Tensor) -> Tensor:
    """A dense zero gradient for t, or an empty tensor where there is none."""
    return like.new_empty(0) if t is None else t.new_zeros(t.shape)
