"""Parameters and FLOPs of a hybrid by formula, without torch; also what is refused of its configuration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hf_mamba.family import Parameter
from hf_mamba.models.common.cost import TokenFlops
from hf_mamba.models.common.table import whole_table
from hf_mamba.models.mamba2.table import UNLIMITED, mixer_rows
from hf_mamba.models.mamba2.table import Geometry as MixerGeometry
from hf_mamba.models.mamba2.table import token_flops as mixer_flops

# transformers' GraniteMoeHybridConfig defaults, for keys that a configuration leaves out; it is dense unless it says so
CONFIG_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "shared_intermediate_size": 1024,
    "attention_bias": False,
    "layer_types": None,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "tie_word_embeddings": False,
    "time_step_limit": UNLIMITED,
}
# a layer's kind, as every reader spells it -> as transformers spells it since 5.13, and back
CACHE_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}
KINDS = {kind: kind for kind in CACHE_TYPES} | {new: kind for kind, new in CACHE_TYPES.items()}
_PERIOD, _OFFSET = 8, 4  # Jamba's share of attention (Lieber et al. 2024, section 3.1), in the middle of each eight


def default_layers(count: int) -> list[str]:
    """One attention layer in eight, and at least one."""
    kinds = ["attention" if i % _PERIOD == _OFFSET else "mamba" for i in range(count)]
    return kinds if "attention" in kinds else [*kinds[:-1], "attention"]


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide a hybrid's parameters, activations and cost; named as in its configuration."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    shared_intermediate_size: int
    attention_bias: bool
    layer_types: tuple[str, ...]  # "mamba" or "attention"
    mamba_n_heads: int
    mamba_n_groups: int
    mamba_d_state: int
    mamba_d_head: int
    mamba_d_conv: int
    mamba_conv_bias: bool
    mamba_proj_bias: bool
    tie_word_embeddings: bool
    limited: bool  # Δ is clamped

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read a configuration: a mapping of GraniteMoeHybridConfig fields or an object with those attributes.

        Raises:
            ValueError: naming the field, for what this model is not, and for sizes that do not agree.
        """
        known = config if isinstance(config, Mapping) else vars(config)
        value = {key: known.get(key, default) for key, default in CONFIG_DEFAULTS.items()}
        for name, default in CONFIG_DEFAULTS.items():
            if type(default) is int and type(value[name]) is int and value[name] < 1:
                raise ValueError(f"{name} is {value[name]}; it must be at least 1.")
        if value["num_key_value_heads"] is None:
            value["num_key_value_heads"] = value["num_attention_heads"]
        value["layer_types"] = _layers(value["layer_types"], value["num_hidden_layers"])
        _check_attention(value, known)
        _check_kind(known)
        state_space = _state_space(value)
        value |= {"mamba_n_heads": state_space.num_heads, "mamba_d_head": state_space.head_dim}
        del value["time_step_limit"], value["mamba_expand"]
        return cls(**value, limited=state_space.limited)

    @property
    def head_dim(self) -> int:
        """P of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_width(self) -> int:
        """Columns of the keys, and of the values."""
        return self.num_key_value_heads * self.head_dim

    @functools.cached_property
    def mamba(self) -> MixerGeometry:
        """The sizes of its Mamba-2 mixers."""
        return MixerGeometry(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_heads=self.mamba_n_heads,
            head_dim=self.mamba_d_head,
            state_size=self.mamba_d_state,
            n_groups=self.mamba_n_groups,
            num_hidden_layers=self.num_hidden_layers,
            conv_kernel=self.mamba_d_conv,
            use_bias=self.mamba_proj_bias,
            use_conv_bias=self.mamba_conv_bias,
            tie_word_embeddings=self.tie_word_embeddings,
            limited=self.limited,
        )


def _layers(written: Any, count: int) -> tuple[str, ...]:
    """Each layer's kind, "mamba" or "attention"."""
    if written is None:
        return tuple(default_layers(count))
    unknown = sorted({str(kind) for kind in written if kind not in KINDS})
    if unknown:
        raise ValueError(
            f"layer_types has {', '.join(map(repr, unknown))}: a layer is 'mamba' or 'attention', "
            "which transformers also calls 'linear_attention' and 'full_attention'."
        )
    if len(written) != count:
        raise ValueError(
            f"layer_types names {len(written)} layers, and num_hidden_layers is {count}: write one kind for each layer."
        )
    kinds = tuple(KINDS[kind] for kind in written)
    if "attention" not in kinds:
        raise ValueError(
            "layer_types has no 'attention': transformers' own class cannot generate without an attention layer. "
            "Make one of them 'attention', or take model_type 'mamba2' for a model without attention."
        )
    return kinds


