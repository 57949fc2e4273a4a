"""Norm, residual block and convolution that every family shares."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_mamba import ops
from hf_mamba.models.common.layout import Layout, resolve_layout
from hf_mamba.models.common.linear import SelfDrawn
from hf_mamba.models.common.state import has_state, read_states, write_states


def fp32_parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter that stays in fp32 when the model is built in a lower precision."""
    return nn.Parameter(torch.empty(*shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))


@torch.no_grad()
def draw_step_bias(bias: Tensor, low: float, high: float, floor: float) -> None:
    """Draw the bias of Δ so that its softplus is log-uniform from `low` to `high`, and at least `floor`."""
    dt = torch.empty_like(bias).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    init.copy_(bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


class RMSNorm(SelfDrawn):
    """RMSNorm with fp32 statistics; takes the fp32 residual."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def draw(self) -> None:
        init.ones_(self.weight)

    def forward(self, hidden_states: Tensor, wide: bool = False) -> Tensor:
        """The norm of (B, L, d) in the weight's dtype; a `wide` one in the argument's, if that is wider."""
        weight: Tensor = self.weight
        if wide:
            weight = weight.to(torch.promote_types(weight.dtype, hidden_states.dtype))
        return ops.rms_norm(hidden_states, weight, self.variance_epsilon)


def layout_of(hidden_states: Tensor, cache_params: Cache | None, attention_mask: Tensor | None) -> Layout:
    """The layout of (B, L, d), for a block or mixer that is called without its model."""
    carried = cache_params is not None and has_state(cache_params)
    batch, length = hidden_states.shape[:2]
    return resolve_layout((batch, length), attention_mask, carried=carried)


class Mixer(nn.Module):
    """What mixes tokens within a block: attention, or a state space. A family's own defines `mixed`."""

    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        layout: Layout | None = None,
        **ignored: Any,
    ) -> Tensor:
        """(B, L, d) -> (B, L, d).

        Args:
            attention_mask: (B, L), 0 at padding. The block gives the `layout`, and the tokens in its compact order.
        """
        if layout is None:
            layout = layout_of(hidden_states, cache_params, attention_mask)
            return layout.restore(self(layout.compact(hidden_states), cache_params, layout=layout))
        return self.mixed(hidden_states, cache_params, layout)

    def mixed(self, hidden_states: Tensor, cache_params: Cache | None, layout: Layout) -> Tensor:
        """(B, L, d) -> (B, L, d), the tokens of each row in the layout's compact order."""
        raise NotImplementedError


class StateMixer(Mixer, SelfDrawn):
    """A mixer that carries two states, of its convolution and of its recurrence. A family's own defines `mix`."""

    def mixed(self, hidden_states: Tensor, cache_params: Cache | None, layout: Layout) -> Tensor:
        if cache_params is None:
            return self.mix(hidden_states, None, layout)[0]
        output, states = self.mix(hidden_states, read_states(cache_params, self.layer_idx), layout, keep=True)
        if states is not None:
            write_states(cache_params, self.layer_idx, *states)
        return output

    def mix(
        self, hidden_states: Tensor, states: tuple[Tensor, Tensor] | None, layout: Layout, keep: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(B, L, d) -> (B, L, d), and the states after it where they are to be kept and are new.

        Args:
            states: those before it, of the convolution and of the recurrence, or None. One token without gradients
                advances them in place, and None is returned in their stead.
        """
        raise NotImplementedError


class Block(GradientCheckpointingLayer):
    """A layer of the model: it adds to the residual stream, which stays in fp32 where the configuration says so.

    A family's own defines `added`.
    """

    residual_in_fp32: bool

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> Tensor:
        """The residual stream before this block (B, L, d) -> after it, in the caller's order of tokens.

        Args:
            attention_mask: (B, L), 0 at padding. The model's own loop gives the `layout`, which has it resolved.
            options: what attention reads beside these; all else is ignored.
        """
        layout = layout_of(hidden_states, cache_params, attention_mask) if layout is None else layout
        residual = hidden_states
        if self.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        return self.added(residual, cache_params, layout, attention_mask=attention_mask, **options)

    def added(self, residual: Tensor, cache_params: Cache | None, layout: Layout, **options: Any) -> Tensor:
        """The residual stream (B, L, d) with this block's part; mixers see tokens in the layout's compact order."""
        raise NotImplementedError


class ResidualBlock(Block):
    """Pre-norm block of one mixer. A family's own sets `norm` and `mixer`; the names are those of its tensors."""

    norm: RMSNorm
    mixer: nn.Module

    def added(self, residual: Tensor, cache_params: Cache | None, layout: Layout, **ignored: Any) -> Tensor:
        update = self.mixer(layout.compact(self.norm(residual)), cache_params, layout=layout)
        return residual + layout.restore(update)


class CausalConv1d(SelfDrawn, nn.Conv1d):
    """Depthwise causal convolution with activation on (B, L, E); weight (E, 1, k), as in transformers' files.

    Drawn from U(±1/√k), torch's default, the bias too.
    """

    def __init__(self, width: int, kernel: int, bias: bool, activation: str):
        super().__init__(width, width, kernel, groups=width, padding=kernel - 1, bias=bias)
        fused = activation in ("silu", "swish")
        self.fused_activation = "silu" if fused else None
        self.activation = nn.Identity() if fused else ACT2FN[activation]

    def draw(self) -> None:
        bound = self.kernel_size[0] ** -0.5
        for parameter in self.parameters():
            init.uniform_(parameter, -bound, bound)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        state: Tensor | None = None,
        seq_idx: Tensor | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """(B, L, E) -> (B, L, E). `state` (B, E, k) holds the inputs before x; `in_place` pushes a single x into it."""
        weight = self.weight.squeeze(1)
        if in_place:
            assert state is not None
            y = ops.causal_conv1d_update(x[:, 0], state, weight, self.bias, self.fused_activation)[:, None]
        else:
            before = None if state is None else state[..., 1:]
            y = ops.causal_conv1d(x, weight, self.bias, self.fused_activation, before, seq_idx)
        return self.activation(y)
