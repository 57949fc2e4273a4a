"""The output and the loss of a causal language model."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.models.mamba.modeling_mamba import MambaCausalLMOutput


@dataclass
class MambaLMOutput(MambaCausalLMOutput):
    """transformers' output, and the loss of each prediction where it was asked for."""

    token_losses: Tensor | None = None


def _loss_of_logits(logits: Tensor, labels: Tensor, num_items: Tensor | int | None, z_loss: float) -> Tensor:
    labels = labels.to(logits.device)
    counted = labels != -100
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(-1).square() * counted).sum()
    return loss / (counted.sum() if num_items is None else num_items)
