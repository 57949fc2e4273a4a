"""Grids, tile sizes and buffers of the Triton kernels: tensors in, tensors out, nothing differentiable.

The sizes below and in sizes.py are rules, not autotuning: a result must not depend on which configuration won a race.
They were chosen from registers, spills and instruction counts of machine code built offline
(benchmarks/triton_compile.py); no GPU has timed them. Into how many segments a sequence is split, segments.py says.

- Scan, forward: one warp per program, a lane per channel. UNROLL steps are loaded ahead.
- Scan, backward: four warps per program, 16 (channel, state) pairs per thread at a time.
- Widths and the strides between steps are constants of the scan's kernels: offsets within a block of steps are then
  part of the instruction. A model has one width.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from hf_mamba import segments, sizes
from hf_mamba.ops.operands import Conv, ConvStep, Norm, Scan, Step
from hf_mamba.ops.reference import negative_exp
from hf_mamba.ops.triton import conv as triton_conv
from hf_mamba.ops.triton import decode as triton_decode
from hf_mamba.ops.triton import norm as triton_norm
from hf_mamba.ops.triton import scan as triton_scan
from hf_mamba.ops.triton import scan_backward as triton_scan_backward

Optional = Tensor | None

CHUNK = sizes.SCAN_CHUNK["triton"]
BACKWARD_REGISTERS = segments.BACKWARD.registers[256]  # of a thread at most
ROW_PROGRAMS = 512  # programs of the norm's backward, each with its own weight gradient


def scan_forward(s: Scan, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E), the last state (B, E, N) and, if `save`, the checkpoints (B, chunks, N, E)."""
    batch, length, width = s.x.shape
    states = s.A.shape[1]
    steps, parts = segments.choose(False, batch, width, length, states, device_of(s.x))
    x, dt, A, z, D, dt_bias = rows(s.x), rows(s.dt), s.A.contiguous(), rows(s.z), s.D, s.dt_bias
    bc = padded_states(s.B, s.C)
    seq_idx = None if s.seq_idx is None else s.seq_idx.to(torch.int32).contiguous()
    y = x.new_empty(batch, length, width)
    last = x.new_empty(batch, states, width, dtype=torch.float32)
    saved = last.new_empty(batch, triton.cdiv(length, CHUNK) if save else 0, states, width)
    start = None if s.initial_state is None else s.initial_state.float().transpose(1, 2).contiguous()  # (B, N, E)
    unroll = 4 if states <= 16 else 2 if states <= 32 else 1
    flags = {"SOFTPLUS": s.dt_softplus, "HAS_D": D is not None, "HAS_Z": z is not None}
    flags |= {"HAS_BIAS": dt_bias is not None, "HAS_SEQ": seq_idx is not None}

    def launch(start: Optional, end: Tensor, delta_sum: Tensor, alive: Tensor, summary: bool) -> None:
        triton_scan.scan_forward[(triton.cdiv(width, 32) * batch * parts,)](
            x, dt, or_any(z, x), A, bc, or_any(D, x), or_any(dt_bias, x), or_any(seq_idx, x), or_any(start, x),
            y, saved, end, delta_sum, alive,
            x.stride(0), dt.stride(0), or_any(z, x).stride(0), bc.stride(0), length, batch, steps, parts,
            x_step=x.stride(1), dt_step=dt.stride(1), z_step=or_any(z, x).stride(1), E=width,
            WHOLE=length % sizes.TRITON_BLOCK == 0, N=states, NP=bc.shape[3], BE=32, UNROLL=unroll, CHUNK=CHUNK,
            HAS_START=start is not None, SAVE=save and not summary, SUMMARY=summary, num_warps=1, **flags,
        )  # fmt: skip

    with on_device(x):
        if parts > 1:
            end, delta_sum, alive = summary_buffers(last, parts)
            launch(None, end, delta_sum, alive, summary=True)
            start = pass_states(end, delta_sum, alive, A, start, reverse=False)
        launch(start, last, last, last, summary=False)
    return y, last.transpose(1, 2).contiguous(), saved


