"""The cpu backend: compiled kernels (kernels/), called through ctypes. fp32 and bf16; the arithmetic is fp32.

They are C because the same algorithm in numba took 1.8 times as long (benchmarks/numba_scan.py, on AVX-512), and numba
brings a compiler of its own to install.
"""

import ctypes
import functools
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from hf_mamba.ops.cpu import build, threads
from hf_mamba.ops.reference import document_starts
from hf_mamba.ops.torch import backend as torch_backend
from hf_mamba.ops.torch.scan import as_gradient
from hf_mamba.sizes import CPU_GROUP, CPU_ROWS, CPU_TAPS, SCAN_CHUNK, ceil_div

__all__ = [
    "add_rms_norm",
    "cannot_serve",
    "causal_conv1d",
    "causal_conv1d_update",
    "linear",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "unavailable",
]

logger = logging.getLogger("hf_mamba.ops")

Optional = Tensor | None

MAX_STATES = 256  # bounds the kernels' stack
LOG2E = math.log2(math.e)
SMALL = 1 << 16  # multiply-adds or so: below this, waking threads costs more than it saves


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
    )


def _structure(name: str, integers: str, *groups: tuple[type, str]) -> type[ctypes.Structure]:
    fields: list[tuple[str, type]] = []
    for kind, names in ((ctypes.c_int64, f"next {integers}"), *groups):
        fields += [(field, kind) for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_pointer = ctypes.c_void_p
_Scan = _structure(
    "_Scan",
    "batch length width chunks softplus",
    (_Tensor, "x dt z B C y"),
    (_pointer, "A D bias initial starts final saved"),
    (_Tensor, "grad_y grad_x grad_dt grad_z"),
    (_pointer, "grad_final grad_initial grad_A grad_D grad_bias grad_B grad_C"),
)
_Conv = _structure(
    "_Conv",
    "batch length width taps silu",
    (_Tensor, "x y"),
    (_pointer, "weight bias initial starts"),
    (_Tensor, "grad_y grad_x"),
    (_pointer, "grad_weight grad_initial"),
)
_Step = _structure("_Step", "batch width softplus log_A", (_Tensor, "x dt z B C y"), (_pointer, "A D bias state"))
_ConvStep = _structure(
    "_ConvStep", "batch width taps silu", (_Tensor, "x y weight"), (_pointer, "bias"), (_Tensor, "state")
)


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("next", "rows", "width")),
        ("eps", ctypes.c_double),
        *((name, _Tensor) for name in ("x", "weight", "y")),
        *((name, ctypes.c_void_p) for name in ("residual", "sum")),
    )


_Linear = _structure("_Linear", "rows width count", (_Tensor, "weight bias x y"))


@functools.cache
def _library(states: int) -> ctypes.CDLL:
    library = build.load(states)
    for name in ("scan_forward", "scan_backward", "conv_forward", "conv_backward"):
        getattr(library, name).restype = None
    for name in ("scan_step", "conv_step", "norm_forward", "linear_forward"):
        getattr(library, name).restype = None
    return library


@functools.cache
def unavailable(states: int = 16) -> str | None:
    """Why the kernels cannot be had on this machine; builds them the first time."""
    try:
        _library(states)
    except build.BuildError as error:
        logger.warning("No CPU kernels: %s The torch backend serves instead, several times slower.", error)
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
    if call.op in ("rms_norm", "add_rms_norm", "linear"):
        return None
    if not 1 <= call.states <= MAX_STATES:
        return f"its state size is at most {MAX_STATES}, not {call.states}."
    return unavailable(call.states)


selective_scan = functools.partial(torch_backend.selective_scan, backend="cpu")
causal_conv1d = functools.partial(torch_backend.causal_conv1d, backend="cpu")


def scan_forward(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, save):
    """Like chunked.scan_forward."""
    work, keep = _scan_work(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx)
    batch, _, width = x.shape
    states = A.shape[1]
    y = x.new_empty(x.shape)
    final = x.new_empty(batch, states, width, dtype=torch.float32)
    saved = x.new_empty(batch, work.chunks if save else 0, states, width, dtype=torch.float32)
    work.y, work.final, work.saved = _tensor(y), _address(final), _address(saved) if save else None
    threads.run(_library(states).scan_forward, work, serial=y.numel() * states < SMALL)
    del keep
    return y, final.transpose(1, 2).contiguous(), saved


