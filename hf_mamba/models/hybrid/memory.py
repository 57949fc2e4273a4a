"""What a training step of a hybrid keeps and needs for a moment, in bytes, from the code of the model.

Symbols as in models/mamba2/memory.py, beside them: H heads of attention · D = 2·d·K/H, the width of keys and values
together · F the MLP's width.

One block saves what its Mamba-2 mixer saves (models/mamba2/memory.py, with the norm before it), or with attention

    residual  M·d·r             the normed residual
    norm      M·d·w + 4·M       the projections' input (autocast casts it for each of the three), and 1/rms
    qkv       M·(d + D)·w       queries, keys and values
    attention M·d·w + 4·M·H     its output and the logarithm of each row's sum; of packed rows on a CPU the output
                                twice, as each document's and as the whole

On a GPU, by reading alone: flash attention in 16 bits, whose scores stay on the chip; in fp32 keys and values of every
head, 3·M·d·w in all, and of packed rows a mask of (B, L, L) in w bytes, which grows with the square of the length.

and then, of the MLP:

    mlp_residual  M·d·r
    mlp_norm      M·d·w + 4·M
    gate_up       2·M·F·w       input_linear's output
    gated         2·M·F·w       silu(gate), and its product with up
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hf_mamba.models.common.cost import Backend, Bytes, Moments, Shape, add, norm_backward
from hf_mamba.models.hybrid.table import Geometry
from hf_mamba.models.mamba2.memory import Mamba2BlockMemory


def _linear_casts(s: Shape, *shapes: int) -> int:
    """The 16-bit casts of matrices of so many elements; nothing without autocast."""
    return s.weight_bytes * sum(shapes) if s.autocast else 0


def _tile(s: Shape) -> tuple[int, int]:
    """Rows and columns of scores that a thread of flash attention holds on a CPU (ATen's FlashAttentionKernel.cpp)."""
    rows = 256 if s.length >= 768 else 64 if s.length >= 192 else 32
    return min(rows, s.length), min(512, s.length)


def _flash_forward(s: Shape) -> int:
    """Scores, their maxima and sums, and the output so far, in fp32; of a 16-bit input, the scores once more."""
    rows, columns = _tile(s)
    return 4 * rows * (columns + 2 + s.model.head_dim) + (2 * rows * columns if s.weight_bytes < 4 else 0)


def _flash_backward(s: Shape) -> int:
    """Scores and their gradients."""
    rows, columns = _tile(s)
    return (12 if s.weight_bytes < 4 else 8) * rows * columns


@dataclass(frozen=True)
class _Attention:
    """The half of a block with attention, as a block of its own."""

    model: Geometry

    def _matrices(self) -> tuple[int, int]:
        """Elements of q, k and v together, and of o."""
        d = self.model.hidden_size
        return d * (d + 2 * self.model.key_width), d * d

    def _attention(self, s: Shape) -> tuple[int, int, int, int]:
        """What it saves: q, k and v, and the rest; then what its forward and its backward need beside that."""
        m, alone = self.model, s.narrow()
        sums = 4 * s.tokens * m.num_attention_heads
        qkv = s.tokens * (m.hidden_size + 2 * m.key_width) * s.weight_bytes
        if s.device == "cpu":
            joined = alone if s.packed else 0  # the documents' outputs as one, and their gradients of q
            return qkv, alone + joined + sums, _flash_forward(s), max(_flash_backward(s), joined)
        shared = m.key_width < m.hidden_size
        if s.weight_bytes < 4 and m.head_dim % 8 == 0 and m.head_dim <= 256:  # attention.py, _flash_serves
            # gradients of q are summed in fp32, those of shared keys and values made for every head
            return qkv, alone + sums, 0, s.narrow(4) + sums + (2 * alone if shared else 0)
        pairs = s.batch * s.length**2 if s.packed else 0
        repeated = 2 * alone if shared else 0
        # the mask is made of two others, bool; k and v are there before they are repeated
        return 3 * alone, alone + sums + s.weight_bytes * pairs, 3 * pairs + (qkv if shared else 0), sums + repeated

    def saved(self, s: Shape, backend: Backend) -> Bytes:
        qkv, rest, _, _ = self._attention(s)
        return {
            "residual": s.narrow(s.residual_bytes),
            "norm": (3 if s.autocast else 1) * s.narrow() + 4 * s.tokens,
            "qkv": qkv,
            "attention": rest,
            "casts": _linear_casts(s, *self._matrices()),
        }

    def forward(self, s: Shape, backend: Backend) -> Moments:
        saved = self.saved(s, backend)
        norm = s.narrow(s.stored) + (0 if backend.norm_in_kernel else 2 * s.narrow(4))
        normed = s.narrow(s.stored) if s.autocast else 0
        return [
            ("norm", {"residual": saved["residual"], "workspace": norm}),
            ("attention", add(saved, {"workspace": normed + self._attention(s)[2]})),
            ("o_proj", add(saved, {"workspace": normed + s.narrow() + s.narrow(s.residual_bytes)})),
        ]

    def backward(self, s: Shape, backend: Backend) -> Moments:
        m, saved = self.model, self.saved(s, backend)
        qkv, o = self._matrices()

        def moment(keep: str, workspace: int, gradients: int, *casts: int) -> Bytes:
            kept = {kind: saved[kind] for kind in keep.split()}
            own = {"workspace": workspace, "gradients": gradients, "casts": _linear_casts(s, *casts)}
            return kept | {"stream": s.narrow(s.residual_bytes)} | own

        cast = s.narrow() if s.weight_bytes != s.residual_bytes else 0
        mixed = s.tokens * (m.hidden_size + 2 * m.key_width) * s.weight_bytes
        thin = s.narrow(s.stored)
        closing = thin + (thin if backend.norm_in_kernel else norm_backward(s, backend))
        return [
            ("o_proj", moment(" ".join(saved), cast + s.narrow() + _linear_casts(s, o), o)),
            (
                "attention",
                moment("residual norm qkv attention", s.narrow() + mixed + self._attention(s)[3], o, qkv),
            ),
            ("q, k, v", moment("residual norm", mixed + 2 * thin + _linear_casts(s, qkv), o, qkv)),
            ("norm", moment("residual norm", closing, o + qkv)),
        ]


@dataclass(frozen=True)
class HybridBlockMemory:
    """A layer's memory: its mixer's and then the MLP's; layers of one kind are equal."""

    model: Geometry
    layer: int = field(compare=False)
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.model.layer_types[self.layer])

    def _mixer(self, s: Shape) -> tuple[Mamba2BlockMemory | _Attention, Shape]:
        if self.kind == "mamba":
            return Mamba2BlockMemory(self.model.mamba, self.layer), replace(s, model=self.model.mamba)
        return _Attention(self.model), s

    def _wide(self, s: Shape) -> int:
        """A tensor (B, L, F)."""
        return s.tokens * self.model.shared_intermediate_size * s.weight_bytes

    def _matrices(self) -> tuple[int, int]:
        """Elements of input_linear and of output_linear."""
        size = self.model.hidden_size * self.model.shared_intermediate_size
        return 2 * size, size

    def _mlp(self, s: Shape) -> Bytes:
        return {
            "mlp_residual": s.narrow(s.residual_bytes),
            "mlp_norm": s.narrow() + 4 * s.tokens,
            "gate_up": 2 * self._wide(s),
            "gated": 2 * self._wide(s),
            "casts": _linear_casts(s, *self._matrices()),
        }

    def parts(self, s: Shape, backend: Backend) -> dict[str, Bytes]:
        """What its mixer, "mamba" or "attention", and its MLP save."""
        mixer, own = self._mixer(s)
        return {self.kind: mixer.saved(own, backend), "mlp": self._mlp(s)}  # type: ignore[arg-type]

    def saved(self, s: Shape, backend: Backend) -> Bytes:
        return add(*self.parts(s, backend).values())

    def forward(self, s: Shape, backend: Backend) -> Moments:
        mixer, own = self._mixer(s)
        before, mlp = mixer.saved(own, backend), self._mlp(s)  # type: ignore[arg-type]
        norm = s.narrow(s.stored) + (0 if backend.norm_in_kernel else 2 * s.narrow(4))
        normed = s.narrow(s.stored) if s.autocast else 0
        whole = add(before, mlp)
        return [
            *mixer.forward(own, backend),  # type: ignore[arg-type]
            ("mlp norm", add(before, {"mlp_residual": mlp["mlp_residual"], "workspace": norm})),
            ("mlp", add(whole, {"workspace": normed})),
            ("output_linear", add(whole, {"workspace": normed + s.narrow() + s.narrow(s.residual_bytes)})),
        ]

    def backward(self, s: Shape, backend: Backend) -> Moments:
        mixer, own = self._mixer(s)
        before, mlp = mixer.saved(own, backend), self._mlp(s)  # type: ignore[arg-type]
        first, last = self._matrices()
        wide, thin = self._wide(s), s.narrow(s.stored)
        cast = s.narrow() if s.weight_bytes != s.residual_bytes else 0
        closing = thin + (thin if backend.norm_in_kernel else norm_backward(s, backend))

        def moment(keep: str, workspace: int, gradients: int, *casts: int) -> Bytes:
            kept = {kind: mlp[kind] for kind in keep.split()}
            kept |= {"stream": s.narrow(s.residual_bytes), "workspace": workspace, "gradients": gradients}
            return add(before, kept, {"casts": _linear_casts(s, *casts)})

        both = "mlp_residual mlp_norm"
        moments = [
            ("output_linear", moment(f"{both} gate_up gated", cast + wide + _linear_casts(s, last), last, first, last)),
            ("silu", moment(f"{both} gate_up", 4 * wide, last, first)),  # silu(gate), and three gradients
            ("input_linear", moment(both, 4 * wide + s.narrow() + _linear_casts(s, first), last, first)),
            ("mlp norm", moment(both, closing, first + last)),
        ]
        done = {"gradients": first + last}
        moments += [(name, add(found, done)) for name, found in mixer.backward(own, backend)]  # type: ignore[arg-type]
        return moments