def _check_attention(value: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    width, heads, shared = value["hidden_size"], value["num_attention_heads"], value["num_key_value_heads"]
    if width % heads:
        raise ValueError(f"num_attention_heads is {heads}, which does not divide hidden_size {width}: write a divisor.")
    if heads % shared:
        raise ValueError(
            f"num_key_value_heads is {shared}, and {heads} attention heads cannot share them evenly: write a divisor."
        )
    if known.get("head_dim") not in (None, width // heads):
        raise ValueError(
            f"head_dim is {known['head_dim']}, but it must be hidden_size / num_attention_heads, {width // heads}: "
            "vLLM and llama.cpp read no other. Remove it, or change num_attention_heads."
        )


def _check_kind(known: Mapping[str, Any]) -> None:
    """Refuse what a dense hybrid without positions is not."""
    if known.get("num_local_experts"):
        raise ValueError(
            f"num_local_experts is {known['num_local_experts']}: experts are not supported. Write 0 for a dense model, "
            "whose MLP has shared_intermediate_size."
        )
    if known.get("position_embedding_type") not in (None, "nope"):
        raise ValueError(
            f"position_embedding_type is {known['position_embedding_type']!r}: this model has no position embeddings, "
            "and llama.cpp reads none in a hybrid. Write null."
        )
    if known.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {known['hidden_act']!r}: this format's readers take silu. Write 'silu'.")
    if known.get("attention_dropout"):
        raise ValueError(f"attention_dropout is {known['attention_dropout']}: no dropout is supported. Write 0.")


def _state_space(value: Mapping[str, Any]) -> MixerGeometry:
    """The mixers' sizes, with both "auto"s computed."""
    width, heads, head_dim = value["mamba_expand"] * value["hidden_size"], value["mamba_n_heads"], value["mamba_d_head"]
    if heads == "auto":
        if not isinstance(head_dim, int) or width % head_dim:
            raise ValueError(
                f"mamba_n_heads is 'auto' and mamba_d_head {head_dim!r}: write a mamba_d_head that divides "
                f"mamba_expand x hidden_size, {width}."
            )
        heads = width // head_dim
    if head_dim == "auto":
        head_dim = width // heads
    if heads * head_dim != width:
        raise ValueError(
            f"mamba_n_heads {heads} x mamba_d_head {head_dim} is {heads * head_dim}, but mamba_expand x hidden_size is "
            f"{width}: they must be equal. Write mamba_d_head 'auto', and heads that divide {width}."
        )
    if heads % value["mamba_n_groups"]:
        raise ValueError(
            f"mamba_n_groups is {value['mamba_n_groups']}, and {heads} heads cannot share B and C in as many groups: "
            "write a divisor."
        )
    return MixerGeometry.of(mixer_fields({**value, "mamba_n_heads": heads, "mamba_d_head": head_dim}))


# GraniteMoeHybridConfig's field -> Mamba2Config's
_MIXER = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "mamba_n_heads": "num_heads",
    "mamba_d_head": "head_dim",
    "mamba_d_state": "state_size",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_proj_bias": "use_bias",
    "mamba_conv_bias": "use_conv_bias",
    "time_step_limit": "time_step_limit",
}


def mixer_fields(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Mamba2Config whose mixer is the hybrid's."""
    return {theirs: value[ours] for ours, theirs in _MIXER.items()}


@lru_cache(maxsize=32)
def table(g: Geometry) -> tuple[Parameter, ...]:
    """Every parameter in the order of `named_parameters()`."""
    return whole_table(g, lambda layer: _block(g, layer), "model.embed_tokens", "model.norm")


def _block(g: Geometry, layer: int) -> list[Parameter]:
    """The parameters of one block. Matrices decay; norms, biases and the state space's own parameters do not."""
    d, F = g.hidden_size, g.shared_intermediate_size

    def row(name: str, shape: tuple[int, ...], component: str, matrices: tuple[int, ...] = ()) -> Parameter:
        decays = bool(matrices)
        return Parameter(f"model.layers.{layer}.{name}", shape, component, layer, decays, matrices=matrices)

    rows = [
        row("input_layernorm.weight", (d,), "input_layernorm"),
        row("post_attention_layernorm.weight", (d,), "post_attention_layernorm"),
        row("shared_mlp.input_linear.weight", (2 * F, d), "input_linear", (F, F)),
        row("shared_mlp.output_linear.weight", (d, F), "output_linear", (d,)),
    ]
    if g.layer_types[layer] == "mamba":
        rows += mixer_rows(g.mamba, f"model.layers.{layer}.mamba.", layer)
    else:
        for name, out in (("q_proj", d), ("k_proj", g.key_width), ("v_proj", g.key_width), ("o_proj", d)):
            rows.append(row(f"self_attn.{name}.weight", (out, d), name, (out,)))
            if g.attention_bias:
                rows.append(row(f"self_attn.{name}.bias", (out,), name))
    return rows


@dataclass(frozen=True)
class HybridFlops(TokenFlops):
    """The forward operations of one token, by kind."""

    mamba: int  # all of the Mamba-2 mixers
    projections: int  # q, k, v and o
    attention: int  # q k and the weighted sum of v, over the half of the row that a token sees on average
    mlp: int
    head: int  # d·V
    closing: int  # the part of mlp that closes a block

    @property
    def forward(self) -> int:
        return self.mamba + self.projections + self.attention + self.mlp + self.head

    @property
    def recomputed(self) -> int:
        """Neither the head, nor output_linear: checkpointing stops at the last tensor that the backward needs."""
        return self.forward - self.head - self.closing


def token_flops(g: Geometry, seq_len: int = 2048) -> HybridFlops:
    """Operations of one token in rows of `seq_len`, each of which is one document: attention is counted whole."""
    length = seq_len or 2048
    d, F, layers = g.hidden_size, g.shared_intermediate_size, g.num_hidden_layers
    attention = g.layer_types.count("attention")
    of_all = mixer_flops(g.mamba, length)
    return HybridFlops(
        mamba=(of_all.forward - of_all.head) // layers * (layers - attention),
        projections=attention * 2 * d * (2 * d + 2 * g.key_width),
        attention=attention * 2 * d * (length + 1),
        mlp=layers * (6 * d * F + 4 * F),
        head=2 * d * g.vocab_size,
        closing=layers * 2 * d * F,
    )