def scan_backward(
    grad_y, grad_final, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx, saved
):  # fmt: skip
    """Like chunked.scan_backward."""
    work, keep = _scan_work(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx)
    batch, length, width = x.shape
    states = A.shape[1]
    grad_x, grad_dt, grad_z = (x.new_empty(0) if t is None else _gradient_of(t) for t in (x, dt, z))
    exact = functools.partial(x.new_empty, dtype=torch.float32)
    grad_initial, grad_A = exact(batch, states, width), exact(batch, states, width)
    grad_D, grad_bias = exact(batch, width), exact(batch, width)
    groups = ceil_div(width, CPU_GROUP)
    grad_B, grad_C = exact(groups, batch, length, states), exact(groups, batch, length, states)
    grad_y = None if grad_y is None else _dense(grad_y)
    grad_final = None if grad_final is None else grad_final.float().transpose(1, 2).contiguous()
    work.saved, work.grad_final = _address(saved), _address(grad_final)
    work.grad_y, work.grad_x, work.grad_dt = _tensor(grad_y), _tensor(grad_x), _tensor(grad_dt)
    work.grad_z = _tensor(None if z is None else grad_z)
    work.grad_initial, work.grad_A = _address(grad_initial), _address(grad_A)
    work.grad_D, work.grad_bias = _address(grad_D), _address(grad_bias)
    work.grad_B, work.grad_C = _address(grad_B), _address(grad_C)
    threads.run(_library(states).scan_backward, work, serial=x.numel() * states < SMALL)
    del keep
    return (
        grad_x,
        grad_dt.to(dt.dtype),
        as_gradient(grad_A.sum(0).t(), A),
        grad_B.sum(0).to(B.dtype),
        grad_C.sum(0).to(C.dtype),
        as_gradient(grad_D.sum(0), D),
        grad_z if z is None else grad_z.to(z.dtype),
        as_gradient(grad_bias.sum(0), dt_bias),
        as_gradient(grad_initial.transpose(1, 2), initial_state),
    )


def conv_forward(x, weight, bias, silu, initial_state, seq_idx):
    """Like chunked.conv_forward."""
    work, keep = _conv_work(x, weight, bias, silu, initial_state, seq_idx)
    y = x.new_empty(x.shape)
    work.y = _tensor(y)
    threads.run(_library_of_any_size().conv_forward, work, serial=y.numel() < SMALL)
    del keep
    return y


