"""What a training step of a Mamba-2 keeps and needs for a moment, in bytes, from the code of the model.

Symbols: B batch · L length · M = B·L tokens · d width · H heads · P a head's width · E = H·P · N states · G groups ·
W = E + 2·G·N the convolution's width · T steps of a chunk · w bytes of a weight · r bytes of the residual stream.

One block saves for its backward, in the order of `Mamba2Block.forward` (modeling_mamba2.py):

    residual  M·d·r             the normed residual
    norm      M·d·w + 4·M       in_proj's input, and 1/rms
    in_proj   M·(E + W + H)·w   [z; x; B; C; Δ]: the gated norm saves z, the convolution x, B and C, views of it
    conv1d    M·W·w             the convolution's output, which ssd saves as x, B and C
    steps     12·M·H + 8·H      softplus's argument, Δ and A Δ in fp32, exp(A_log) and A; 4·M·H more where Δ is clamped
    ssd       4·B·⌈L/T⌉·E·N     a state per chunk
    y         M·E·w + 4·M·G     its output, which the gated norm saves, and 1/rms of each group
    out_proj  M·E·w             the gated and normed output

Autocast, the batch and the head are as in models/mamba/memory.py.
tests/preflight/test_memory_activations.py holds all of this, to the byte, against what autograd really keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hf_mamba.models.common.cost import (
    CONVOLUTIONS,
    Backend,
    Bytes,
    Convolution,
    Moments,
    Shape,
    add,
    norm_backward,
    starts,
)
from hf_mamba.models.mamba2.table import Geometry
from hf_mamba.sizes import CPU_ROWS, MAMBA_SSM_DUAL_CHUNK, SSD_CHUNK, ceil_div, gated_norm_saved_bytes, ssd_saved_bytes


def _wide(s: Shape, itemsize: int | None = None) -> int:
    """A tensor (B, L, E)."""
    return s.tokens * s.model.intermediate_size * (itemsize or s.weight_bytes)


def _steps(s: Shape) -> int:
    """A tensor (B, L, H) in fp32."""
    return 4 * s.tokens * s.model.num_heads


def _casts(s: Shape, *linears: str) -> int:
    """The 16-bit casts of some of a block's linear weights; nothing without autocast."""
    m = s.model
    rows = {"in_proj": m.projected, "out_proj": m.intermediate_size}
    return s.weight_bytes * m.hidden_size * sum(rows[name] for name in linears) if s.autocast else 0


def _state(s: Shape) -> int:
    """A state (B, H, P, N) in fp32."""
    return ssd_saved_bytes(1, s.model.num_heads, s.model.head_dim, s.model.state_size) * s.batch


def _ssd_saved(s: Shape) -> int:
    """A state for each chunk."""
    return s.batch * ssd_saved_bytes(s.length, s.model.num_heads, s.model.head_dim, s.model.state_size)


def _documents(s: Shape) -> int:
    """Document numbers (B, L) in int64."""
    return 8 * s.tokens if s.packed else 0


@dataclass(frozen=True)
class _Chunk:
    """Sizes of a chunk's tensors in fp32; all are 0 for the chunk before the first.

    Attributes:
        rows: (B, T, E). shared: B and C, (B, T, G, N) each. pairs: (B, H, T, T). products: (B, G, T, T).
        numbers: (B, T, H).
        mask: of packed documents, (B, T, T) in bool. copies: of x, B and C, where they are not fp32.
    """

    rows: int
    shared: int
    pairs: int
    products: int
    numbers: int
    mask: int
    copies: int

    @classmethod
    def of(cls, s: Shape, steps: int) -> _Chunk:
        m, size = s.model, 4 * s.batch * steps
        rows, shared = size * m.intermediate_size, 2 * size * m.n_groups * m.state_size
        copies = rows + shared if s.weight_bytes < 4 else 0
        mask = s.batch * steps**2 if s.packed else 0
        numbers = size * m.num_heads
        return cls(rows, shared, numbers * steps, size * m.n_groups * steps, numbers, mask, copies)

    def made(self, s: Shape) -> int:
        """When the chunk has just been made."""
        copied = self.shared if s.batch > 1 and s.model.n_groups > 1 else 0  # by the product of C and B
        return self.pairs + self.products + self.copies + 4 * self.numbers + self.mask + copied


