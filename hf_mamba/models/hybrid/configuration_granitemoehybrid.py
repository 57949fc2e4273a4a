"""GraniteMoeHybridConfig: transformers' fields, names and `model_type`, for dense models without positions."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.granitemoehybrid.configuration_granitemoehybrid import (
    GraniteMoeHybridConfig as StockGraniteMoeHybridConfig,
)

from hf_mamba.models.hybrid.table import CACHE_TYPES, KINDS, Geometry, mixer_fields
from hf_mamba.models.mamba2.configuration_mamba2 import Mamba2Config
from hf_mamba.models.mamba2.table import UNLIMITED
from hf_mamba.private.transformers import accept_layer_types

accept_layer_types(tuple(CACHE_TYPES))  # which files spell so


@strict
class GraniteMoeHybridConfig(StockGraniteMoeHybridConfig):
    """A hybrid language model; the fields of transformers' GraniteMoeHybridConfig, with the same meaning.

    What differs leaves saved files readable by stock transformers, vLLM and llama.cpp:

    - It is dense: `num_local_experts` is 0, and `shared_intermediate_size` is the MLP's width. Without
      `position_embedding_type`, `hidden_act` silu. Anything else is refused.
    - `attention_multiplier`, which scales q k, is 1/√head_dim where nothing else is said; transformers' default is 1.
    - `layer_types` says "mamba" or "attention" for each layer; without it, one layer in eight is attention. Files spell
      it so, because only transformers knows its newer names, which the attribute has.
    - `mamba_n_heads` may be "auto" where `mamba_d_head` is a number.
    - `initializer_range` applies to the embeddings only; all else is drawn as in Mamba-2, and what closes a residual
      branch is divided by √(2 · layers), once, at fresh initialisation (`rescale_prenorm_residual`).
    - `pad_token_id` marks padding alone: its embedding trains like any other. Stock's gets no gradient, so that a
      text's end which doubles as padding would never be learnt as an input.
    - `residual_in_fp32` keeps the residual stream in fp32.
    - `time_step_limit` holds in decoding, too; where it is no limit, files leave it out: JSON has no infinity.

    A file that lacks one of these fields means what transformers reads in it.

    Raises:
        ValueError: naming the field, for what this model is not, and for sizes that do not agree.
    """

    attribute_map: ClassVar[dict[str, str]] = {
        **StockGraniteMoeHybridConfig.attribute_map,
        "layer_norm_epsilon": "rms_norm_eps",
    }

    mamba_n_heads: int | str | None = 128  # type: ignore[assignment]
    attention_multiplier: int | float | None = None  # type: ignore[assignment]
    num_local_experts: int | None = 0
    num_experts_per_tok: int | None = 0
    residual_in_fp32: bool = True
    rescale_prenorm_residual: bool = True

    def __post_init__(self, **kwargs: Any):
        g = Geometry.of(vars(self) | kwargs)
        self.num_key_value_heads = g.num_key_value_heads
        self.mamba_n_heads, self.mamba_d_head = g.mamba_n_heads, g.mamba_d_head
        self.layer_types = [CACHE_TYPES[kind] for kind in g.layer_types]
        self.num_local_experts = self.num_experts_per_tok = 0  # llama.cpp wants the second to be 0, too
        self.router_aux_loss_coef = 0.0  # trl adds a loss of the experts' balance to any other
        self.intermediate_size = self.shared_intermediate_size  # the MLP's width to llama.cpp
        self.hidden_act = "silu"
        self.position_embedding_type = None
        if self.attention_multiplier is None:
            self.attention_multiplier = g.head_dim**-0.5
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
            if not getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; write a number other than 0, such as 1.0.")
        self.time_step_limit = self.mixer_config().time_step_limit  # type: ignore[assignment]
        kwargs.pop("head_dim", None)  # as checked, what follows from the heads
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, of which a file's missing fields have the defaults."""
        stock: dict[str, Any] = {"attention_multiplier": 1.0, "num_local_experts": 8}
        stock["layer_types"] = ["linear_attention"] * config_dict.get("num_hidden_layers", 32)
        return super().from_dict(stock | config_dict, **kwargs)

    def mixer_config(self) -> Mamba2Config:
        """The configuration of the Mamba-2 mixers."""
        return Mamba2Config(
            **mixer_fields(vars(self)),
            hidden_act="silu",
            layer_norm_epsilon=self.rms_norm_eps,
            rescale_prenorm_residual=self.rescale_prenorm_residual,
        )

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: everything that other programs read, in the words that all of them know."""
        fields = super().to_diff_dict() | {
            "layer_types": [KINDS[kind] for kind in self.layer_types or ()],
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        if self.time_step_limit == UNLIMITED:
            fields.pop("time_step_limit", None)
        return fields
