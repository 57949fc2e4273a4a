"""What a training step keeps and needs for a moment, in bytes, from the code of the model and of each backend.

Symbols: B batch · L length · M = B·L tokens · V vocabulary · d width · E inner width · N states · k taps ·
R rank of Δ · w bytes of a weight · r bytes of the residual stream (4, or w where `residual_in_fp32` is off).

One block saves for its backward, in the order of `MambaBlock.forward` (modeling_mamba.py):

    residual  M·d·r          the normed residual                               rms_norm saves its input,
    norm      M·d·w + 4·M    in_proj's input, and 1/rms                        and one number per row
    in_proj   M·2E·w         [x; z]: the convolution saves x, the scan z, both views of it
    conv1d    M·E·w          the convolution's output: saved by x_proj and by the scan
    x_proj    M·(R+2N)·w     [Δ; B; C]: saved by dt_proj and by the scan, as views
    dt_proj   M·E·w          Δ before its softplus
    scan      B·⌈L/T⌉·N·E·4 + 8·E·N   a state per T steps; exp(A_log) and A = -exp(A_log), both fp32
    out_proj  M·E·w          the gated output

Under autocast (a 16-bit run without DeepSpeed) w is 2 while weights are stored in s = 4 bytes; else s = w. Then a block
also saves the 16-bit casts of its four linear weights, 2·(2E·d + E·(R+2N) + R·E + E·d), made once a forward; the norm
returns s bytes, so that in_proj saves a cast of it; and the embedding and the loss's gradients are s bytes an element.

The batch saves token ids, 8·M (and packed rows their document numbers, 4·M), the final norm M·d·r + 4·M, and the loss
the two gradients that it has computed already, M·d·s and V·d·4, and the number of labels, 8. Parameters are not counted
here, nor views of them.
tests/preflight/test_memory_activations.py holds all of this, to the byte, against what autograd really keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from hf_mamba import segments, sizes
from hf_mamba.models.common.cost import (
    CONVOLUTIONS,
    Backend,
    Bytes,
    Convolution,
    Moments,
    Shape,
    add,
    norm_backward,
    saved_by_batch,
    saved_by_checkpoint,
    saved_by_head,
    starts,
)
from hf_mamba.models.mamba.table import Geometry, table
from hf_mamba.sizes import SCAN_CHUNK, ceil_div

MAMBA_SSM_CHUNK = 2048  # steps between two states that mamba-ssm's scan saves


def _wide(s: Shape, itemsize: int | None = None) -> int:
    """A tensor (B, L, E)."""
    return s.tokens * s.model.intermediate_size * (itemsize or s.weight_bytes)


def _state(s: Shape) -> int:
    """A state (B, N, E) in fp32."""
    return 4 * s.batch * s.model.state_size * s.model.intermediate_size


def _rates(s: Shape) -> int:
    """A (E, N) in fp32."""
    return 4 * s.model.intermediate_size * s.model.state_size


def _casts(s: Shape, *linears: str) -> int:
    """The 16-bit casts of some of a block's linear weights; nothing without autocast."""
    if not s.autocast:
        return 0
    return s.weight_bytes * _elements(s.model, linears)


@lru_cache(maxsize=64)
def _elements(model: Geometry, linears: tuple[str, ...]) -> int:
    """Elements of some of a block's linear weights."""
    return sum(row.size for row in table(model) if row.layer == 0 and row.decays and row.component in linears)


def _chunked_parts(s: Shape) -> tuple[int, int, bool]:
    """(P, Q, several): (B, T, E) and (B, T, N, E) in fp32, and whether there is more than one chunk."""
    chunk = SCAN_CHUNK["torch"]
    row = 4 * s.batch * min(chunk, s.length) * s.model.intermediate_size
    return row, row * s.model.state_size, s.length > chunk


def _torch_scan_forward(s: Shape) -> int:
    """ops/torch/scan.py: new decay and history beside the last chunk's history; Δ, its slope, Δu, the last output."""
    p, q, several = _chunked_parts(s)
    return (
        (3 if several else 2) * q + (4 if several else 3) * p + (p if s.weight_bytes < 4 else 0) + _state(s) + _rates(s)
    )


def _torch_scan_backward(s: Shape) -> int:
    """ops/torch/scan.py: decay, history, its gradient, one more; nine rows (B, T, E); copies of what is not fp32."""
    p, q, several = _chunked_parts(s)
    return 4 * q + (9 if several else 7) * p + (2 * p if s.weight_bytes < 4 else 0) + _state(s) + 2 * _rates(s)


def _cpu_scan_forward(s: Shape) -> int:
    """ops/cpu/kernels.py: the first and the last state, A, where documents start."""
    return 2 * _state(s) + _rates(s) + starts(s)


