"""Memory that families share: batch, head, loss, norm, convolution and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from hf_mamba import sizes
from hf_mamba.sizes import LOSS_VOCABULARY_ROWS, ceil_div, loss_rows


def norm_backward(s: Shape, backend: Backend) -> int:
    """ops/norm.py: the gradient and the normed input in fp32, three products; a kernel needs its output alone."""
    return s.narrow(s.stored) if backend.norm_in_kernel else (5 if s.stored < 4 else 4) * s.narrow(4)


def loss_forward(s: Shape) -> int:
    """ops/loss.py: a chunk's logits, softmax and gradient, beside the last chunk's, or its products.

    Beside them the normed hidden states and the shifted labels, twice.
    """
    V, d, w = s.model.vocab_size, s.model.hidden_size, s.weight_bytes
    limit = loss_rows(s.device)
    first = min(limit, s.tokens)
    second = min(limit, s.tokens - first)
    if w < 4:
        chunk = max(10 * first, 6 * (first + second)) * V
        part = min(V, LOSS_VOCABULARY_ROWS) * d
        product = first * V * (4 + w) + w * part
        if second and s.device == "cpu":  # widened before it is added to the first chunk's
            product = max(product, second * V * (4 + w) + (w + 4) * part)
    else:
        chunk = (8 * first + 4 * second) * V
        product = 8 * first * V + 4 * first * d
    cast = w * (V + first) * d if s.autocast else 0  # of the head's weight and of a chunk's hidden states
    return max(chunk, product) + cast + s.narrow(s.stored) + 16 * s.tokens


def loss_backward(s: Shape) -> int:
    """ops/loss.py, `_gradient`: both gradients scaled out of place, the weight's in fp32 and then in its own dtype."""
    V, d, stored = s.model.vocab_size, s.model.hidden_size, s.stored
    return s.narrow(stored) + 4 * V * d + (stored * V * d if stored < 4 else 0)


Bytes = dict[str, int]  # by kind, as in the table above, plus "workspace"
Moments = list[tuple[str, Bytes]]


RANDOM_STATE = 5056  # torch.get_rng_state().nbytes: the Mersenne twister


def total(*parts: Bytes) -> int:
    return sum(sum(part.values()) for part in parts)


def add(*parts: Bytes) -> Bytes:
    """The sum by kind."""
    out: Bytes = {}
    for part in parts:
        for kind, size in part.items():
            out[kind] = out.get(kind, 0) + size
    return out


@dataclass(frozen=True)
class Shape:
    """A micro-batch of a model: everything that the bytes of its activations depend on."""

    model: Any  # the family's Geometry
    batch: int
    length: int
    weight_bytes: int  # w
    residual_bytes: int = 4  # r
    packed: bool = False
    device: str = "cpu"
    autocast: bool = False

    @property
    def stored(self) -> int:
        """s, bytes of a stored weight."""
        return 4 if self.autocast else self.weight_bytes

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def narrow(self, itemsize: int | None = None) -> int:
        """A tensor (B, L, d)."""
        return self.tokens * self.model.hidden_size * (itemsize or self.weight_bytes)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way of computing a family's operation; a family's own class adds what its formulas need.

    Attributes:
        devices: where it runs, "cpu" or "cuda". norm_in_kernel: the norm is one kernel, without fp32 copies.
        note: how its formulas are known, where they were not measured.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    norm_in_kernel: bool = False
    note: str = ""


@dataclass(frozen=True)
class Convolution:
    """A backend's temporaries in `causal_conv1d`, forward and backward: (shape, width, taps) -> bytes."""

    forward: Callable[[Shape, int, int], int]
    backward: Callable[[Shape, int, int], int]


def starts(s: Shape) -> int:
    """Where documents start, bool (B, L)."""
    return s.tokens if s.packed else 0