def scan_backward(s: Scan, saved: Tensor, grad_y: Optional, grad_last: Optional) -> tuple[Tensor, ...]:
    """The gradients of x, dt, A, B, C, D, z, dt_bias and initial_state, in their dtypes; an absent one is empty."""
    batch, length, width = s.x.shape
    states = s.A.shape[1]
    steps, parts = segments.choose(True, batch, width, length, states, device_of(s.x))
    grad_y = torch.zeros_like(s.x) if grad_y is None else grad_y
    x, dt, A, z, grad_y = rows(s.x), rows(s.dt), s.A.contiguous(), rows(s.z), rows(grad_y)
    bc, D, dt_bias = padded_states(s.B, s.C), s.D, s.dt_bias
    seq_idx = None if s.seq_idx is None else s.seq_idx.to(torch.int32).contiguous()
    dx, ddt = x.new_empty(x.shape), dt.new_empty(x.shape)
    dz = x.new_empty(0) if z is None else z.new_empty(x.shape)
    carry = torch.zeros(batch, states, width, dtype=torch.float32, device=x.device)
    if grad_last is not None:
        carry.copy_(grad_last.transpose(1, 2))
    dA = carry.new_empty(parts * batch, width, states)
    dD = carry.new_empty(parts * batch, width if D is not None else 0)
    dbias = carry.new_empty(parts * batch, width if dt_bias is not None else 0)
    block, padded = sizes.TRITON_CHANNELS, bc.shape[3]
    blocks = triton.cdiv(width, block)
    dbc = carry.new_empty(blocks, batch, length, padded // 16, 4, 2, 4)
    items = blocks * batch * parts
    whole = length % sizes.TRITON_BLOCK == 0
    programs = min(items, resident_programs(x))
    scratch = carry.new_empty(programs, sizes.triton_scratch(states))
    flags = {"SOFTPLUS": s.dt_softplus, "HAS_Z": z is not None}
    flags |= {"HAS_BIAS": dt_bias is not None, "HAS_SEQ": seq_idx is not None}
    optional = or_any(dt_bias, x), or_any(seq_idx, x)

    with on_device(x):
        if parts > 1:
            end, delta_sum, alive = summary_buffers(carry, parts)
            triton_scan.adjoint_summary[(triton.cdiv(width, 32) * batch * parts,)](
                grad_y, dt, or_any(z, x), A, bc, *optional, end, delta_sum, alive,
                grad_y.stride(0), dt.stride(0), or_any(z, x).stride(0), bc.stride(0), length, batch, steps, parts,
                dy_step=grad_y.stride(1), dt_step=dt.stride(1), z_step=or_any(z, x).stride(1), E=width, WHOLE=whole,
                N=states, NP=padded, BE=32, UNROLL=4 if states <= 16 else 1, num_warps=1, **flags,
            )  # fmt: skip
            carry = pass_states(end, delta_sum, alive, A, carry, reverse=True)
        triton_scan_backward.scan_backward[(programs,)](
            x, dt, or_any(z, x), A, bc, or_any(D, x), *optional, grad_y, saved, carry, scratch,
            dx, ddt, dz, dA, dbc, dD, dbias,
            x.stride(0), dt.stride(0), or_any(z, x).stride(0), grad_y.stride(0), bc.stride(0),
            length, batch, steps, parts, items, x_step=x.stride(1), dt_step=dt.stride(1),
            z_step=or_any(z, x).stride(1), dy_step=grad_y.stride(1), E=width, WHOLE=whole,
            N=states, NP=padded, BE=block, BLOCK=sizes.TRITON_BLOCK, CHUNK=CHUNK,
            HAS_D=D is not None, num_warps=block // 32, maxnreg=BACKWARD_REGISTERS, **flags,
        )  # fmt: skip
    dB, dC = dbc.sum(0).unbind(-2)
    d_start = carry[:, 0] if parts > 1 else carry
    return (
        dx,
        ddt,
        dA.sum(0).to(A.dtype),
        dB.reshape(batch, length, padded)[..., :states].to(s.B.dtype),
        dC.reshape(batch, length, padded)[..., :states].to(s.C.dtype),
        reduced(dD, D),
        dz,
        reduced(dbias, dt_bias),
        x.new_empty(0) if s.initial_state is None else d_start.transpose(1, 2).to(s.initial_state.dtype).contiguous(),
    )


def pass_states(end: Tensor, delta_sum: Tensor, alive: Tensor, A: Tensor, first: Optional, reverse: bool) -> Tensor:
    """Every segment's starting state (B, segments, N, E)."""
    batch, parts, states, width = end.shape
    start = torch.empty_like(end)
    triton_scan.pass_states[(triton.cdiv(width, 128) * states * batch,)](
        end, delta_sum, alive, A, or_any(first, end), start, width, parts,
        N=states, BE=128, HAS_FIRST=first is not None, REVERSE=reverse, num_warps=4,
    )  # fmt: skip
    return start


def padded_states(B: Tensor, C: Tensor) -> Tensor:
    """B and C in fp32, (B, L in whole blocks, 2, N in whole sixteens): reading past the end needs no mask."""
    batch, length, states = B.shape
    block = sizes.TRITON_BLOCK
    bc = B.new_zeros(batch, block * triton.cdiv(length, block), 2, sizes.triton_padded(states), dtype=torch.float32)
    bc[:, :length, 0, :states] = B
    bc[:, :length, 1, :states] = C
    return bc


def summary_buffers(like: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """End states (B, segments, N, E), ΣΔ (B, segments, E) and alive (B, segments), fp32."""
    batch, states, width = like.shape
    return (
        like.new_empty(batch, parts, states, width),
        like.new_empty(batch, parts, width),
        like.new_empty(batch, parts),
    )


def conv_forward(s: Conv, save: bool) -> tuple[Tensor, Tensor]:
    """y (B, L, E); nothing is saved."""
    batch, length, width = s.x.shape
    x, weight, initial_state, seq_idx = conv_inputs(s)
    y = x.new_empty(batch, length, width)
    steps, block = 16, 128
    with on_device(x):
        triton_conv.conv_forward[(triton.cdiv(width, block) * batch * triton.cdiv(length, steps),)](
            x, weight, or_any(s.bias, x), or_any(initial_state, x), or_any(seq_idx, x), y,
            *strides(x), length, width, batch,
            TAPS=weight.shape[1], BT=steps, BE=block, SILU=s.silu, HAS_BIAS=s.bias is not None,
            HAS_INIT=initial_state is not None, HAS_SEQ=seq_idx is not None, num_warps=4,
        )  # fmt: skip
    return y, y.new_empty(0)


def conv_backward(s: Conv, saved: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and initial_state; an absent one is empty."""
    batch, length, width = s.x.shape
    taps = s.weight.shape[1]
    x, weight, carried, seq_idx = conv_inputs(s)
    grad_y = rows(grad_y)
    steps, block = sizes.TRITON_CONV_STEPS, 128
    total = triton.cdiv(length + (0 if carried is None else taps - 1), steps)
    tiles = min(sizes.TRITON_CONV_TILES, total)
    parts = triton.cdiv(total, tiles)
    dx = x.new_empty(x.shape)
    dinitial = x.new_empty(0) if carried is None else carried.new_empty(carried.shape)
    dweight = torch.empty(parts * batch, taps, width, dtype=torch.float32, device=x.device)
    dbias = dweight.new_empty(parts * batch, 0 if s.bias is None else width)
    with on_device(x):
        triton_conv.conv_backward[(triton.cdiv(width, block) * batch * parts,)](
            x, weight, or_any(s.bias, x), or_any(carried, x), or_any(seq_idx, x), grad_y, dx, dinitial, dweight, dbias,
            *strides(x), *strides(grad_y), length, width, batch, tiles,
            TAPS=taps, BT=steps, BE=block, SILU=s.silu, HAS_BIAS=s.bias is not None,
            HAS_INIT=carried is not None, HAS_SEQ=seq_idx is not None, num_warps=4,
        )  # fmt: skip
    return dx, dweight.sum(0).t().to(weight.dtype).contiguous(), reduced(dbias, s.bias), dinitial


def norm_forward(s: Norm, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y in weight's dtype, x + residual in fp32 (empty without one), 1 / root mean square (M,)."""
    x, residual, weight, eps = s
    width = x.shape[-1]
    flat = lines(x)
    y = x.new_empty(x.shape, dtype=weight.dtype)
    total = x.new_empty(x.shape if residual is not None else (0,), dtype=torch.float32)
    rstd = x.new_empty(flat.shape[0], dtype=torch.float32)
    with on_device(x):
        second = flat if residual is None else lines(residual)
        triton_norm.norm_forward[(flat.shape[0],)](
            flat, second, weight.contiguous(), y, total, rstd, flat.stride(0), second.stride(0), width, eps,
            HAS_RESIDUAL=residual is not None, **norm_tile(width),
        )  # fmt: skip
    return y, total, rstd


def norm_backward(s: Norm, rstd: Tensor, grad_y: Optional, grad_total: Optional) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the residual in fp32 (empty without one), and of the weight.

    With a residual, it is their sum that is given in its place, and x has its dtype alone (operators._norm_kept).
    """
    x, weight = s.x if s.residual is None else s.residual, s.weight
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_total = None if s.residual is None else torch.zeros_like(x) if grad_total is None else grad_total
    width = x.shape[-1]
    flat, dy = lines(x), lines(grad_y)
    dx = x.new_empty(x.shape, dtype=s.x.dtype)
    dresidual = x.new_empty(x.shape if grad_total is not None else (0,), dtype=torch.float32)
    programs = min(flat.shape[0], ROW_PROGRAMS)
    dweight = x.new_empty(programs, width, dtype=torch.float32)
    with on_device(x):
        dtotal = dy if grad_total is None else lines(grad_total)
        triton_norm.norm_backward[(programs,)](
            dy, dtotal, flat, weight.contiguous(), rstd, dx, dresidual, dweight,
            dy.stride(0), dtotal.stride(0), flat.stride(0), flat.shape[0], width, programs,
            HAS_RESIDUAL=grad_total is not None, **norm_tile(width),
        )  # fmt: skip
    return dx, dresidual, dweight.sum(0).to(weight.dtype)


def scan_step(s: Step) -> Tensor:
    """y (B, E)."""
    batch, width = s.x.shape
    states = s.A.shape[1]
    state, A = s.state.contiguous(), negative_exp(s.A) if s.A_is_log else s.A
    x, dt, z, B, C = rows(s.x), rows(s.dt), rows(s.z), rows(s.B), rows(s.C)
    y = x.new_empty(batch, width)
    block, padded = 32, triton.next_power_of_2(states)
    with on_device(x):
        triton_decode.state_update[(triton.cdiv(width, block) * batch,)](
            state, x, dt, or_any(z, x), A.contiguous(), B, C, or_any(s.D, x), or_any(s.dt_bias, x), y,
            x.stride(0), dt.stride(0), or_any(z, x).stride(0), B.stride(0), C.stride(0), width,
            N=states, NP=padded, BE=block, SOFTPLUS=s.dt_softplus, HAS_D=s.D is not None, HAS_Z=z is not None,
            HAS_BIAS=s.dt_bias is not None, num_warps=max(1, padded // 32),
        )  # fmt: skip
    if state is not s.state:
        s.state.copy_(state)
    return y


def conv_step(s: ConvStep) -> Tensor:
    """y (B, E)."""
    batch, width = s.x.shape
    x, window = rows(s.x), s.state.contiguous()
    y = x.new_empty(batch, width)
    with on_device(x):
        triton_decode.conv_update[(triton.cdiv(width, 128) * batch,)](
            x, window, s.weight.contiguous(), or_any(s.bias, x), y, x.stride(0), width,
            TAPS=s.weight.shape[1], BE=128, SILU=s.silu, HAS_BIAS=s.bias is not None, num_warps=4,
        )  # fmt: skip
    if window is not s.state:
        s.state.copy_(window)
    return y


def conv_inputs(s: Conv) -> tuple[Tensor, Tensor, Optional, Optional]:
    """x, weight, initial_state and seq_idx as the kernels read them."""
    return (
        rows(s.x),
        s.weight.contiguous(),
        None if s.initial_state is None else s.initial_state.contiguous(),
        None if s.seq_idx is None else s.seq_idx.to(torch.int32).contiguous(),
    )


def rows(t):
    """t if its last axis is contiguous, so that strides describe the rest; else a contiguous copy. None stays None."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def lines(t: Tensor) -> Tensor:
    """(..., d) as (M, d) with contiguous rows."""
    return rows(t).reshape(-1, t.shape[-1])


def strides(t: Tensor) -> tuple[int, int]:
    return t.stride(0), t.stride(1)


def or_any(t: Optional, other: Tensor) -> Tensor:
    """A pointer for an argument that the kernel will not touch."""
    return other if t is None else t


def reduced(partial: Tensor, like: Optional) -> Tensor:
    return partial.new_empty(0) if like is None else partial.sum(0).to(like.dtype)


def norm_tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def device_of(x: Tensor) -> segments.Device:
    """What the rule of segments asks of the tensor's device; the interpreter runs one program at a time."""
    if not x.is_cuda:
        return segments.Device(1)
    found = torch.cuda.get_device_properties(x.device)
    return segments.Device(found.multi_processor_count, found.max_threads_per_multi_processor // 32)


def resident_programs(x: Tensor) -> int:
    return device_of(x).processors * sizes.TRITON_RESIDENT


def on_device(x: Tensor) -> AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