def _cpu_scan_backward(s: Shape) -> int:
    """ops/cpu/kernels.py: dB and dC of each group of channels and a sum of one, dA, the first state's gradient."""
    groups = ceil_div(s.model.intermediate_size, sizes.CPU_GROUP)
    sums = 2 * groups + (1 if s.weight_bytes < 4 else 0)
    return sums * 4 * s.tokens * s.model.state_size + 2 * _state(s) + _rates(s) + starts(s)


def _triton_segments(s: Shape, backward: bool) -> int:
    model = s.model
    return segments.choose(backward, s.batch, model.intermediate_size, s.length, model.state_size, segments.H100)[1]


def _triton_pairs(s: Shape) -> int:
    """ops/triton/launch.py: B and C in fp32, their states in whole sixteens."""
    return 8 * s.tokens * sizes.triton_padded(s.model.state_size)


def _triton_scan_forward(s: Shape) -> int:
    """ops/triton/launch.py: B and C, the last state twice, the segments' states."""
    parts = _triton_segments(s, backward=False)
    return _triton_pairs(s) + 2 * _state(s) + (2 * parts * _state(s) if parts > 1 else 0)


def _triton_scan_backward(s: Shape) -> int:
    """ops/triton/launch.py: B, C; dB and dC of each channel block and their sum; dA, dD and dΔ's bias of each part.

    Then the state's gradient, with several segments theirs, and scratch.
    """
    parts = _triton_segments(s, backward=True)
    blocks = ceil_div(s.model.intermediate_size, sizes.TRITON_CHANNELS)
    sums = parts * s.batch * (s.model.intermediate_size * 4) * (s.model.state_size + 2)
    programs = min(blocks * s.batch * parts, segments.H100.processors * sizes.TRITON_RESIDENT)
    scratch = 4 * programs * sizes.triton_scratch(s.model.state_size)
    return (2 + blocks) * _triton_pairs(s) + sums + (1 + 2 * (parts > 1) * parts) * _state(s) + scratch


def _mamba_ssm_saved(s: Shape) -> int:
    """Channels-first copies of x, Δ, z, B and C, the ungated output, and a state pair per chunk."""
    copies = 4 * _wide(s) + 2 * s.tokens * s.model.state_size * s.weight_bytes
    return copies + 2 * ceil_div(s.length, MAMBA_SSM_CHUNK) * _state(s)


@dataclass(frozen=True)
class MambaBackend(Backend):
    """What a way of computing the scan saves, and its kernels' temporaries beside inputs and outputs.

    Attributes:
        chunk: T, steps between two saved states.
        scan_forward, scan_backward: Shape -> bytes of temporaries at their largest moment.
        convolution: the same of the convolution.
    """

    chunk: int
    scan_forward: Callable[[Shape], int]
    scan_backward: Callable[[Shape], int]
    convolution: Convolution
    extra_saved: Callable[[Shape], int] = lambda s: 0


BACKENDS: dict[str, MambaBackend] = {
    "cpu": MambaBackend(
        SCAN_CHUNK["cpu"], _cpu_scan_forward, _cpu_scan_backward, CONVOLUTIONS["cpu"], devices=("cpu",)
    ),
    "triton": MambaBackend(
        SCAN_CHUNK["triton"],
        _triton_scan_forward,
        _triton_scan_backward,
        CONVOLUTIONS["triton"],
        devices=("cuda",),
        norm_in_kernel=True,
    ),
    "torch": MambaBackend(SCAN_CHUNK["torch"], _torch_scan_forward, _torch_scan_backward, CONVOLUTIONS["torch"]),
    "mamba_ssm": MambaBackend(
        1 << 62,
        lambda s: _state(s),
        lambda s: 2 * _wide(s) + 8 * s.tokens * s.model.state_size,
        CONVOLUTIONS["mamba_ssm"],
        extra_saved=_mamba_ssm_saved,
        devices=("cuda",),
        norm_in_kernel=True,
        note="read from mamba-ssm 2.3.2, not measured",
    ),
}


def saved_by_block(s: Shape, backend: MambaBackend) -> Bytes:
    """The table at the top of this file."""
    m, w = s.model, s.weight_bytes
    chunks = ceil_div(s.length, backend.chunk) if backend.chunk < 1 << 62 else 0
    return {
        "residual": s.narrow(s.residual_bytes),
        "norm": s.narrow() + 4 * s.tokens,
        "in_proj": 2 * _wide(s),
        "conv1d": _wide(s),
        "x_proj": s.tokens * (m.time_step_rank + 2 * m.state_size) * w,
        "dt_proj": _wide(s),
        "scan": chunks * _state(s) + 2 * _rates(s) + backend.extra_saved(s),
        "out_proj": _wide(s),
        "casts": _casts(s, "in_proj", "x_proj", "dt_proj", "out_proj"),
    }