def _in_torch(s: Shape, width: int, taps: int) -> int:
    """ops/torch/scan.py: the padded input and the sum (then the sum and its silu), in fp32, without the output."""
    return (2 if s.weight_bytes < 4 else 1) * 4 * s.tokens * width


def _back_in_torch(s: Shape, width: int, taps: int) -> int:
    """ops/torch/scan.py: five (B, L, E) in fp32 before the output is there, and a 16-bit gradient's copy."""
    return ((5 if s.weight_bytes == 4 else 6) * 4 - s.weight_bytes) * s.tokens * width


def _back_in_c(s: Shape, width: int, taps: int) -> int:
    """ops/cpu/kernels.py: the gradients of taps and bias of every `CPU_ROWS` steps."""
    return 4 * s.batch * ceil_div(s.length, sizes.CPU_ROWS) * (taps + 1) * width + starts(s)


def _back_in_triton(s: Shape, width: int, taps: int) -> int:
    """ops/triton/launch.py: the same of each program."""
    rows = s.batch * ceil_div(s.length, sizes.TRITON_CONV_STEPS * sizes.TRITON_CONV_TILES)
    return 4 * rows * (taps + 1) * width


CONVOLUTIONS: dict[str, Convolution] = {
    "cpu": Convolution(lambda s, width, taps: starts(s), _back_in_c),
    "triton": Convolution(lambda s, width, taps: 0, _back_in_triton),
    "torch": Convolution(_in_torch, _back_in_torch),
    "mamba_ssm": Convolution(lambda s, width, taps: 0, lambda s, width, taps: 4 * width * (taps + 1)),
}


def saved_by_checkpoint(s: Shape, first: bool) -> Bytes:
    """With gradient checkpointing a block keeps its input (the first one's is the embedding, in s bytes), and the CPU's
    random state, which stays on the host."""
    return {
        "residual": s.narrow(s.stored if first else s.residual_bytes),
        "random_state": RANDOM_STATE if s.device == "cpu" else 0,
    }


def saved_by_batch(s: Shape) -> Bytes:
    """Token ids, which the embedding saves; document numbers, which every convolution and scan saves, once."""
    return {"batch": 8 * s.tokens + (4 * s.tokens if s.packed else 0)}


def saved_by_head(s: Shape) -> Bytes:
    """The final norm's input and statistics; the loss's gradients, which are computed in the forward (ops/loss.py)."""
    m = s.model
    return {
        "residual": s.narrow(s.residual_bytes),
        "norm": 4 * s.tokens,
        "loss": s.narrow(s.stored) + 4 * m.vocab_size * m.hidden_size + 8,
    }


class Block(Protocol):
    """One layer's memory in a micro-batch, by one of the family's backends; hashable, and equal for layers alike.

    A layer of several parts may have `parts(s, backend)`, what each saves by its name: the planner shows it.
    """

    def saved(self, s: Shape, backend: Any) -> Bytes:
        """What it keeps from forward to backward, by kind; autocast's "casts" live until the forward ends."""

    def forward(self, s: Shape, backend: Any) -> Moments:
        """The moments of its forward, what it saves included as it comes.

        The last one computes what only the next block needs: checkpointing does not repeat it.
        """

    def backward(self, s: Shape, backend: Any) -> Moments:
        """The moments of its backward; its own weights' gradients are in "gradients" as they come."""


class TokenFlops:
    """Operations of one token; a family says which are its `forward` and which of them checkpointing repeats."""

    @property
    def forward(self) -> int:
        raise NotImplementedError

    @property
    def recomputed(self) -> int:
        """Operations of the forward that gradient checkpointing does once more."""
        raise NotImplementedError

    @property
    def training(self) -> int:
        """Forward and backward: the model's own operations, which MFU counts."""
        return 3 * self.forward

    def executed(self, gradient_checkpointing: bool) -> int:
        """With the blocks' forward once more where they are recomputed."""
        return self.training + (self.recomputed if gradient_checkpointing else 0)
