"""The operands of an operation as one value, for the functions behind ops/public.py."""

from typing import NamedTuple

from torch import Tensor


class Ssd(NamedTuple):
    """The operands of `ssd`, in the order of its registered operator; ops/public.py documents them."""

    x: Tensor  # (B, L, H, P)
    a: Tensor  # (B, L, H), the logarithm of each step's decay
    w: Tensor  # (B, L, H), the weight of each step's input
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)
    D: Tensor | None  # (H)
    initial_state: Tensor | None  # (B, H, P, N)
    seq_idx: Tensor | None  # (B, L)
