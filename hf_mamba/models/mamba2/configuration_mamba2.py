"""Mamba2Config: transformers' fields, names and `model_type`, with the paper's initialisation as the default."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as StockMamba2Config

from hf_mamba.models.mamba2.original import ORIGINAL_KEYS
from hf_mamba.models.mamba2.table import UNLIMITED, Geometry

_POSITIVE = ("vocab_size", "state_size", "num_hidden_layers", "conv_kernel", "chunk_size")


@strict
class Mamba2Config(StockMamba2Config):
    """A Mamba-2 language model; every field of transformers' Mamba2Config, with the same meaning.

    Four differences, all of which leave saved files readable by stock transformers:

    - `num_heads` may be "auto", hidden_size · expand / head_dim.
    - `initializer_range` defaults to 0.02 and applies to the embeddings only; the linear layers use torch's default.
    - `rescale_prenorm_residual` defaults to True and acts once, at fresh initialisation. Files always say False,
      because stock transformers would divide `out_proj` again at every load.
    - `time_step_limit` holds in decoding, too; where it is no limit, files leave it out: JSON has no infinity.

    `chunk_size` is kept for other programs: here the operation chooses its chunks, which do not change the result.

    Raises:
        ValueError: for sizes that are not positive or do not agree, an unknown activation, or the original
            state-spaces keys.
    """

    num_heads: int | str = 128  # type: ignore[assignment]
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True

    def __post_init__(self, **kwargs: Any):
        original = [f"{key} (here: {ours})" for key, ours in ORIGINAL_KEYS.items() if key in kwargs]
        if original:
            raise ValueError(
                f"this is an original state-spaces configuration: {', '.join(original)}. "
                "Load its folder with Mamba2ForCausalLM.from_pretrained, or write transformers' field names."
            )
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; write one of {', '.join(sorted(ACT2FN))}.")
        self.num_heads = Geometry.of(self).num_heads
        self.time_step_limit = _limit(self.time_step_limit)
        super().__post_init__(**kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: everything that other programs read, and nothing that makes them rescale."""
        fields = super().to_diff_dict() | {
            "rescale_prenorm_residual": False,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        if self.time_step_limit == UNLIMITED:
            fields.pop("time_step_limit", None)
        return fields


def _limit(value: Any) -> tuple[float, float]:
    """Bounds of the step, Δ.

    Raises:
        ValueError: where they are not two rising numbers from 0 on.
    """
    if len(value) != 2 or not 0 <= value[0] < value[1]:
        raise ValueError(f"time_step_limit is {value!r}; write the least and the largest step, such as (0.001, 0.1).")
    return float(value[0]), float(value[1])