def saved(s: Shape, backend: MambaBackend, checkpointing: bool = False) -> Bytes:
    """Everything that the forward leaves behind for the backward, by kind."""
    layers = s.model.num_hidden_layers
    if checkpointing:
        blocks = [saved_by_checkpoint(s, first=i == 0) for i in range(layers)]
    else:
        blocks = [{kind: size * layers for kind, size in saved_by_block(s, backend).items()}]
    return add(saved_by_batch(s), *blocks, saved_by_head(s))


def block_forward(s: Shape, backend: MambaBackend) -> Moments:
    """Moments of `MambaBlock.forward`, the block's own saved tensors included as they come."""
    saved = saved_by_block(s, backend)
    so_far: Bytes = {"residual": saved["residual"]}
    r = s.narrow(4)
    norm = s.narrow(s.stored) + (0 if backend.norm_in_kernel else 2 * r)
    normed = s.narrow(s.stored) if s.autocast else 0  # the mixer's argument, which in_proj has saved a cast of
    moments = [("norm", add(so_far, {"workspace": norm}))]
    so_far |= {kind: saved[kind] for kind in ("norm", "in_proj", "conv1d", "casts")}
    conv = backend.convolution.forward(s, s.model.intermediate_size, s.model.conv_kernel)
    moments.append(("conv1d", add(so_far, {"workspace": normed + conv})))
    moments.append(("scan", add(saved, {"workspace": normed + backend.scan_forward(s)})))
    moments.append(("out_proj", add(saved, {"workspace": s.narrow() + s.narrow(s.residual_bytes)})))
    return moments


def block_backward(s: Shape, backend: MambaBackend) -> Moments:
    """Moments of a block's backward; saved tensors leave as their operation is done.

    `stream` is the residual's gradient. The block's own weight gradients are in "gradients", as they come, in the
    stored weight's dtype; under autocast one is a 16-bit one before, in the workspace.
    """
    m, w = s.model, s.weight_bytes
    saved = saved_by_block(s, backend)
    E, d, R, N = m.intermediate_size, m.hidden_size, m.time_step_rank, m.state_size
    stream = {"stream": s.narrow(s.residual_bytes)}
    thin, wide = s.narrow(), _wide(s)

    def moment(keep: str, workspace: int, gradient: int) -> Bytes:
        kept = {kind: saved[kind] for kind in keep.split()}
        return add(kept, stream, {"workspace": workspace, "gradients": gradient})

    cast = thin if w != s.residual_bytes else 0
    bc = 2 * s.tokens * N * w
    out_proj_cast, in_proj_cast = _casts(s, "out_proj"), {"casts": _casts(s, "in_proj")}
    everything = " ".join(saved)
    before_scan = "residual norm in_proj conv1d x_proj dt_proj scan"
    out_proj, x_proj, in_proj = E * d, E * (2 * R + 2 * N + N + 3), 2 * E * d + E * (m.conv_kernel + 1)
    norm = norm_backward(s, backend)
    inner_casts = {"casts": _casts(s, "in_proj", "x_proj", "dt_proj")}
    conv1d = 3 * wide + backend.convolution.backward(s, E, m.conv_kernel)
    thin = s.narrow(s.stored)
    closing = thin + (thin if backend.norm_in_kernel else norm)
    return [
        ("out_proj", moment(everything, cast + wide + out_proj_cast, out_proj)),
        ("scan", add(moment(before_scan, 4 * wide + bc + backend.scan_backward(s), out_proj), inner_casts)),
        (
            "x_proj",
            add(moment("residual norm in_proj conv1d x_proj", 3 * wide + bc, out_proj + x_proj), inner_casts),
        ),
        ("conv1d", add(moment("residual norm in_proj", conv1d, out_proj + x_proj), in_proj_cast)),
        ("in_proj", add(moment("residual norm", 4 * wide, out_proj + x_proj), in_proj_cast, in_proj_cast)),
        ("norm", moment("residual norm", closing, out_proj + x_proj + in_proj)),
    ]


@dataclass(frozen=True)
class MambaBlockMemory:
    """One block's memory; all of a Mamba's are alike."""

    model: Geometry
    layer: int = field(compare=False)

    def saved(self, s: Shape, backend: MambaBackend) -> Bytes:
        return saved_by_block(s, backend)

    def forward(self, s: Shape, backend: MambaBackend) -> Moments:
        return block_forward(s, backend)

    def backward(self, s: Shape, backend: MambaBackend) -> Moments:
        return block_backward(s, backend)