def _chunks(s: Shape) -> list[int]:
    """Steps of the first chunks, of which later ones are repetitions, and of the last one."""
    whole, rest = divmod(s.length, SSD_CHUNK)
    return [SSD_CHUNK] * min(whole, 2) + [rest] * (rest > 0)


def _ssd_forward_in_torch(s: Shape) -> int:
    """ops/torch/ssd.py: the masked products beside the decays; rows of this chunk, and the last chunk's output.

    Where there are copies, it is more to have made a chunk while the one before is still there.
    """
    copied = s.batch > 1  # by a product of operands that are not contiguous
    before, largest = _Chunk.of(s, 0), 0
    for steps in _chunks(s):
        c = _Chunk.of(s, steps)
        rows = before.rows + (2 + copied) * c.rows
        kept = before.pairs + before.products + before.copies + before.rows + 2 * before.numbers
        largest = max(largest, 2 * c.pairs + c.products + rows + 2 * c.numbers + c.copies, c.made(s) + kept)
        before = c
    return largest + _state(s) + _documents(s)


def _ssd_backward_in_torch(s: Shape) -> int:
    """ops/torch/ssd.py, `_within`: three of the pairs' size beside what the chunk after this one has left."""
    copied = 2 if s.batch > 1 else 0
    after, largest = _Chunk.of(s, 0), 0
    for steps in reversed(_chunks(s)):
        c = _Chunk.of(s, steps)
        kept = after.pairs + 2 * after.products + after.copies + 4 * after.rows + 6 * after.numbers
        kept += (after.rows if s.weight_bytes < 4 else 0) + (_state(s) if after.rows else 0)
        largest = max(largest, c.made(s) + kept)
        gradient = c.rows if s.weight_bytes < 4 else 0  # the output's, in fp32
        pairs = max(3 * c.pairs + c.products, 2 * c.pairs + copied * c.rows)
        own = pairs + c.products + c.rows + 2 * c.numbers + c.copies + gradient
        left = after.products + 4 * (after.rows + after.numbers) + (_state(s) if after.rows else 0)
        largest, after = max(largest, own + left), c
    return largest + _state(s) + _documents(s)


def _gated_norm_in_torch(s: Shape) -> int:
    """ops/torch/norm.py: three of its width in fp32, the last of which is the output where the input is fp32."""
    return 3 * _wide(s, 4) - _wide(s)


def _gated_norm_back_in_torch(s: Shape) -> int:
    """ops/torch/norm.py: with copies of what is not fp32, and with both gradients."""
    return (8 if s.weight_bytes == 4 else 11) * _wide(s, 4)


def _ssd_forward_in_c(s: Shape) -> int:
    """ops/cpu/ssd.py: the products of C and B, which the heads of a group share, and the final state, twice."""
    products = 4 * s.batch * ceil_div(s.length, SSD_CHUNK) * s.model.n_groups * SSD_CHUNK**2
    return products + 2 * _state(s) + starts(s)


def _ssd_backward_in_c(s: Shape) -> int:
    """ops/cpu/ssd.py: the gradient of each chunk's state, of the first one, and of D by chunk."""
    m, chunks = s.model, s.batch * ceil_div(s.length, SSD_CHUNK)
    return _ssd_saved(s) + _state(s) + 4 * chunks * m.num_heads + starts(s)


def _gated_norm_back_in_c(s: Shape) -> int:
    """ops/cpu/ssd.py: both gradients, and the weight's of every `CPU_ROWS` rows."""
    return 2 * _wide(s) + 4 * ceil_div(s.tokens, CPU_ROWS) * s.model.intermediate_size


def _numbers_in_triton(s: Shape) -> int:
    """One number in fp32 for each head and step of whole chunks."""
    return 4 * s.batch * s.model.num_heads * ceil_div(s.length, SSD_CHUNK) * SSD_CHUNK


def _ssd_forward_in_triton(s: Shape) -> int:
    """ops/triton/ssd_launch.py: seven numbers a step, and the final state."""
    return 7 * _numbers_in_triton(s) + _state(s) + 2 * _documents(s)


