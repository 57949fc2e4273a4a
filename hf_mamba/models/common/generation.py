"""Generation with a recurrent state: padding on either side, and prompts of any length in bounded memory."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin

from hf_mamba.models.common.outputs import PAST, one_past


class MambaGenerationMixin(GenerationMixin):
    """transformers' `generate` for a model whose past is a state of constant size.

    With `cache_params` (or `cache`) given, `generate` continues that state: the ids are the new tokens only. The state
    after `generate` covers everything but the last token that it returned.

    On a GPU, `cache_implementation="static"` makes transformers compile the decoding step and capture it as one CUDA
    graph per batch size: a step is one graph, its states have fixed addresses, nothing depends on the position.
    """

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; the carried state may be given by either of its names."""
        if (past := one_past(kwargs.pop("cache_params", None), kwargs.pop("cache", None), kwargs)) is not None:
            kwargs[PAST] = past
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        inputs = prepare(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        inputs.pop("position_ids", None)  # generation does not pack, and its ids start at 0 again with a carried state
        decodes = inputs.get("use_cache") and not kwargs.get("is_first_iteration", False)
        if decodes and not inputs.get("output_attentions"):  # which are laid out by the whole mask
            inputs["attention_mask"] = None  # one real token a row
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **ignored: Any) -> Tensor | None:
        """The mask (B, L) as it is: attention makes its own of it, and a static cache asks for none in advance."""
        return attention_mask

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> bool:
        """Make the cache as transformers does, which named it by the class before 5.24: as ours if it says "mamba"."""
        theirs = PAST if PAST == "cache" or "mamba" in type(self).__name__.lower() else "past_key_values"
        if PAST in model_kwargs:
            model_kwargs[theirs] = model_kwargs.pop(PAST)
        made = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if theirs in model_kwargs:
            model_kwargs[PAST] = model_kwargs.pop(theirs)
        return made

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Run the prompt, `generation_config.prefill_chunk_size` tokens at a time where that is set.

        Prompts padded on the right are shifted to the right edge first, so that the last column holds the last token
        of every row. transformers' own chunking reads attributes that a Mamba's output does not have.
        """
        embeds = model_kwargs.get("inputs_embeds")
        prompt = input_ids if embeds is None else embeds  # (B, L) or (B, L, d)
        length = prompt.shape[1]
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            mask = mask[:, -length:]
            order = mask.bool().to(torch.int8).argsort(dim=1, stable=True)
            mask, prompt = mask.gather(1, order), prompt[torch.arange(len(prompt), device=order.device)[:, None], order]

        chunk = generation_config.prefill_chunk_size or length
        if chunk < length and model_kwargs.get(PAST) is None:
            raise ValueError("prefill_chunk_size needs a state to carry from chunk to chunk: leave use_cache on.")
        outputs = None
        for start in range(0, length, max(chunk, 1)):
            part = prompt[:, start : start + chunk]
            kwargs = model_kwargs | {"attention_mask": None if mask is None else mask[:, start : start + chunk]}
            if embeds is None:
                ids = part
            else:
                ids, kwargs["inputs_embeds"] = input_ids, part
            inputs = self.prepare_inputs_for_generation(ids, is_first_iteration=is_first_iteration, **kwargs)
            outputs = self(**inputs, return_dict=True)  # type: ignore[operator]
        return outputs
