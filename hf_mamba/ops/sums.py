"""Running sums that any device may compute in a fixed order."""

import torch
from torch import Tensor


def running_sum(t: Tensor) -> Tensor:
    """Sums along the last dimension, up to and with each place.

    On a GPU torch's `cumsum` of floats refuses to run under `torch.use_deterministic_algorithms(True)`.
    """
    return by_doubling(t) if t.is_cuda and torch.are_deterministic_algorithms_enabled() else t.cumsum(-1)


def by_doubling(t: Tensor) -> Tensor:
    """The same in log2(steps) additions of whole tensors, which have one order (Hillis & Steele 1986)."""
    width = 1
    while width < t.shape[-1]:
        t = torch.cat([t[..., :width], t[..., width:] + t[..., :-width]], -1)
        width *= 2
    return t