def _ssd_backward_in_triton(s: Shape) -> int:
    """ops/triton/ssd_launch.py: the gradients of the states, as many as are saved, and fifteen numbers a step."""
    return _ssd_saved(s) + 15 * _numbers_in_triton(s) + _state(s) + 2 * _documents(s)


def _gated_norm_back_in_triton(s: Shape) -> int:
    """ops/triton/ssd_launch.py: both gradients, and the weight's of at most 512 programs."""
    return 2 * _wide(s) + 4 * min(s.tokens, 512) * s.model.intermediate_size


def _mamba_ssm_chunks(s: Shape) -> tuple[int, int, int]:
    """mamba-ssm's whole chunks in fp32: one number a head and step, the products of C and B, a state for each."""
    m, chunks = s.model, s.batch * ceil_div(s.length, MAMBA_SSM_DUAL_CHUNK)
    numbers = 4 * chunks * MAMBA_SSM_DUAL_CHUNK * m.num_heads
    return numbers, 4 * chunks * m.n_groups * MAMBA_SSM_DUAL_CHUNK**2, 4 * chunks * m.intermediate_size * m.state_size


def _ssd_forward_in_mamba_ssm(s: Shape) -> int:
    """ssd_combined.py: Δ in chunks; the states in fp32, then before each chunk; the products of C and B."""
    numbers, products, states = _mamba_ssm_chunks(s)
    return numbers + products + states + states * s.weight_bytes // 4 + _state(s) + 2 * _documents(s)


