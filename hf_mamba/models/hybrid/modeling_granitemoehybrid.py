"""The hybrid language model, to be read top to bottom: attention, MLP, block, backbone, language model.

Each layer is a mixer, Mamba-2 (models/mamba2) or attention, and an MLP, each with a norm before it and added to the
residual. Symbols:

    B batch · L length · d `hidden_size` · F `shared_intermediate_size`
    H `num_attention_heads` · K `num_key_value_heads`, each shared by H/K heads · P = d/H

Attention has no positions: the Mamba-2 layers know the order. Field names, tensor names and call signatures are those
of transformers' GraniteMoeHybrid, dense; a checkpoint serves both. Its four multipliers are kept: of the embeddings, of
q k, of each update of the residual, and of the logits, by which they are divided.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils.output_capturing import capture_outputs

from hf_mamba.models.common.attention import attend, attend_cached, attend_eagerly
from hf_mamba.models.common.backbone import Backbone, StatePreTrainedModel
from hf_mamba.models.common.blocks import Block, Mixer, RMSNorm, layout_of
from hf_mamba.models.common.causal_lm import CausalLM
from hf_mamba.models.common.classification import SequenceClassifier
from hf_mamba.models.common.layout import Layout
from hf_mamba.models.common.linear import Linear
from hf_mamba.models.common.outputs import StateOutput
from hf_mamba.models.hybrid.configuration_granitemoehybrid import GraniteMoeHybridConfig
from hf_mamba.models.hybrid.table import CACHE_TYPES, Geometry
from hf_mamba.models.mamba2.modeling_mamba2 import Mamba2Mixer
from hf_mamba.private.transformers import attention_of


def _branches(config: GraniteMoeHybridConfig) -> int:
    """Residual branches of the model: a mixer and an MLP in each layer."""
    return 2 * config.num_hidden_layers if config.rescale_prenorm_residual else 1


class HybridAttention(Mixer):
    """Causal attention whose keys and values are shared by groups of heads (Ainslie et al. 2023)."""

    def __init__(self, config: GraniteMoeHybridConfig, layer_idx: int):
        super().__init__()
        g = Geometry.of(config)
        self.config, self.layer_idx, self.head_dim = config, layer_idx, g.head_dim
        self.scale = float(config.attention_multiplier or g.head_dim**-0.5)
        self.q_proj = Linear(g.hidden_size, g.hidden_size, bias=g.attention_bias)
        self.k_proj = Linear(g.hidden_size, g.key_width, bias=g.attention_bias)
        self.v_proj = Linear(g.hidden_size, g.key_width, bias=g.attention_bias)
        self.o_proj = Linear(g.hidden_size, g.hidden_size, bias=g.attention_bias, branches=_branches(config))

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        layout: Layout | None = None,
        output_attentions: bool = False,
        **ignored: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, d) -> (B, L, d), and where they are asked for or attention is eager, the weights (B, H, L, S)."""
        if layout is None:
            layout = layout_of(hidden_states, cache_params, attention_mask)
            compact = layout.compact(hidden_states)
            mixed, weights = self(compact, cache_params, attention_mask, layout, output_attentions)
            return layout.restore(mixed), weights
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in projections)
        weights = None
        if output_attentions or attention_of(self.config) == "eager":
            whole = (attention_mask, cache_params, self.layer_idx)
            mixed, weights = attend_eagerly(query, key, value, self.scale, layout, *whole)
        elif cache_params is None:
            mixed = attend(query, key, value, self.scale, layout)
        else:
            mixed = attend_cached(query, key, value, self.scale, layout, cache_params, self.layer_idx)
        return self.o_proj(mixed.flatten(2)), weights


