"""A Mamba as a layer of anybody's own module, with the arguments and names of mamba_ssm's."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_mamba.models.common.layout import check_attention_hints, resolve_layout
from hf_mamba.models.mamba.configuration_mamba import MambaConfig
from hf_mamba.models.mamba.modeling_mamba import MambaMixer

States = tuple[Tensor, Tensor]


class Mamba(MambaMixer):
    """A sequence (B, L, d_model) -> (B, L, d_model), each position from itself and those before it.

    Takes the place of `mamba_ssm.Mamba`: the same arguments, the same names in its state_dict, the same initial values'
    distribution. It runs on CPUs, too, and knows padding, packed documents and a carried state.

    Args:
        d_model: width of the sequence. d_state: states a channel. d_conv: taps of the convolution.
        expand: inner width over d_model. dt_rank: rank of the step's projection; "auto" is ⌈d_model / 16⌉.
        dt_min, dt_max, dt_init_floor: range of the initial steps. dt_init: "random" or "constant". dt_scale: of it.
        conv_bias, bias: biases of the convolution, and of the two outer projections.
        use_fast_path: taken and ignored; the fastest way is chosen by itself.
        layer_idx: this layer's key in `inference_params`.
        device, dtype: of the weights; A_log, D and the step's bias stay in fp32.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        sizes: dict[str, Any] = {"hidden_size": d_model, "state_size": d_state, "conv_kernel": d_conv}
        sizes |= {"intermediate_size": int(expand * d_model), "time_step_rank": dt_rank, "num_hidden_layers": 1}
        steps: dict[str, Any] = {"time_step_min": dt_min, "time_step_max": dt_max, "time_step_scale": dt_scale}
        steps |= {"time_step_init_scheme": dt_init, "time_step_floor": dt_init_floor}
        config = MambaConfig(**sizes, **steps, use_conv_bias=conv_bias, use_bias=bias)
        with torch.device(device) if device is not None else nullcontext():
            super().__init__(config, layer_idx or 0)
        if dtype is not None:
            fp32 = (self.A_log, self.D, self.dt_proj.bias)
            for parameter in self.parameters():
                if not any(parameter is kept for kept in fp32):
                    parameter.data = parameter.data.to(dtype)
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner, self.dt_rank = config.intermediate_size, config.time_step_rank
        self.A_log._no_weight_decay = self.D._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        state: States | None = None,
        return_state: bool = False,
    ) -> Any:
        """(B, L, d_model) -> (B, L, d_model); with `return_state` also the state after it.

        Args:
            inference_params: as mamba_ssm's, whose `key_value_memory_dict` and `seqlen_offset` are read; this layer's
                state is kept there, and continued from where the offset is not 0.
            attention_mask: (B, L), 0 at padding, wherever it is; what is returned there means nothing.
            seq_idx, position_ids, cu_seq_lens_q: packed documents, by any of the three, as in the language model.
            state: what `return_state` returned, conv (B, E, d_conv) and ssm (B, E, d_state) in fp32. It is not changed.

        Raises:
            ValueError: where arguments contradict each other.
        """
        stored = None if inference_params is None else inference_params.key_value_memory_dict
        if stored is not None and inference_params.seqlen_offset > 0:
            if state is not None:
                raise ValueError("give the state once: inference_params has one already, so leave state out.")
            state = stored[self.layer_idx]
        elif state is not None:
            state = (state[0].clone(), state[1].clone())  # one token would advance it in place
        check_attention_hints(cu_seq_lens_q, None, None, None)
        shape = (hidden_states.shape[0], hidden_states.shape[1])
        layout = resolve_layout(shape, attention_mask, seq_idx, position_ids, cu_seq_lens_q, state is not None)
        keep = return_state or stored is not None
        output, after = self.mix(layout.compact(hidden_states), state, layout, keep=keep)
        output, after = layout.restore(output), after or state
        if stored is not None:
            stored[self.layer_idx] = after
        return (output, after) if return_state else output

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token (B, 1, d_model), as mamba_ssm's: its output, and the two states, which are written in place."""
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step takes one token a row, not {hidden_states.shape[1]}: call the layer with state=...")
        output, after = self(hidden_states, state=(conv_state, ssm_state), return_state=True)
        conv_state.copy_(after[0])
        ssm_state.copy_(after[1])
        return output, conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int = 0, dtype: torch.dtype | None = None, **_: Any
    ) -> States:
        """The state before the first token, as mamba_ssm's; of one size, whatever the length."""
        like = self.out_proj.weight
        conv_state = like.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or like.dtype)
        exact = torch.promote_types(like.dtype, torch.float32)
        return conv_state, like.new_zeros(batch_size, self.d_inner, self.d_state, dtype=exact)
