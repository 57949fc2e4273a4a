"""The Mamba-2 language model, to be read top to bottom: mixer, block, backbone, language model.

"Transformers are SSMs" (Dao & Gu, 2024), section 7. Symbols:

    B batch · L length · d `hidden_size` · H `num_heads` · P `head_dim` · E = H P · N `state_size` · G `n_groups`
    k `conv_kernel` · W = E + 2 G N the convolution's width · Δ the step, `dt` · A, D (H) the state space's own

Field names, tensor names and call signatures are those of transformers' Mamba-2; a checkpoint serves both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin
from transformers import initialization as init

from hf_mamba import ops
from hf_mamba.models.common.backbone import Backbone, StatePreTrainedModel
from hf_mamba.models.common.blocks import (
    CausalConv1d,
    ResidualBlock,
    RMSNorm,
    StateMixer,
    draw_step_bias,
    fp32_parameter,
)
from hf_mamba.models.common.causal_lm import CausalLM
from hf_mamba.models.common.classification import SequenceClassifier
from hf_mamba.models.common.layout import Layout
from hf_mamba.models.common.linear import Linear
from hf_mamba.models.common.state import last_inputs
from hf_mamba.models.mamba2.configuration_mamba2 import Mamba2Config
from hf_mamba.models.mamba2.table import UNLIMITED, Geometry

_RATES = (1.0, 16.0)  # -A is drawn uniformly between them


class GatedRMSNorm(RMSNorm):
    """RMSNorm of x silu(z) over each of `groups` equal parts, with fp32 statistics."""

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__(width, eps)
        self.groups = groups

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """(B, L, E), and its gate -> (B, L, E)."""
        return ops.gated_rms_norm(hidden_states, gate, self.weight, self.variance_epsilon, self.groups)


class Mamba2Mixer(StateMixer):
    """The state space dual with its gate and norm (paper, figure 6): in_proj, conv, ssd, norm, out_proj.

    Every part is drawn as in the original (mamba_ssm, mamba2.py), also in a module of one's own.

    Args:
        branches: the residual branches of the model, by whose root out_proj is divided; one a layer by default.
    """

    def __init__(self, config: Mamba2Config, layer_idx: int, branches: int | None = None):
        super().__init__()
        g = Geometry.of(config)
        self.layer_idx = layer_idx
        self.conv_kernel = g.conv_kernel
        self.heads, self.groups = (g.num_heads, g.head_dim), (g.n_groups, g.state_size)
        self.splits = [g.intermediate_size, g.conv_width, g.num_heads]
        self.conv_splits = [g.intermediate_size, *[g.n_groups * g.state_size] * 2]
        self.limit = tuple(config.time_step_limit)
        self.step_range = (config.time_step_min, config.time_step_max, config.time_step_floor)
        self.dt_bias = fp32_parameter(g.num_heads)
        self.A_log = fp32_parameter(g.num_heads)
        self.D = fp32_parameter(g.num_heads)
        self.conv1d = CausalConv1d(g.conv_width, g.conv_kernel, config.use_conv_bias, config.hidden_act)
        self.in_proj = Linear(g.hidden_size, g.projected, bias=config.use_bias)  # -> [z; x; B; C; Δ]
        self.norm = GatedRMSNorm(g.intermediate_size, g.n_groups, config.layer_norm_epsilon)
        if branches is None:
            branches = config.num_hidden_layers if config.rescale_prenorm_residual else 1
        self.out_proj = Linear(g.intermediate_size, g.hidden_size, bias=config.use_bias, branches=branches)
        self.reset_parameters()

    @torch.no_grad()
    def draw(self) -> None:
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(*_RATES).log())
        init.ones_(self.D)
        draw_step_bias(self.dt_bias, *self.step_range)

    def mix(
        self, hidden_states: Tensor, states: tuple[Tensor, Tensor] | None, layout: Layout, keep: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(B, L, d) -> (B, L, d), and the states after it where they are to be kept and are new.

        Args:
            states: those before it, conv (B, W, k) and ssm (B, H, P, N), or None. One token without gradients
                advances them in place, and None is returned in their stead.
        """
        conv_state, ssm_state = states or (None, None)
        if states is not None and layout.restart is not None:
            goes_on = layout.restart.logical_not()[:, None, None]
            conv_state, ssm_state = states[0] * goes_on, states[1] * goes_on[..., None]

        z, conv_input, dt = self.in_proj(hidden_states).split(self.splits, -1)  # (B, L, E), (B, L, W), (B, L, H)
        decoding = conv_state is not None and dt.shape[1] == 1 and layout.plain and not torch.is_grad_enabled()
        mixed = self.conv1d(conv_input, conv_state, layout.seq_idx, in_place=decoding)
        x, B, C = mixed.split(self.conv_splits, -1)
        x, B, C = x.unflatten(-1, self.heads), B.unflatten(-1, self.groups), C.unflatten(-1, self.groups)
        dt = self._steps(dt, layout.padding(dt.shape[1]) if keep or states is not None else None)
        A = -torch.exp(self.A_log.to(dt.dtype))

        if decoding:
            assert ssm_state is not None
            x, dt, B, C = (t[:, 0] for t in (x, dt, B, C))
            y = ops.ssd_update(ssm_state, x, A, dt, B, C, self.D)[:, None]
            return self.out_proj(self.norm(y.flatten(2), z)), None
        y, ssm_state = ops.ssd(x, A, dt, B, C, self.D, ssm_state, layout.seq_idx, return_final_state=True)
        output = self.out_proj(self.norm(y.flatten(2), z))
        if states is None and not keep:
            return output, None
        conv_state = last_inputs(conv_input, conv_state, self.conv_kernel, layout.lengths, layout.seq_idx)
        return output, (conv_state, ssm_state)

    def _steps(self, dt: Tensor, padding: Tensor | None) -> Tensor:
        """Δ (B, L, H) in fp32: softplus(dt + dt_bias) within its limits, and 0 at padding."""
        exact = torch.promote_types(dt.dtype, torch.float32)
        step = F.softplus(dt.to(exact) + self.dt_bias.to(exact))
        if self.limit != UNLIMITED:
            step = step.clamp(*self.limit)
        if padding is not None:  # holds the state
            step = step.masked_fill(padding[..., None], 0.0)
        return step


