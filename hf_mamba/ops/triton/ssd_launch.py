"""Grids and buffers of Mamba-2's Triton kernels (ssd.py, norm.py): tensors in, tensors out, nothing differentiable.

Tiles follow fixed rules, as in launch.py; no GPU has timed them. Products take fp32 operands: as three TF32 products
where the input is fp32, as one where it has 16 bits, which TF32 holds exactly.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hf_mamba.ops.operands import GatedNorm, Ssd
from hf_mamba.ops.reference import document_starts
from hf_mamba.ops.sums import running_sum
from hf_mamba.ops.triton import norm as triton_norm
from hf_mamba.ops.triton import ssd as triton_ssd
from hf_mamba.ops.triton.launch import ROW_PROGRAMS, lines, norm_tile, on_device, or_any, reduced, rows, strides
from hf_mamba.sizes import SSD_CHUNK, ceil_div

Optional = Tensor | None

LOG2E = 1.4426950408889634
WARPS = 8
LARGE = 64 * 128  # numbers of a state from which on, as in fp32, a tile has half as many steps: shared memory


class _Steps(NamedTuple):
    """The numbers of each step, (B, H, LP) in fp32 (see ssd.py); `whole` is (B, H, chunks), `starts` (B, LP)."""

    sums: Tensor
    w: Tensor
    from_start: Tensor
    to_end: Tensor
    whole: Tensor
    open: Tensor
    starts: Optional


def _steps(s: Ssd) -> _Steps:
    batch, length, heads = s.a.shape
    chunks = ceil_div(length, SSD_CHUNK)
    pad = chunks * SSD_CHUNK - length
    a, w = (torch.nn.functional.pad(t.float().mT, (0, pad)).contiguous() for t in (s.a, s.w))  # (B, H, LP)
    position = torch.arange(SSD_CHUNK, device=a.device)
    first = position.new_zeros(batch, chunks, SSD_CHUNK)  # of its document, within the chunk
    starts = None
    if s.seq_idx is not None:
        starts = torch.nn.functional.pad(document_starts(s.seq_idx), (0, pad))
        a = a.masked_fill(starts[:, None], 0.0)
        cut = starts.view(batch, chunks, SSD_CHUNK)
        first = torch.where(cut, position, 0).cummax(-1).values
    sums = running_sum(a.view(batch, heads, chunks, SSD_CHUNK)) * LOG2E
    from_start, to_end = sums.exp2(), (sums[..., -1:] - sums).exp2()
    if starts is not None:
        from_start = from_start * (cut.cumsum(-1) == 0)[:, None]
        to_end = to_end * (position >= first[..., -1:])[:, None]
    whole = from_start[..., -1].contiguous()
    open_ = (first + SSD_CHUNK * torch.arange(chunks, device=a.device)[:, None]).flatten(1).int()
    return _Steps(sums.flatten(2), w, from_start.flatten(2), to_end.flatten(2), whole, open_, starts)


def _sizes(s: Ssd) -> dict[str, Any]:
    heads, width = s.x.shape[2:]
    groups, states = s.B.shape[2:]
    return {
        **{"P": width, "N": states, "R": heads // groups, "T": SSD_CHUNK, "BT": _tile(s)},
        **{"BP": max(16, triton.next_power_of_2(width)), "BN": max(16, triton.next_power_of_2(states))},
        **{"PRECISION": "tf32x3" if s.x.dtype == torch.float32 else "tf32", "num_warps": WARPS},
        "num_stages": 1 if _tile(s) < 64 else 2,
    }


def _tile(s: Ssd) -> int:
    """Steps of a chunk at a time; on Blackwell, Triton 3.7.1 cannot compile 64 (TritonGPUHoistTMEMAlloc fails)."""
    large = s.x.dtype == torch.float32 or s.x.shape[3] * s.B.shape[3] > LARGE
    blackwell = s.x.is_cuda and torch.cuda.get_device_capability(s.x.device) >= (10, 0)
    return 32 if large or blackwell else 64


def _heads(t: Tensor) -> Tensor:
    """(B, L, H, P) with each row dense."""
    return t if t.stride(3) == 1 and (t.stride(2) == t.shape[3] or t.shape[2] == 1) else t.contiguous()


def _states(x: Tensor, scale: Tensor, b: Tensor, whole: Tensor, first: Optional, s: Ssd, reverse: bool) -> Any:
    """The state before each chunk (after it in reverse), (B, chunks, H, P N), and the one after all of them."""
    batch, length, heads, width = s.x.shape
    states, chunks = s.B.shape[3], whole.shape[2]
    found = whole.new_empty(batch, chunks, heads, width * states)
    last = whole.new_empty(batch, heads, width, states)
    triton_ssd.chunk_states[(batch * chunks * heads,)](
        x, scale, b, found, *strides(x), *strides(b), length, scale.shape[2], heads, **_sizes(s)
    )
    size = width * states
    triton_ssd.pass_states[(triton.cdiv(size, 1024) * batch * heads,)](
        found, whole, or_any(first, whole), last, chunks, heads, size,
        BLOCK=1024, HAS_FIRST=first is not None, REVERSE=reverse, num_warps=4,
    )  # fmt: skip
    return found, last


def ssd_forward(s: Ssd, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H, P), the final state (B, H, P, N), and with `save` the states before chunks, (B, chunks, H, P N)."""
    batch, length, heads, _ = s.x.shape
    x, B, C, n = _heads(s.x), _heads(s.B), _heads(s.C), _steps(s)
    first = None if s.initial_state is None else s.initial_state.float().contiguous()
    y = s.x.new_empty(s.x.shape)
    padded = n.sums.shape[2]
    with on_device(x):
        states, last = _states(x, n.w * n.to_end, B, n.whole, first, s, reverse=False)
        triton_ssd.outputs[(batch * padded // _tile(s) * heads,)](
            x, B, C, or_any(s.D, x), n.sums, n.w, n.from_start, n.open, states, y,
            *strides(x), *strides(B), *strides(C), length, padded, heads, HAS_D=s.D is not None, **_sizes(s),
        )  # fmt: skip
    return y, last, states if save else states.new_empty(batch, 0, *states.shape[2:])


def ssd_backward(s: Ssd, saved: Tensor, grad_y: Optional, grad_final: Optional) -> tuple[Tensor, ...]:
    """Gradients of x, a, w, B, C, D, initial_state; an empty tensor for each that was not given."""
    batch, length, heads, _ = s.x.shape
    x, B, C, n = _heads(s.x), _heads(s.B), _heads(s.C), _steps(s)
    g = torch.zeros_like(x) if grad_y is None else _heads(grad_y)
    first = None if grad_final is None else grad_final.float().contiguous()
    padded, parts = n.sums.shape[2], SSD_CHUNK // _tile(s)
    chunks = padded // SSD_CHUNK
    dx, dB, dC = (t.new_empty(t.shape) for t in s[0:1] + s[3:5])
    dw, later, ended, along = (torch.empty_like(n.sums) for _ in range(4))
    earlier = n.sums.new_zeros(parts, *n.sums.shape)
    dD, through = n.sums.new_empty(batch * chunks, heads, parts), n.sums.new_empty(batch, chunks, heads)
    operands = *strides(x), *strides(B), *strides(C), *strides(g), length, padded, heads
    tiles = _sizes(s)
    with on_device(x):
        carries, d_first = _states(g, n.from_start, C, n.whole, first, s, reverse=True)
        triton_ssd.input_gradients[(batch * padded // _tile(s) * heads,)](
            x, B, C, or_any(s.D, x), g, n.sums, n.w, n.to_end, n.open, saved, carries,
            dx, dw, later, ended, dD, through, *operands, HAS_D=s.D is not None, **tiles,
        )  # fmt: skip
        for of_c, out, scale, states in ((True, dC, n.from_start, saved), (False, dB, n.w * n.to_end, carries)):
            triton_ssd.shared_gradients[(batch * padded // _tile(s) * s.B.shape[2],)](
                x, B, C, g, n.sums, n.w, scale, n.open, states, out, earlier, along, *operands, OF_C=of_c, **tiles
            )
    # a decay acts on each pair around it, on what the state before the chunk gives to later steps, on what earlier
    # steps give to the state after it, and on the state that passes through
    by_chunk = (batch, heads, chunks, SSD_CHUNK)
    after = running_sum((earlier.sum(0) - later + along).view(by_chunk).flip(-1)).flip(-1)
    ended = ended.view(by_chunk)
    passing = (n.whole * through.transpose(1, 2))[..., None]
    da = (after + running_sum(ended) - ended + passing).flatten(2)
    if n.starts is not None:
        da = da.masked_fill(n.starts[:, None], 0.0)
    return (
        dx,
        *(d[..., :length].mT.to(t.dtype).contiguous() for d, t in ((da, s.a), (dw, s.w))),
        dB,
        dC,
        reduced(dD.sum(2), s.D),
        x.new_empty(0) if s.initial_state is None else d_first.to(s.initial_state.dtype),
    )


def ssd_update(state: Tensor, x: Tensor, a: Tensor, w: Tensor, B: Tensor, C: Tensor, D: Optional = None) -> Tensor:
    """y (B, H, P); `state` (B, H, P, N) is replaced in place."""
    batch, heads, width = x.shape
    groups, states = B.shape[1:]
    x, B, C = (_heads(t[:, None])[:, 0] for t in (x, B, C))
    own, y = state.contiguous(), x.new_empty(x.shape)
    with on_device(x):
        triton_ssd.update[(batch * heads,)](
            own, x, (a.float() * LOG2E).contiguous(), w.float().contiguous(), B, C, or_any(D, x), y,
            x.stride(0), B.stride(0), C.stride(0), heads, P=width, N=states, R=heads // groups,
            BP=triton.next_power_of_2(width), BN=triton.next_power_of_2(states), HAS_D=D is not None, num_warps=4,
        )  # fmt: skip
    if own is not state:
        state.copy_(own)
    return y


def gated_norm_forward(s: GatedNorm, save: bool) -> tuple[Tensor, Tensor]:
    """y (..., E), and 1/rms of each part of each row (rows, groups)."""
    x, z, part = lines(s.x), lines(s.z), s.x.shape[-1] // s.groups
    y = s.x.new_empty(s.x.shape)
    rstd = s.x.new_empty(x.shape[0], s.groups, dtype=torch.float32)
    with on_device(x):
        triton_norm.gated_norm_forward[(rstd.numel(),)](
            x, z, s.weight.contiguous(), y, rstd, x.stride(0), z.stride(0), part, s.groups, s.eps, **norm_tile(part)
        )
    return y, rstd


def gated_norm_backward(s: GatedNorm, rstd: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z and weight."""
    x, z, dy, part = lines(s.x), rows(lines(s.z)), lines(grad_y), s.x.shape[-1] // s.groups
    dx, dz = s.x.new_empty(s.x.shape), s.z.new_empty(s.z.shape)
    programs = min(x.shape[0], ROW_PROGRAMS)
    dweight = rstd.new_empty(programs, x.shape[1])
    with on_device(x):
        triton_norm.gated_norm_backward[(programs * s.groups,)](
            dy, x, z, s.weight.contiguous(), rstd, dx, dz, dweight,
            dy.stride(0), x.stride(0), z.stride(0), x.shape[0], part, s.groups, programs, **norm_tile(part),
        )  # fmt: skip
    return dx, dz, dweight.sum(0).to(s.weight.dtype)
