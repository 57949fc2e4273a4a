"""transformers' models: what a model class declares for it, a fresh model as its engine wants it, the Auto classes.

Trainer's names stand in trainer.py, because importing Trainer takes seconds.
"""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, configuration_utils

from hf_mamba.private import Used

_MODEL = "transformers.modeling_utils:PreTrainedModel"
_GENERATION = "transformers.generation.utils:GenerationMixin"
USED = (
    Used(_MODEL, "_from_config", "makes a fresh model, under ZeRO-3 partitioned; AutoModel takes registered ones only"),
    Used("transformers.models.auto.auto_factory:_LazyAutoMapping", "_extra_content", "Auto classes cannot unregister"),
    Used("transformers.models.auto.configuration_auto:_LazyConfigMapping", "_extra_content", "the same"),
    Used(_MODEL, "_init_weights", "every model initialises its layers there", hook=True),
    Used(_MODEL, "_no_split_modules", "blocks that stay on one device, and that FSDP wraps", hook=True),
    Used(_MODEL, "_keep_in_fp32_modules_strict", "parameters that no dtype changes", hook=True),
    Used(_MODEL, "_tied_weights_keys", "the head that is the embedding", hook=True),
    Used(_MODEL, "_supports_sdpa", "names of attention that a hybrid takes", hook=True),
    Used(_MODEL, "_supports_flash_attn", "the same", hook=True),
    Used(_MODEL, "_supports_flex_attn", "the same", hook=True),
    Used(_MODEL, "_can_record_outputs", "where a hybrid's hidden states and attentions come by", hook=True),
    Used(
        "transformers.configuration_utils:PreTrainedConfig", "_attn_implementation", "the attention that was asked for"
    ),
    Used(_MODEL, "_tp_plan", "how a hybrid's head is sharded by tensor parallelism", hook=True),
    Used(_MODEL, "_is_stateful", "generation must not rewind the past", hook=True),
    Used(_GENERATION, "_prefill", "padded prompts and chunks of them", hook=True),
    Used(_GENERATION, "_prepare_cache_for_generation", "the state that a generation starts with", hook=True),
)


def new_model(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model with fresh weights; under ZeRO-3 partitioned from the first tensor on."""
    return model_class._from_config(config, dtype=dtype)


def accept_layer_types(names: tuple[str, ...]) -> None:
    """Have the base configuration know these kinds of layers.

    Trainer reads a checkpoint's config.json as one when it resumes, and 5.17's refuses there what its own classes write
    differently and read.
    """
    fields: Any = {"num_hidden_layers": len(names), "layer_types": list(names)}
    try:
        PreTrainedConfig(**fields)
    except StrictDataclassError:
        configuration_utils.ALLOWED_ATTN_LAYER_TYPES += names  # type: ignore[assignment, operator]


def attention_of(config: Any) -> str | None:
    """The kind of attention that the caller asked for, such as "eager"; None of a configuration without a model."""
    return config._attn_implementation


def forget_registered(mapping: Any, key: Any) -> None:
    """Take back what `register` put into CONFIG_MAPPING (by model_type) or a MODEL_MAPPING (by configuration)."""
    mapping._extra_content.pop(key, None)
