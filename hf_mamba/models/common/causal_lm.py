"""The head and the loss of a causal language model over any family's backbone."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_mamba.models.common.backbone import OverBackbone
from hf_mamba.models.common.generation import MambaGenerationMixin
from hf_mamba.models.common.linear import LMHead, drawn_later
from hf_mamba.models.common.outputs import (
    PAST,
    StateCausalLMOutput,
    UnreadLogits,
    UnreadOutput,
    logits_of,
    one_past,
)
from hf_mamba.private.torch import is_replica, is_transformed


def _loss_of_logits(logits: Tensor, labels: Tensor, num_items: Tensor | int | None, z_loss: float) -> Tensor:
    labels = labels.to(logits.device)
    counted = labels != -100
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(-1).square() * counted).sum()
    return loss / (counted.sum() if num_items is None else num_items)


class CausalLM(OverBackbone, MambaGenerationMixin):
    """A backbone with a language-model head, tied to the embeddings unless the configuration says otherwise."""

    def __init__(self, config: Any):
        super().__init__(config)
        with drawn_later():
            setattr(self, self.head_name, LMHead(config.hidden_size, config.vocab_size, bias=False))
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return getattr(self, self.head_name)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if type(new_embeddings) is nn.Linear:  # from resize_token_embeddings: keep the head that can skip its logits
            new_embeddings.__class__ = LMHead
        setattr(self, self.head_name, new_embeddings)

    def scale_for_head(self, hidden_states: Tensor) -> Tensor:
        """What the head reads of the normed hidden states (B, L, d)."""
        return hidden_states

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; of a state dict that an engine gathered, a tied head is not written a second time."""
        if kwargs.get("state_dict") is not None and self.config.tie_word_embeddings:
            head = f"{self.head_name}.weight"
            kwargs["state_dict"] = {k: v for k, v in kwargs["state_dict"].items() if k != head}
        super().save_pretrained(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        z_loss: float = 0.0,
        return_token_losses: bool = False,
        cache: Cache | None = None,
        **ignored: Any,
    ) -> tuple | StateCausalLMOutput:
        """Next-token logits (B, L, V) in fp32, and the loss where labels are given.

        Args:
            labels: (B, L), shifted inside: position t is scored on labels[t + 1]; -100 does not count. A keyword
                `shift_labels` (B, L) in place of it, or beside it, is scored as it stands; `ignore_index` is a number
                that does not count either. Both as in transformers' loss.
            num_items_in_batch: divide the summed loss by this (gradient accumulation) instead of by the counted labels.
            logits_to_keep: only the last so many positions, or those of an index tensor; 0 keeps all. Labels are of
                the positions that are kept.
            skip_logits: with labels, compute the loss in chunks and leave the logits out (True) or make them whole
                (False). By default a training step's loss is computed in chunks, and its logits when somebody reads
                them from the output: Trainer does not, and saves their memory, which would be the step's largest.
            z_loss: add this times logsumexp(logits)² to the loss of each prediction, so that the logits do not drift
                (PaLM, section 5).
            return_token_losses: the output has `token_losses`, too: the cross-entropy of each position's
                prediction, (B, L) in fp32, 0 where none counts, without a gradient.

        Other arguments as in `Backbone.forward`.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        targets = _targets(labels, ignored.pop("shift_labels", None), ignored.pop("ignore_index", -100))
        if skip_logits and targets is None:
            raise ValueError("skip_logits without labels would compute nothing: give labels, or leave skip_logits out.")
        if targets is None and (return_token_losses or z_loss):
            raise ValueError("return_token_losses and z_loss need labels: give them, or leave both out.")
        outputs = self._body(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=one_past(cache_params, cache, ignored),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
            for_head=True,
            **ignored,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states, head = self.scale_for_head(outputs.last_hidden_state[:, keep]), self.get_output_embeddings()
        if targets is not None and targets.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"labels have shape {tuple(targets.shape)}, but {tuple(hidden_states.shape[:2])} positions have logits"
                " (logits_to_keep chooses them): give one label for each."
            )
        parts: dict[str, Any] = {name: getattr(outputs, name) for name in (PAST, "hidden_states", "attentions")}
        own_loss = self.loss_function is ForCausalLMLoss  # nobody has set another
        # a compiled graph returns tensors, DataParallel gathers them, and torch.func goes through torch's own loss only
        may_wait = self.training and not (torch.compiler.is_compiling() or is_replica(self) or is_transformed())
        wants_chunks = may_wait if skip_logits is None else skip_logits
        # a head that tensor parallelism shards has a product with whole rows alone
        in_chunks = wants_chunks and own_loss and isinstance(head, LMHead) and not self.tp_size
        if targets is not None and in_chunks:
            found = head(hidden_states, targets, num_items_in_batch, z_loss, return_token_losses)
            parts["loss"], parts["token_losses"] = found if return_token_losses else (found, None)
            if skip_logits:
                output = StateCausalLMOutput(**parts)
            else:
                output = UnreadOutput(**parts, unread=UnreadLogits(head, hidden_states))
            return output if return_dict else output.to_tuple()

        logits = logits_of(head, hidden_states)
        if targets is not None:
            if own_loss:
                parts["loss"] = _loss_of_logits(logits, targets, num_items_in_batch, z_loss)
            else:
                options = ignored | {"shift_labels": targets, "num_items_in_batch": num_items_in_batch}
                vocabulary = self.config.vocab_size
                parts["loss"] = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **options)
            if return_token_losses:
                with torch.no_grad():
                    losses = nn.functional.cross_entropy(logits.mT, targets.to(logits.device), reduction="none")
                    parts["token_losses"] = losses
        output = StateCausalLMOutput(logits=None if skip_logits else logits, **parts)
        return output if return_dict else output.to_tuple()


def _targets(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """The token that each position is scored on (B, L), -100 where it is on none; None without labels."""
    if shift_labels is None and labels is None:
        return None
    if shift_labels is None:
        targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # type: ignore[arg-type]
    else:
        targets = shift_labels
    return targets if ignore_index == -100 else targets.masked_fill(targets == ignore_index, -100)
