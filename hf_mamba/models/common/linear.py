"""Linear layers whose weights are drawn once, and the head that never materialises its logits in training."""

from typing import Any

from torch import Tensor, nn

from hf_mamba import ops


class Linear(nn.Linear):
    """nn.Linear without a draw in the constructor: `_init_weights` draws, once, whichever way the model is built.

    Under DeepSpeed's `zero.Init` the constructor's draw would be lost but would still move the random state.
    `closes_residual` marks the last layer of a residual branch, which is drawn smaller.
    """

    closes_residual = False

    def forward(self, input: Tensor) -> Tensor:
        """(..., d) -> (..., V)."""
        return ops.linear(input, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Nothing: see the class."""


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
