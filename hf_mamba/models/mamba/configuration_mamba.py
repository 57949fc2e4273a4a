"""MambaConfig: transformers' fields, names and `model_type`, with the paper's initialisation as the default."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.models.mamba.configuration_mamba import MambaConfig as StockMambaConfig

# Keys of the original state-spaces configuration. transformers would keep them as unused attributes and build a
# 768 × 32 model instead.
ORIGINAL_KEYS = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "ssm_cfg": "state_size, conv_kernel, expand, time_step_rank",
    "d_intermediate": "nothing: an MLP between the mixers is not a Mamba-1",
    "rms_norm": "nothing: the norm is always RMSNorm",
    "tie_embeddings": "tie_word_embeddings",
    "pad_vocab_size_multiple": "a vocab_size that is rounded up already",
}
_POSITIVE = ("vocab_size", "hidden_size", "state_size", "num_hidden_layers", "conv_kernel", "expand")


@strict
class MambaConfig(StockMambaConfig):
    """A Mamba-1 language model; every field of transformers' MambaConfig, with the same meaning.

    Three differences, all of which leave saved files readable by stock transformers:

    - `intermediate_size` may be given, and wins over `expand` (as Falcon-Mamba's files need).
    - `initializer_range` defaults to 0.02 and applies to the embeddings only; the linear layers use torch's default.
    - `rescale_prenorm_residual` defaults to True and acts once, at fresh initialisation. Files always say False,
      because stock transformers would divide `out_proj` again at every load.

    Raises:
        ValueError: for a size that is not positive, an unknown activation, or the original state-spaces keys.
    """

    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True

    def __post_init__(self, **kwargs: Any):
        original = [f"{key} (here: {ours})" for key, ours in ORIGINAL_KEYS.items() if key in kwargs]
        if original:
            raise ValueError(
                f"this is an original state-spaces configuration: {', '.join(original)}. "
                "Load its folder with MambaForCausalLM.from_pretrained, or write transformers' field names."
            )
        wanted = kwargs.pop("intermediate_size", None)
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; write one of {', '.join(sorted(ACT2FN))}.")
        super().__post_init__(**kwargs)
        if wanted is not None:
            if wanted <= 0:
                raise ValueError(f"intermediate_size is {wanted}; it must be at least 1.")
            self.intermediate_size = wanted
        if not isinstance(self.time_step_rank, int) or self.time_step_rank <= 0:
            raise ValueError(f"time_step_rank is {self.time_step_rank!r}; write a positive integer or 'auto'.")

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: everything that other programs read, and nothing that makes them rescale."""
        return super().to_diff_dict() | {
            "rescale_prenorm_residual": False,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