def _ssd_backward_in_mamba_ssm(s: Shape) -> int:
    """ssd_combined.py: six numbers a step, the products and their gradients, the states in fp32, and they and their
    gradients in 16 bits."""
    numbers, products, states = _mamba_ssm_chunks(s)
    return 6 * numbers + 2 * products + states + 2 * (states * s.weight_bytes // 4) + _state(s)


@dataclass(frozen=True, kw_only=True)
class Mamba2Backend(Backend):
    """A backend's temporaries in the convolution, `ssd` and `gated_rms_norm`: forward and backward, in bytes.

    Attributes:
        ssd_saved: what `ssd` keeps beside its operands.
    """

    convolution: Convolution
    ssd_saved: Callable[[Shape], int] = _ssd_saved
    ssd: Callable[[Shape], int] = _ssd_forward_in_torch
    ssd_backward: Callable[[Shape], int] = _ssd_backward_in_torch
    gated_norm: Callable[[Shape], int] = _gated_norm_in_torch
    gated_norm_backward: Callable[[Shape], int] = _gated_norm_back_in_torch


BACKENDS: dict[str, Mamba2Backend] = {
    "cpu": Mamba2Backend(
        convolution=CONVOLUTIONS["cpu"],
        ssd=_ssd_forward_in_c,
        ssd_backward=_ssd_backward_in_c,
        gated_norm=lambda s: 0,
        gated_norm_backward=_gated_norm_back_in_c,
        devices=("cpu",),
    ),
    "triton": Mamba2Backend(
        convolution=CONVOLUTIONS["triton"],
        ssd=_ssd_forward_in_triton,
        ssd_backward=_ssd_backward_in_triton,
        gated_norm=lambda s: 0,
        gated_norm_backward=_gated_norm_back_in_triton,
        devices=("cuda",),
        norm_in_kernel=True,
    ),
    "torch": Mamba2Backend(convolution=CONVOLUTIONS["torch"]),
    "mamba_ssm": Mamba2Backend(
        convolution=CONVOLUTIONS["triton"],  # packed rows are not for causal-conv1d here
        ssd_saved=lambda s: 0,  # running sums of A Δ, in the place of A Δ
        ssd=_ssd_forward_in_mamba_ssm,
        ssd_backward=_ssd_backward_in_mamba_ssm,
        gated_norm=lambda s: 0,
        gated_norm_backward=_gated_norm_back_in_triton,
        devices=("cuda",),
        norm_in_kernel=True,
        note="read from mamba-ssm 2.3.2, not measured",
    ),
}


@dataclass(frozen=True)
class Mamba2BlockMemory:
    """One block's memory; all of a Mamba-2's are alike."""

    model: Geometry
    layer: int = field(compare=False)

    def saved(self, s: Shape, backend: Mamba2Backend) -> Bytes:
        """The table at the top of this file."""
        m, w = s.model, s.weight_bytes
        return {
            "residual": s.narrow(s.residual_bytes),
            "norm": s.narrow() + 4 * s.tokens,
            "in_proj": s.tokens * m.projected * w,
            "conv1d": s.tokens * m.conv_width * w,
            "steps": (4 if m.limited else 3) * _steps(s) + 8 * m.num_heads,
            "ssd": backend.ssd_saved(s),
            "y": _wide(s) + gated_norm_saved_bytes(s.tokens, m.n_groups),
            "out_proj": _wide(s),
            "casts": _casts(s, "in_proj", "out_proj"),
        }

    def forward(self, s: Shape, backend: Mamba2Backend) -> Moments:
        """Moments of `Mamba2Block.forward`, the block's own saved tensors included as they come."""
        m, saved = s.model, self.saved(s, backend)
        norm = s.narrow(s.stored) + (0 if backend.norm_in_kernel else 2 * s.narrow(4))
        normed = s.narrow(s.stored) if s.autocast else 0  # the mixer's argument, which in_proj has saved a cast of

        def until(*kinds: str) -> Bytes:
            return {kind: saved[kind] for kind in ("residual", "norm", "in_proj", "casts", *kinds)}

        conv = backend.convolution.forward(s, m.conv_width, m.conv_kernel)
        final = _state(s)
        return [
            ("norm", {"residual": saved["residual"], "workspace": norm}),
            ("conv1d", add(until("conv1d"), {"workspace": normed + conv})),
            ("ssd", add(until("conv1d", "steps", "ssd"), {"workspace": normed + _wide(s) + backend.ssd(s)})),
            ("gated norm", add(saved, {"workspace": normed + final + backend.gated_norm(s)})),
            ("out_proj", add(saved, {"workspace": final + s.narrow() + s.narrow(s.residual_bytes)})),
        ]

    def backward(self, s: Shape, backend: Mamba2Backend) -> Moments:
        """Moments of a block's backward; saved tensors leave as their operation is done.

        `stream` is the residual's gradient. The block's own weight gradients are in "gradients", as they come.
        """
        m, saved, wide = s.model, self.saved(s, backend), _wide(s)
        E, d = m.intermediate_size, m.hidden_size

        def moment(keep: str, workspace: int, gradients: int, *casts: str) -> Bytes:
            kept = {kind: saved[kind] for kind in keep.split()}
            stream = s.narrow(s.residual_bytes)
            return kept | {"stream": stream, "workspace": workspace, "gradients": gradients, "casts": _casts(s, *casts)}

        cast = s.narrow() if s.weight_bytes != s.residual_bytes else 0
        mixed, projected = s.tokens * m.conv_width * s.weight_bytes, s.tokens * m.projected * s.weight_bytes
        out_proj, own = E * d, E + 3 * m.num_heads
        conv, in_proj = m.conv_width * (m.conv_kernel + 1), m.projected * d
        thin = s.narrow(s.stored)
        closing = thin + (thin if backend.norm_in_kernel else norm_backward(s, backend))
        before_norm = "residual norm in_proj conv1d steps ssd y"
        before_ssd = "residual norm in_proj conv1d steps ssd"
        convolution = backend.convolution.backward(s, m.conv_width, m.conv_kernel)
        ssd = mixed + 2 * _steps(s) + backend.ssd_backward(s)
        return [
            ("out_proj", moment(" ".join(saved), cast + wide + _casts(s, "out_proj"), out_proj)),
            ("gated norm", moment(before_norm, wide + backend.gated_norm_backward(s), out_proj + E, "in_proj")),
            (
                "ssd",
                moment(before_ssd, 2 * wide + ssd, out_proj + E, "in_proj"),
            ),
            ("conv1d", moment("residual norm in_proj", 2 * mixed + wide + convolution, out_proj + own, "in_proj")),
            (
                "in_proj",
                moment("residual norm", 2 * projected + _casts(s, "in_proj"), out_proj + own + conv, "in_proj"),
            ),
            ("norm", moment("residual norm", closing, out_proj + own + conv + in_proj)),
        ]