class Mamba2Block(ResidualBlock):
    """A norm and a mixer, added to the residual."""

    def __init__(self, config: Mamba2Config, layer_idx: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(config, layer_idx)


class Mamba2PreTrainedModel(StatePreTrainedModel):
    """What transformers needs to know of a Mamba-2."""

    config: Mamba2Config
    config_class: Any = Mamba2Config
    base_model_prefix = "backbone"
    _no_split_modules = ["Mamba2Block"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [r"mixer\.A_log", r"mixer\.D", r"mixer\.dt_bias"]  # noqa: RUF012


class Mamba2Model(Mamba2PreTrainedModel, Backbone):
    """Embeddings, blocks and the final norm; `forward` is `Backbone.forward`."""

    def make_block(self, config: Mamba2Config, layer_idx: int) -> Mamba2Block:
        return Mamba2Block(config, layer_idx)


class Mamba2ForCausalLM(
    Mamba2PreTrainedModel, CausalLM, GenerationMixin
):  # a direct base, as Auto classes of others look for it
    """Mamba-2 with a language-model head; `forward`, the loss and generation are `CausalLM`'s."""

    backbone_class = Mamba2Model
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012


class Mamba2ForSequenceClassification(Mamba2PreTrainedModel, SequenceClassifier):
    """Mamba-2 with a class for each sequence; `forward` and the loss are `SequenceClassifier`'s."""

    backbone_class = Mamba2Model
