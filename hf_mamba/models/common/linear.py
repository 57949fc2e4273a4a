"""Layers that draw their own weights, once, and the head that never materialises its logits in training."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import initialization as init

from hf_mamba import ops

_drawn_later: ContextVar[bool] = ContextVar("drawn_later", default=False)


@contextmanager
def drawn_later() -> Iterator[None]:
    """Layers built inside draw nothing: the model around them has `reset_parameters` called once all is built.

    A draw in the constructor would be lost where weights are loaded, or partitioned by DeepSpeed's `zero.Init`, but
    would still cost its time and move the random state.
    """
    token = _drawn_later.set(True)
    try:
        yield
    finally:
        _drawn_later.reset(token)


class Quantisable(nn.Module):
    """A module whose projections become nn.Linear, which computes the same, when a quantiser announces itself.

    Several quantisers swap exact types only, and would pass over this package's Linear. torch.ao (`quantize_dynamic`)
    gives every module its `qconfig`, parents first; transformers' quantisers begin with the model's `is_quantized`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("qconfig", "is_quantized"):
            for module in self.modules():
                if isinstance(module, Linear):
                    module.__class__ = nn.Linear  # type: ignore[assignment]
        super().__setattr__(name, value)


class SelfDrawn(Quantisable):
    """A module whose `draw` gives its own parameters, not those of modules inside, their initial values.

    A constructor ends with `reset_parameters()`. `draw` uses transformers' `init`, which passes over tensors that came
    from a checkpoint.
    """

    def draw(self) -> None:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw, unless the model around it does so later."""
        if not _drawn_later.get():
            self.draw()


def draw_linear(linear: nn.Linear, branches: int = 1) -> None:
    """Draw a weight (out, in) from U(±1/√(in · branches)), torch's default where there is one branch; zero the bias."""
    bound = linear.in_features**-0.5 / math.sqrt(branches)
    init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        init.zeros_(linear.bias)


class Linear(SelfDrawn, nn.Linear):
    """nn.Linear that draws itself (see `draw_linear`).

    Args:
        branches: how many residual branches end in such a layer; it is divided by √branches, where it closes one.
    """

    branches = 1

    def __init__(self, in_features: int, out_features: int, bias: bool = True, branches: int = 1):
        with drawn_later():
            super().__init__(in_features, out_features, bias)
        self.branches = branches
        self.reset_parameters()

    def draw(self) -> None:
        draw_linear(self, self.branches)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d) -> (..., V)."""
        return ops.linear(input, self.weight, self.bias)


class LMHead(Linear):
    """The output projection (V, d). Called with labels it returns the loss: its weight is read in its forward only."""

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        num_items: Tensor | int | None = None,
        z_loss: float = 0.0,
        token_losses: bool = False,
    ) -> Any:
        """Logits (..., V) in the weight's dtype, or with labels (...) the mean cross-entropy, a scalar in fp32.

        Args:
            hidden: (..., d). labels: (...), aligned with hidden (already shifted); -100 does not count.
            num_items: divide the summed loss by this instead of by the labels that count.
            z_loss: weight of logsumexp² of each label's logits in the loss.
            token_losses: return each label's cross-entropy, too, (...), without a gradient.
        """
        if labels is None:
            return super().forward(hidden.to(self.weight.dtype))
        flat = hidden.reshape(-1, hidden.shape[-1])
        options: dict[str, Any] = {"num_items": num_items, "z_loss": z_loss, "row_losses": token_losses}
        loss = ops.linear_cross_entropy(flat, self.weight, labels.reshape(-1), self.bias, **options)
        return (loss[0], loss[1].view(labels.shape)) if token_losses else loss
