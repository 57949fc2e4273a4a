"""The operands of an operation as one value, for the functions behind ops/public.py, which documents them.

Differentiable tensors come first, then the other tensors, then plain values: ops/operators.py relies on it.
"""

from typing import NamedTuple

from torch import Tensor


class Scan(NamedTuple):
    """The operands of `selective_scan`."""

    x: Tensor  # (B, L, E)
    dt: Tensor  # (B, L, E), before bias and softplus
    A: Tensor  # (E, N)
    B: Tensor  # (B, L, N)
    C: Tensor  # (B, L, N)
    D: Tensor | None = None  # (E)
    z: Tensor | None = None  # (B, L, E)
    dt_bias: Tensor | None = None  # (E)
    initial_state: Tensor | None = None  # (B, E, N)
    seq_idx: Tensor | None = None  # (B, L)
    dt_softplus: bool = True


class Step(NamedTuple):
    """The operands of `selective_state_update`, which changes the state."""

    state: Tensor  # (B, E, N)
    x: Tensor  # (B, E)
    dt: Tensor  # (B, E)
    A: Tensor  # (E, N), or log(-A)
    B: Tensor  # (B, N)
    C: Tensor  # (B, N)
    D: Tensor | None = None  # (E)
    z: Tensor | None = None  # (B, E)
    dt_bias: Tensor | None = None  # (E)
    dt_softplus: bool = True
    A_is_log: bool = False


class Conv(NamedTuple):
    """The operands of `causal_conv1d`."""

    x: Tensor  # (B, L, E)
    weight: Tensor  # (E, k)
    bias: Tensor | None = None  # (E)
    initial_state: Tensor | None = None  # (B, E, k-1)
    seq_idx: Tensor | None = None  # (B, L)
    silu: bool = True


class ConvStep(NamedTuple):
    """The operands of `causal_conv1d_update`, which changes the state."""

    state: Tensor  # (B, E, k)
    x: Tensor  # (B, E)
    weight: Tensor  # (E, k)
    bias: Tensor | None = None  # (E)
    silu: bool = True


class Ssd(NamedTuple):
    """The operands of `ssd`."""

    x: Tensor  # (B, L, H, P)
    a: Tensor  # (B, L, H), the logarithm of each step's decay; (H), its rate, in dispatch.TAKE_RATES
    w: Tensor  # (B, L, H), the weight of each step's input
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)
    D: Tensor | None = None  # (H)
    initial_state: Tensor | None = None  # (B, H, P, N)
    seq_idx: Tensor | None = None  # (B, L)


class Norm(NamedTuple):
    """The operands of a kernel for `rms_norm`, or with a residual for `add_rms_norm`."""

    x: Tensor  # (..., d)
    residual: Tensor | None  # (..., d)
    weight: Tensor  # (d)
    eps: float


class GatedNorm(NamedTuple):
    """The operands of a kernel for `gated_rms_norm`."""

    x: Tensor  # (..., E)
    z: Tensor  # (..., E)
    weight: Tensor  # (E)
    eps: float
    groups: int
