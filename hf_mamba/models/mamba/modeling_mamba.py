"""The Mamba language model, to be read top to bottom: mixer, block, backbone, language model.

"Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao, 2023), sections 3.2-3.5. Symbols:

    B batch · L length · V vocabulary · d `hidden_size` · E `intermediate_size` · N `state_size` · k `conv_kernel`
    R `time_step_rank` · Δ the step, `dt` · A (E, N) and D (E) the state space's own parameters

Field names, tensor names and call signatures are those of transformers' Mamba; a checkpoint serves both.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mamba.modeling_mamba import MambaCausalLMOutput, MambaOutput

from hf_mamba import ops
from hf_mamba.models.common.blocks import CausalConv1d, MambaRMSNorm, _fp32_parameter
from hf_mamba.models.common.causal_lm import MambaLMOutput, _loss_of_logits
from hf_mamba.models.common.generation import MambaGenerationMixin
from hf_mamba.models.common.layout import Layout, check_attention_hints, resolve_layout
from hf_mamba.models.common.linear import Linear, LMHead
from hf_mamba.models.common.state import has_state, last_inputs, read_states, write_states
from hf_mamba.models.mamba.configuration_mamba import MambaConfig

# softplus of this is exactly zero in fp32: a step of no length, which holds the state at padding
_NO_STEP = -1e4


class TimeStepProjection(Linear):
    """dt_proj (E, R). Its bias can be handed to the scan, which adds it in fp32."""

    def __init__(self, rank: int, width: int):
        super().__init__(rank, width)
        self.bias = _fp32_parameter(width)

    def forward(self, dt: Tensor, split_bias: bool = False) -> Any:
        """Δ before its softplus (B, L, E); with `split_bias`, without the bias, and the bias (E,) beside it."""
        projected = ops.linear(dt, self.weight)
        return (projected, self.bias) if split_bias else (projected + self.bias).to(projected.dtype)


class MambaMixer(nn.Module):
    """The selective state space with its gate (paper, figure 3): in_proj, conv, scan, gate, out_proj."""

    def __init__(self, config: MambaConfig, layer_idx: int):
        super().__init__()
        d, E, N = config.hidden_size, config.intermediate_size, config.state_size
        self.layer_idx = layer_idx
        self.conv_kernel = config.conv_kernel
        self.splits = [int(config.time_step_rank), N, N]
        self.in_proj = Linear(d, 2 * E, bias=config.use_bias)  # -> [x; z]
        self.conv1d = CausalConv1d(E, config.conv_kernel, config.use_conv_bias, config.hidden_act)
        self.x_proj = Linear(E, sum(self.splits), bias=False)  # -> [Δ; B; C]
        self.dt_proj = TimeStepProjection(self.splits[0], E)
        self.A_log = _fp32_parameter(E, N)
        self.D = _fp32_parameter(E)
        self.out_proj = Linear(E, d, bias=config.use_bias)
        self.out_proj.closes_residual = True

    def forward(self, hidden_states: Tensor, cache_params: Cache | None, layout: Layout) -> Tensor:
        """(B, L, d) -> (B, L, d)."""
        conv_state, ssm_state = None, None
        if cache_params is not None and (carried := read_states(cache_params, self.layer_idx)) is not None:
            conv_state, ssm_state = carried
            if layout.restart is not None:
                keep = layout.restart.logical_not()[:, None, None]
                conv_state, ssm_state = conv_state * keep, ssm_state * keep

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
            return self.out_proj(y[:, None])
        A = -torch.exp(self.A_log.float() if self.A_log.dtype != torch.float64 else self.A_log)
        if cache_params is None:
            return self.out_proj(ops.selective_scan(x, dt, A, B, C, self.D, z, dt_bias, seq_idx=layout.seq_idx))

        padding = layout.padding(x.shape[1])
        if padding is not None:
            dt = dt.masked_fill(padding[..., None], _NO_STEP)
        y, ssm_state = ops.selective_scan(
            x, dt, A, B, C, self.D, z, dt_bias, True, ssm_state, layout.seq_idx, return_final_state=True
        )
        conv_state = last_inputs(conv_input, conv_state, self.conv_kernel, layout.lengths, layout.seq_idx)
        write_states(cache_params, self.layer_idx, conv_state, ssm_state)
        return self.out_proj(y)


class MambaBlock(GradientCheckpointingLayer):
    """Pre-norm residual block. The residual stays in fp32 (where the configuration says so) and is normed as such."""

    def __init__(self, config: MambaConfig, layer_idx: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = MambaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MambaMixer(config, layer_idx)

    def forward(
        self, hidden_states: Tensor, cache_params: Cache | None, layout: Layout, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the block adds (B, L, d), and what it is to be added to: the next norm makes the sum on its way.

        `hidden_states` and `residual` are the same two of the block before; without a residual, their sum.
        """
        if residual is None:
            residual = hidden_states
            if self.residual_in_fp32:
                residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
            hidden_states = self.norm(residual)
        else:
            hidden_states, residual = self.norm(hidden_states, residual)
        return self.mixer(hidden_states, cache_params, layout), residual


class MambaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of a Mamba, and the paper's initialisation."""

    config: MambaConfig
    config_class = MambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["MambaBlock"]  # noqa: RUF012
    _is_stateful = True
    _keep_in_fp32_modules_strict = [r"mixer\.A_log", r"mixer\.D", r"mixer\.dt_proj\.bias"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As transformers' own; also takes original state-spaces folders and DeepSpeed ZeRO training folders.

        Raises:
            ValueError: for a checkpoint that is damaged, incomplete, unsafe or of another architecture.
        """
        from hf_mamba.formats.loading import finish, resolve

        wants_info = kwargs.pop("output_loading_info", False)
        path, kwargs = resolve(pretrained_model_name_or_path, kwargs)
        loaded: Any = super().from_pretrained(path, *model_args, output_loading_info=True, **kwargs)
        model, info = loaded
        finish(model, info, pretrained_model_name_or_path)
        return (model, info) if wants_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The original's initialisation (mamba_ssm, mixer_seq_simple.py and mamba_simple.py).

        transformers' `init` functions pass over tensors that came from a checkpoint.
        """
        config = self.config
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, MambaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, MambaMixer):
            A = torch.arange(1, config.state_size + 1, dtype=module.A_log.dtype, device=module.A_log.device)
            init.copy_(module.A_log, A.log().expand_as(module.A_log))  # S4D-real
            init.ones_(module.D)
        elif isinstance(module, TimeStepProjection):
            self._init_time_step(module)
        elif isinstance(module, CausalConv1d):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, Linear):
            # torch's default, U(±1/√fan_in); out_proj is divided by √layers, as there is one residual branch a layer
            bound = module.in_features**-0.5
            if config.rescale_prenorm_residual and module.closes_residual:
                bound /= math.sqrt(config.num_hidden_layers)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)

    def _init_time_step(self, module: TimeStepProjection) -> None:
        config = self.config
        bound = module.in_features**-0.5 * config.time_step_scale
        if config.time_step_init_scheme == "constant":
            init.constant_(module.weight, bound)
        elif config.time_step_init_scheme == "random":
            init.uniform_(module.weight, -bound, bound)
        else:
            raise ValueError(
                f"time_step_init_scheme is {config.time_step_init_scheme!r}; write 'random' or 'constant'."
            )
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.empty_like(module.bias).uniform_(low, high).exp().clamp(min=config.time_step_floor)
        init.copy_(module.bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


class MambaModel(MambaPreTrainedModel):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        # handed its weight, so that the constructor draws nothing (see linear.Linear)
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(MambaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = MambaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> tuple | MambaOutput:
        """Hidden states (B, L, d) of tokens (B, L), or of embeddings (B, L, d).

        Args:
            cache_params: the state of earlier tokens, continued from and updated; any number of tokens may follow.
            use_cache: return the state; the default is the configuration's outside training.
            attention_mask: (B, L), or (B, past + L) with a carried state; 0 is padding, wherever it is. What the model
                returns at padding means nothing.
            position_ids, seq_idx, cu_seq_lens_q: packed documents, by any of the three; see `layout.resolve_layout`.
            cu_seq_lens_k, max_length_q, max_length_k: what collators for flash attention send beside cu_seq_lens_q;
                nothing new to a scan, and refused where they contradict it.

        Raises:
            ValueError: where arguments contradict each other or cannot be served.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if self.gradient_checkpointing and self.training:
            if cache_params is not None:
                raise ValueError(
                    "cache_params cannot be used with gradient checkpointing in training: the recomputation would "
                    "advance the state twice. Call gradient_checkpointing_disable() or leave cache_params out."
                )
            use_cache = False
        use_cache = (config.use_cache and not self.training) if use_cache is None else use_cache
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if cache_params is None and use_cache:
            cache_params = DynamicCache(config=config)
        carried = cache_params is not None and has_state(cache_params)
        batch, length = hidden_states.shape[:2]
        check_attention_hints(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        layout = resolve_layout((batch, length), attention_mask, seq_idx, position_ids, cu_seq_lens_q, carried)

        hidden_states, residual = layout.compact(hidden_states), None
        # the sum is made at once where it is asked for, or where a checkpoint would keep two tensors instead of one
        at_once = output_hidden_states or (self.gradient_checkpointing and self.training)
        collected = []
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, cache_params, layout, residual)
            if at_once:
                hidden_states, residual = residual + hidden_states, None
            if output_hidden_states:
                collected.append(layout.restore(hidden_states))
        hidden_states = self.norm_f(hidden_states) if residual is None else self.norm_f(hidden_states, residual)[0]
        hidden_states = layout.restore(hidden_states)
        if output_hidden_states:
            collected.append(hidden_states)

        output = MambaOutput(
            last_hidden_state=hidden_states,
            cache_params=cache_params if use_cache else None,
            hidden_states=tuple(collected) if output_hidden_states else None,  # type: ignore[arg-type]
        )
        return output if return_dict else output.to_tuple()


class MambaForCausalLM(MambaPreTrainedModel, MambaGenerationMixin):
    """Mamba with a language-model head, tied to the embeddings unless the configuration says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.backbone = MambaModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if type(new_embeddings) is nn.Linear:  # from resize_token_embeddings: keep the head that can skip its logits
            new_embeddings.__class__ = LMHead
        self.lm_head = new_embeddings

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; of a state dict that an engine gathered, a tied head is not written a second time."""
        if kwargs.get("state_dict") is not None and self.config.tie_word_embeddings:
            kwargs["state_dict"] = {k: v for k, v in kwargs["state_dict"].items() if k != "lm_head.weight"}
        super().save_pretrained(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        z_loss: float = 0.0,
        return_token_losses: bool = False,
    ) -> tuple | MambaCausalLMOutput:
        """Next-token logits (B, L, V) in fp32, and the loss where labels are given.

        Args:
            labels: (B, L), shifted inside: position t is scored on labels[t + 1]; -100 does not count.
            num_items_in_batch: divide the summed loss by this (gradient accumulation) instead of by the counted labels.
            logits_to_keep: only the last so many positions, or those of an index tensor; 0 keeps all.
            skip_logits: leave the logits out (None) and compute the loss in chunks. The default is to do so in training
                with labels, where the whole logits would dominate memory.
            z_loss: add this times logsumexp(logits)² to the loss of each prediction, so that the logits do not drift
                (PaLM, section 5).
            return_token_losses: the output has `token_losses`, too: the cross-entropy of each position's
                prediction, (B, L) in fp32, 0 where none counts, without a gradient.

        Other arguments as in MambaModel.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.backbone(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
        )
        hidden_states = outputs.last_hidden_state
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(
                "labels need the logits of every position: leave logits_to_keep at 0 when labels are given."
            )
        targets = None if labels is None else nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # (B, L)
        skip_logits = (self.training and targets is not None) if skip_logits is None else skip_logits
        if skip_logits and targets is None:
            raise ValueError("skip_logits without labels would compute nothing: give labels, or leave skip_logits out.")
        if targets is None and (return_token_losses or z_loss):
            raise ValueError("return_token_losses and z_loss need labels: give them, or leave both out.")

        chunked = skip_logits and isinstance(self.lm_head, LMHead)
        loss, logits, token_losses = None, None, None
        if chunked:
            found = self.lm_head(hidden_states, targets, num_items_in_batch, z_loss, return_token_losses)
            loss, token_losses = found if return_token_losses else (found, None)
        if not chunked:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if targets is not None:
                loss = _loss_of_logits(logits, targets, num_items_in_batch, z_loss)
                if return_token_losses:
                    with torch.no_grad():
                        token_losses = nn.functional.cross_entropy(logits.mT, targets, reduction="none")
        output = MambaLMOutput(
            loss=loss,
            logits=None if skip_logits else logits,
            cache_params=outputs.cache_params,
            hidden_states=outputs.hidden_states,
            token_losses=token_losses,
        )
        return output if return_dict else output.to_tuple()