def conv_backward(grad_y, x, weight, bias, silu, initial_state, seq_idx):
    """Like chunked.conv_backward."""
    work, keep = _conv_work(x, weight, bias, silu, initial_state, seq_idx)
    batch, length, width = x.shape
    taps = weight.shape[1]
    grad_y, grad_x = _dense(grad_y), x.new_empty(x.shape)
    partial = x.new_empty(batch * ceil_div(length, CPU_ROWS), taps + 1, width, dtype=torch.float32)
    grad_initial = None
    if initial_state is not None:
        grad_initial = x.new_zeros(batch, taps - 1, width, dtype=torch.float32)
    work.grad_y, work.grad_x = _tensor(grad_y), _tensor(grad_x)
    work.grad_weight, work.grad_initial = _address(partial), _address(grad_initial)
    threads.run(_library_of_any_size().conv_backward, work, serial=x.numel() < SMALL)
    del keep
    total = partial.sum(0)  # (k + 1, E)
    return (
        grad_x,
        as_gradient(total[:taps].t(), weight),
        as_gradient(total[taps], bias),
        x.new_empty(0) if grad_initial is None else as_gradient(grad_initial.transpose(1, 2), initial_state),
    )


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
    if torch.compiler.is_compiling() or state.dtype != torch.float32 or not state.is_contiguous():
        return torch_backend.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, A_is_log)
    x, dt, B, C = _dense(x), _dense(dt), _dense(B), _dense(C)
    z = None if z is None else _dense(z)
    A, D, dt_bias = A.float().contiguous(), _exact(D), _exact(dt_bias)
    y = x.new_empty(x.shape)
    (batch, width), states = x.shape, A.shape[1]
    work = _Step(
        *(0, batch, width, dt_softplus, A_is_log),
        *map(_tensor, (x, dt, z, B, C, y)),
        *map(_address, (A, D, dt_bias, state)),
    )
    threads.run(_library(states).scan_step, work, serial=state.numel() < SMALL)
    return y


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Optional = None, activation: str | None = "silu"
) -> Tensor:
    supported = conv_state.dtype in (torch.float32, torch.bfloat16) and conv_state.stride(-1) == 1
    if torch.compiler.is_compiling() or not supported:
        return torch_backend.causal_conv1d_update(x, conv_state, weight, bias, activation)
    x, weight, bias = _dense(x), _dense(weight), _exact(bias)
    y = x.new_empty(x.shape)
    (batch, width), taps = x.shape, weight.shape[1]
    rows = _Tensor(weight.data_ptr(), 0, weight.stride(0), weight.dtype == torch.bfloat16)
    work = _ConvStep(
        *(0, batch, width, taps, activation == "silu"),
        *(_tensor(x), _tensor(y), rows, _address(bias), _tensor(conv_state)),
    )
    threads.run(_library_of_any_size().conv_step, work, serial=conv_state.numel() < SMALL)
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
    dense = (_Tensor(t.data_ptr(), 0, width, t.dtype == torch.bfloat16) for t in (x, weight, y))
    work = _Norm(0, x.numel() // width, width, eps, *dense, _address(residual), total.data_ptr())
    threads.run(_library_of_any_size().norm_forward, work, serial=x.numel() < SMALL)
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
    work = _Linear(
        *(0, rows, width, count),
        _Tensor(weight.data_ptr(), 0, weight.stride(0), is_bf16),
        _Tensor() if bias is None else _Tensor(bias.data_ptr(), 0, 0, bias.dtype == torch.bfloat16),
        _Tensor(flat.data_ptr(), 0, flat.stride(0), is_bf16),
        _Tensor(y.data_ptr(), 0, rows, is_bf16),
    )
    threads.run(_library_of_any_size().linear_forward, work, serial=rows * width * count < SMALL)
    return y


def _scan_work(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx):
    """The kernel's arguments, and the tensors that must stay alive while it runs."""
    batch, length, width = x.shape
    x, dt, B, C = _dense(x), _dense(dt), _dense(B), _dense(C)
    z = None if z is None else _dense(z)
    A = A.float().t().mul(LOG2E).contiguous()
    D, dt_bias = _exact(D), _exact(dt_bias)
    initial = None if initial_state is None else initial_state.float().transpose(1, 2).contiguous()
    starts = None if seq_idx is None else document_starts(seq_idx)
    work = _Scan(
        *(0, batch, length, width, ceil_div(length, SCAN_CHUNK["cpu"]), dt_softplus),
        *map(_tensor, (x, dt, z, B, C, None)),
        *map(_address, (A, D, dt_bias, initial, starts)),
    )
    return work, (x, dt, z, A, B, C, D, dt_bias, initial, starts)


def _conv_work(x, weight, bias, silu, initial_state, seq_idx):
    batch, length, width = x.shape
    x, bias = _dense(x), _exact(bias)
    weight = weight.float().t().contiguous()
    initial = None if initial_state is None else initial_state.float().transpose(1, 2).contiguous()
    starts = None if seq_idx is None else document_starts(seq_idx)
    work = _Conv(
        *(0, batch, length, width, weight.shape[0], silu),
        *(_tensor(x), _tensor(None)),
        *map(_address, (weight, bias, initial, starts)),
    )
    return work, (x, weight, bias, initial, starts)


def _library_of_any_size() -> ctypes.CDLL:
    """The convolution is the same in every library; 16 is the state size of all published Mamba-1 models."""
    return _library(16)


def _dense(t: Tensor) -> Tensor:
    """In a dtype the kernels read, with its last axis dense; other strides are theirs to follow."""
    if t.dtype not in (torch.float32, torch.bfloat16):
        t = t.float()
    return t if t.stride(-1) == 1 else t.contiguous()


def _gradient_of(t: Tensor) -> Tensor:
    """Dense room for a gradient, in a dtype the kernels write."""
    return t.new_empty(t.shape, dtype=t.dtype if t.dtype == torch.bfloat16 else torch.float32)


def _exact(t: Optional) -> Optional:
    return None if t is None else t.float().contiguous()


def _tensor(t: Optional) -> _Tensor:
    if t is None:
        return _Tensor()
    return _Tensor(t.data_ptr(), t.stride(0), t.stride(1), t.dtype == torch.bfloat16)


def _address(t: Optional) -> int | None:
    return None if t is None else t.data_ptr()
