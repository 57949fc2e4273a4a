"""The toy's configuration and model. B batch · L length · d `hidden_size` · E the layer's own width."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from hf_mamba.models.common.backbone import Backbone, StatePreTrainedModel
from hf_mamba.models.common.blocks import ResidualBlock, RMSNorm
from hf_mamba.models.common.causal_lm import CausalLM
from hf_mamba.models.common.layout import Layout
from hf_mamba.models.common.linear import Linear
from hf_mamba.models.common.state import read_states, write_states
from toy.formulas import Geometry


@strict
class ToyConfig(PreTrainedConfig):
    """The sizes, and what models/common reads of any family."""

    model_type = "toy"

    vocab_size: int = 320
    hidden_size: int = 32
    num_hidden_layers: int = 3
    tie_word_embeddings: bool = False
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    residual_in_fp32: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    @property
    def layer_types(self) -> list[str]:
        """What transformers' DynamicCache keeps of each layer: a recurrent state."""
        return ["linear_attention"] * self.num_hidden_layers


class ToyMixer(nn.Module):
    """The gated recurrence, one token after another."""

    def __init__(self, config: ToyConfig, layer_idx: int):
        super().__init__()
        d, E = config.hidden_size, Geometry.of(config).width(layer_idx)
        self.layer_idx = layer_idx
        self.forget = Linear(d, E)
        self.candidate = Linear(d, E, bias=False)
        self.back = Linear(E, d, bias=False)

    def forward(self, hidden_states: Tensor, cache_params: Cache | None, layout: Layout) -> Tensor:
        """(B, L, d) -> (B, L, d)."""
        forget = torch.sigmoid(self.forget(hidden_states))  # (B, L, E)
        padding = layout.padding(hidden_states.shape[1])
        if padding is not None:  # holds the state
            forget = forget.masked_fill(padding[..., None], 1.0)
        update = (1 - forget) * self.candidate(hidden_states)
        if layout.seq_idx is not None:  # a document forgets the one before it
            starts = layout.seq_idx.diff(dim=1, prepend=layout.seq_idx[:, :1]) != 0
            forget = forget.masked_fill(starts[..., None], 0.0)

        state = forget.new_zeros(forget.shape[0], forget.shape[2])
        if cache_params is not None and (carried := read_states(cache_params, self.layer_idx)) is not None:
            state = carried[1]
            if layout.restart is not None:
                state = state * layout.restart.logical_not()[:, None]
        states = []
        for f, u in zip(forget.unbind(1), update.unbind(1), strict=True):
            state = f * state + u
            states.append(state)
        if cache_params is not None:
            write_states(cache_params, self.layer_idx, None, state)
        return self.back(torch.stack(states, 1))


class ToyBlock(ResidualBlock):
    def __init__(self, config: ToyConfig, layer_idx: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = ToyMixer(config, layer_idx)


class ToyPreTrainedModel(StatePreTrainedModel):
    config: ToyConfig
    config_class: Any = ToyConfig
    base_model_prefix = "body"
    embeddings_name, layers_name, norm_name, head_name = "tokens", "blocks", "last", "readout"
    _no_split_modules = ["ToyBlock"]  # noqa: RUF012


class ToyModel(ToyPreTrainedModel, Backbone):
    def make_block(self, config: ToyConfig, layer_idx: int) -> ToyBlock:
        return ToyBlock(config, layer_idx)


class ToyForCausalLM(ToyPreTrainedModel, CausalLM):
    backbone_class = ToyModel
    _tied_weights_keys = {"readout.weight": "body.tokens.weight"}  # noqa: RUF012