class HybridMLP(nn.Module):
    """SwiGLU (Shazeer 2020): the gate and the input are one projection."""

    def __init__(self, config: GraniteMoeHybridConfig):
        super().__init__()
        d, width = config.hidden_size, config.shared_intermediate_size
        self.input_linear = Linear(d, 2 * width, bias=False)  # -> [gate; up]
        self.output_linear = Linear(width, d, bias=False, branches=_branches(config))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, d) -> (B, L, d)."""
        gate, up = self.input_linear(hidden_states).chunk(2, -1)  # (B, L, F) each
        return self.output_linear(F.silu(gate) * up)


class GraniteMoeHybridDecoderLayer(Block):
    """A mixer and an MLP, each behind a norm."""

    def __init__(self, config: GraniteMoeHybridConfig, layer_idx: int):
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.residual_in_fp32 = config.residual_in_fp32
        self.residual_multiplier = float(config.residual_multiplier or 1.0)
        self.input_layernorm = RMSNorm(d, eps)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.shared_mlp = HybridMLP(config)
        if config.layer_types[layer_idx] == CACHE_TYPES["mamba"]:  # type: ignore[index]
            self.mamba = Mamba2Mixer(config.mixer_config(), layer_idx, branches=_branches(config))
        else:
            self.self_attn = HybridAttention(config, layer_idx)

    @property
    def mixer(self) -> nn.Module:
        return self.mamba if hasattr(self, "mamba") else self.self_attn

    def added(self, residual: Tensor, cache_params: Cache | None, layout: Layout, **options: Any) -> Tensor:
        update = self.mixer(layout.compact(self.input_layernorm(residual)), cache_params, layout=layout, **options)
        update = update[0] if isinstance(update, tuple) else update  # attention's weights are recorded, as in stock
        residual = torch.add(residual, layout.restore(update), alpha=self.residual_multiplier)
        update = self.shared_mlp(self.post_attention_layernorm(residual))
        return torch.add(residual, update, alpha=self.residual_multiplier)


class GraniteMoeHybridPreTrainedModel(StatePreTrainedModel):
    """What transformers needs to know of a hybrid."""

    config: GraniteMoeHybridConfig
    config_class: Any = GraniteMoeHybridConfig
    base_model_prefix = "model"
    embeddings_name, norm_name = "embed_tokens", "norm"
    _no_split_modules = ["GraniteMoeHybridDecoderLayer"]  # noqa: RUF012
    # whichever it is asked for by, PyTorch's kernels compute attention; "eager" is the definition
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GraniteMoeHybridDecoderLayer,
        "attentions": HybridAttention,
    }
    _keep_in_fp32_modules_strict = [r"mamba\.A_log", r"mamba\.D", r"mamba\.dt_bias"]  # noqa: RUF012


class GraniteMoeHybridModel(GraniteMoeHybridPreTrainedModel, Backbone):
    """Embeddings, blocks and the final norm; `forward` is `Backbone.forward`.

    What it returns of its layers is recorded as transformers does: `output_attentions`, for which a call's attention is
    eager, gives the weights (B, H, L, S) of the attention layers alone; `output_hidden_states` may be indices.
    """

    keeps_width = False
    attends = True

    def run_blocks(self, hidden_states: Tensor, **options: Any) -> StateOutput:
        return self._recorded(hidden_states, **options, return_dict=True)

    @capture_outputs
    def _recorded(self, hidden_states: Tensor, **options: Any) -> StateOutput:
        return super().run_blocks(hidden_states, **options | {"output_hidden_states": False})

    def make_block(self, config: GraniteMoeHybridConfig, layer_idx: int) -> GraniteMoeHybridDecoderLayer:
        return GraniteMoeHybridDecoderLayer(config, layer_idx)

    def scale_embeddings(self, embeddings: Tensor) -> Tensor:
        multiplier: Any = self.config.embedding_multiplier
        return embeddings if multiplier == 1 else embeddings * multiplier


class GraniteMoeHybridForCausalLM(GraniteMoeHybridPreTrainedModel, CausalLM, GenerationMixin):
    """A hybrid with a language-model head; `forward`, the loss and generation are `CausalLM`'s."""

    backbone_class = GraniteMoeHybridModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012 (the configuration shards the embeddings)

    def scale_for_head(self, hidden_states: Tensor) -> Tensor:
        divisor: Any = self.config.logits_scaling
        return hidden_states if divisor == 1 else hidden_states / divisor


class GraniteMoeHybridForSequenceClassification(GraniteMoeHybridPreTrainedModel, SequenceClassifier):
    """A hybrid with a class for each sequence; `forward` and the loss are `SequenceClassifier`'s."""

    backbone_class = GraniteMoeHybridModel
