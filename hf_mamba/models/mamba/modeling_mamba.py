"""The Mamba language model, to be read top to bottom: mixer, block, backbone, language model.

"Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao, 2023), sections 3.2-3.5. Symbols:

    B batch · L length · V vocabulary · d `hidden_size` · E `intermediate_size` · N `state_size` · k `conv_kernel`
    R `time_step_rank` · Δ the step, `dt` · A (E, N) and D (E) the state space's own parameters

Field names, tensor names and call signatures are those of transformers' Mamba; a checkpoint serves both.
"""

from typing import Any

import torch
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
from hf_mamba.models.common.linear import Linear, drawn_later
from hf_mamba.models.common.state import last_inputs
from hf_mamba.models.mamba.configuration_mamba import MambaConfig

# softplus of this is exactly zero in fp32: a step of no length, which holds the state at padding
_NO_STEP = -1e4


class TimeStepProjection(Linear):
    """dt_proj (E, R). Its bias can be handed to the scan, which adds it in fp32.

    softplus of the bias is drawn log-uniformly from the configuration's time_step_min to time_step_max.
    """

    def __init__(self, config: MambaConfig):
        with drawn_later():
            super().__init__(int(config.time_step_rank), config.intermediate_size)
        self.bias = fp32_parameter(config.intermediate_size)
        self.scale, self.scheme = config.time_step_scale, config.time_step_init_scheme
        self.range = (config.time_step_min, config.time_step_max, config.time_step_floor)
        if self.scheme not in ("random", "constant"):
            raise ValueError(f"time_step_init_scheme is {self.scheme!r}; write 'random' or 'constant'.")
        self.reset_parameters()

    @torch.no_grad()
    def draw(self) -> None:
        bound = self.in_features**-0.5 * self.scale
        if self.scheme == "constant":
            init.constant_(self.weight, bound)
        else:
            init.uniform_(self.weight, -bound, bound)
        draw_step_bias(self.bias, *self.range)

    def forward(self, dt: Tensor, split_bias: bool = False) -> Any:
        """Δ before its softplus (B, L, E); with `split_bias`, without the bias, and the bias (E,) beside it."""
        projected = ops.linear(dt, self.weight)
        return (projected, self.bias) if split_bias else (projected + self.bias).to(projected.dtype)


class MambaMixer(StateMixer):
    """The selective state space with its gate (paper, figure 3): in_proj, conv, scan, gate, out_proj.

    Every part is drawn as in the original (mamba_ssm, mamba_simple.py), also in a module of one's own.
    """

    def __init__(self, config: MambaConfig, layer_idx: int):
        super().__init__()
        d, E, N = config.hidden_size, config.intermediate_size, config.state_size
        self.layer_idx = layer_idx
        self.conv_kernel = config.conv_kernel
        self.splits = [int(config.time_step_rank), N, N]
        self.conv1d = CausalConv1d(E, config.conv_kernel, config.use_conv_bias, config.hidden_act)
        self.in_proj = Linear(d, 2 * E, bias=config.use_bias)  # -> [x; z]
        self.x_proj = Linear(E, sum(self.splits), bias=False)  # -> [Δ; B; C]
        self.dt_proj = TimeStepProjection(config)
        self.A_log = fp32_parameter(E, N)
        self.D = fp32_parameter(E)
        branches = config.num_hidden_layers if config.rescale_prenorm_residual else 1
        self.out_proj = Linear(E, d, bias=config.use_bias, branches=branches)
        self.reset_parameters()

    @torch.no_grad()
    def draw(self) -> None:
        A = torch.arange(1, self.A_log.shape[1] + 1, dtype=self.A_log.dtype, device=self.A_log.device)
        init.copy_(self.A_log, A.log().expand_as(self.A_log))  # S4D-real
        init.ones_(self.D)

    def mix(
        self, hidden_states: Tensor, states: tuple[Tensor, Tensor] | None, layout: Layout, keep: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(B, L, d) -> (B, L, d), and the states after it where they are to be kept and are new.

        Args:
            states: those before it, conv (B, E, k) and ssm (B, E, N), or None. One token without gradients advances
                them in place, and None is returned in their stead.
        """
        conv_state, ssm_state = states or (None, None)
        if states is not None and layout.restart is not None:
            goes_on = layout.restart.logical_not()[:, None, None]
            conv_state, ssm_state = states[0] * goes_on, states[1] * goes_on

        x, z = self.in_proj(hidden_states).chunk(2, -1)  # (B, L, E) each
        decoding = conv_state is not None and x.shape[1] == 1 and layout.plain and not torch.is_grad_enabled()
        conv_input = x
        x = self.conv1d(x, conv_state, layout.seq_idx, in_place=decoding)
        dt, B, C = self.x_proj(x).split(self.splits, -1)  # (B, L, R), (B, L, N), (B, L, N)
        if isinstance(self.dt_proj, TimeStepProjection):
            dt, dt_bias = self.dt_proj(dt, split_bias=True)
        else:  # wrapped by an adapter or a quantiser, which adds the bias itself
            dt, dt_bias = self.dt_proj(dt), None

        if decoding:
            assert ssm_state is not None
            x, dt, B, C, z = (t[:, 0] for t in (x, dt, B, C, z))
            y = ops.selective_state_update(ssm_state, x, dt, self.A_log, B, C, self.D, z, dt_bias, A_is_log=True)
            return self.out_proj(y[:, None]), None
        A = -torch.exp(self.A_log.float() if self.A_log.dtype != torch.float64 else self.A_log)
        if states is None and not keep:
            return self.out_proj(ops.selective_scan(x, dt, A, B, C, self.D, z, dt_bias, seq_idx=layout.seq_idx)), None

        padding = layout.padding(x.shape[1])
        if padding is not None:
            dt = dt.masked_fill(padding[..., None], _NO_STEP)
        y, ssm_state = ops.selective_scan(
            x, dt, A, B, C, self.D, z, dt_bias, True, ssm_state, layout.seq_idx, return_final_state=True
        )
        conv_state = last_inputs(conv_input, conv_state, self.conv_kernel, layout.lengths, layout.seq_idx)
        return self.out_proj(y), (conv_state, ssm_state)


class MambaBlock(ResidualBlock):
    """A norm and a mixer, added to the residual."""

    def __init__(self, config: MambaConfig, layer_idx: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MambaMixer(config, layer_idx)


class MambaPreTrainedModel(StatePreTrainedModel):
    """What transformers needs to know of a Mamba."""

    config: MambaConfig
    config_class = MambaConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["MambaBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [r"mixer\.A_log", r"mixer\.D", r"mixer\.dt_proj\.bias"]  # noqa: RUF012


class MambaModel(MambaPreTrainedModel, Backbone):
    """Embeddings, blocks and the final norm; `forward` is `Backbone.forward`."""

    def make_block(self, config: MambaConfig, layer_idx: int) -> MambaBlock:
        return MambaBlock(config, layer_idx)


class MambaForCausalLM(
    MambaPreTrainedModel, CausalLM, GenerationMixin
):  # a direct base, as Auto classes of others look for it
    """Mamba with a language-model head; `forward`, the loss and generation are `CausalLM`'s."""

    backbone_class = MambaModel
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012


class MambaForSequenceClassification(MambaPreTrainedModel, SequenceClassifier):
    """Mamba with a class for each sequence; `forward` and the loss are `SequenceClassifier`'s."""

    backbone_class = MambaModel
