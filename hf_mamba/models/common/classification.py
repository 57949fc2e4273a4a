"""Classification of whole sequences over any family's backbone, from each row's last real token."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_mamba.models.common.backbone import OverBackbone


class SequenceClassifier(OverBackbone):
    """A backbone with a linear layer over the last real token of each row, which has seen all the others.

    transformers has no such class for a Mamba; the tensors are its language model's and `score.weight`, as in its
    classifiers for other models. It starts from any checkpoint of the language model, whose head it leaves out.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | SequenceClassifierOutput:
        """Class logits (B, num_labels) in fp32, and the loss where labels are given.

        Args:
            attention_mask: (B, L); 0 is padding, on either side or between. Without it, trailing `pad_token_id`s of
                `input_ids` are padding, and without these the last token counts.
            labels: (B,) class numbers, (B,) numbers for a regression (num_labels is 1), (B, num_labels) for several
                labels at once; `config.problem_type` says which, or transformers finds it out.

        Other arguments as in `Backbone.forward`; a row holds one sequence, so nothing may be packed.

        Raises:
            ValueError: packed rows, or a row that is padding alone.
        """
        packed = [name for name in ("seq_idx", "cu_seq_lens_q") if kwargs.get(name) is not None]
        if packed:
            raise ValueError(f"{packed[0]} packs several sequences in a row, and one class would be read of it: pad.")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        items = kwargs.pop("num_items_in_batch", None)
        body = self._body(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states, return_dict=True, for_head=True,
            **({"use_cache": False} | kwargs),
        )  # fmt: skip
        hidden_states = body.last_hidden_state  # (B, L, d)
        last = self._last_tokens(hidden_states.shape[1], input_ids, attention_mask)
        rows = torch.arange(len(hidden_states), device=hidden_states.device)
        pooled = hidden_states[rows, last].to(self.score.weight.dtype)
        logits = self.score(pooled).to(torch.promote_types(self.score.weight.dtype, torch.float32))
        loss = None
        if labels is not None:
            # every row is one item
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            loss = loss if items is None else loss * len(logits) / items
        recorded = {"hidden_states": body.hidden_states, "attentions": body.attentions}
        output = SequenceClassifierOutput(loss=loss, logits=logits, **recorded)
        return output if return_dict else output.to_tuple()

    def _last_tokens(self, length: int, input_ids: Tensor | None, attention_mask: Tensor | None) -> Any:
        """(B,) the column of each row's last real token; -1 for all where nothing says which are padding."""
        if attention_mask is not None:
            real = attention_mask[:, -length:].bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        else:
            return -1
        columns = torch.arange(length, device=real.device)
        last = torch.where(real, columns, -1).amax(1)
        if not torch.compiler.is_compiling() and bool((last < 0).any()):
            raise ValueError(f"row {int(last.argmin())} is padding alone: a class needs a token to be read from.")
        return last
