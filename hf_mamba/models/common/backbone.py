"""What every family's model does around its blocks: loading, the loop over the blocks, the final norm."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import PreTrainedModel

from hf_mamba.family import get_family
from hf_mamba.formats import loading
from hf_mamba.models.common.blocks import RMSNorm
from hf_mamba.models.common.layout import check_attention_hints, resolve_layout
from hf_mamba.models.common.linear import Quantisable, SelfDrawn, draw_linear, drawn_later
from hf_mamba.models.common.outputs import PAST, StateOutput, check_ignored, one_past
from hf_mamba.models.common.state import has_state


class StatePreTrainedModel(Quantisable, PreTrainedModel):
    """What transformers needs to know of a model with a recurrent state, and the shared layers' initialisation.

    A family's own class names its configuration, prefix, block and fp32 parameters.

    Attributes:
        embeddings_name, layers_name, norm_name, head_name: the attributes that hold these parts, which name tensors.
    """

    embeddings_name: ClassVar[str] = "embeddings"
    layers_name: ClassVar[str] = "layers"
    norm_name: ClassVar[str] = "norm_f"
    head_name: ClassVar[str] = "lm_head"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As transformers' own; also takes original state-spaces folders and DeepSpeed ZeRO training folders.

        Who asks for `output_loading_info` is told there what is missing or unknown, as who takes it by
        `ignore_mismatched_sizes` is warned.

        Raises:
            ValueError: for a checkpoint that is damaged, incomplete, unsafe or of another architecture.
        """
        config_class: Any = cls.config_class
        family = get_family(config_class.model_type)
        wants_info = kwargs.pop("output_loading_info", False)
        incomplete = wants_info or bool(kwargs.get("ignore_mismatched_sizes"))
        path, kwargs = loading.resolve(pretrained_model_name_or_path, kwargs, family, incomplete)
        loaded: Any = super().from_pretrained(path, *model_args, output_loading_info=True, **kwargs)
        model, info = loaded
        loading.finish(model, info, pretrained_model_name_or_path, family, incomplete)
        return (model, info) if wants_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; always under the stock names, also where the model was loaded from others."""
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every module draws itself; the embeddings, torch's own, as in the original (mixer_seq_simple.py)."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, SelfDrawn):
            module.draw()
        elif isinstance(module, nn.Linear):
            if any(module is part for part in self.modules()):  # a user's own head
                super()._init_weights(module)
            else:  # what transformers makes to resize the language model's head: as in a fresh model
                draw_linear(module)


class Backbone(StatePreTrainedModel):
    """Embeddings, blocks and the final norm. Blocks may differ from layer to layer."""

    keeps_width: ClassVar[bool] = True  # last_hidden_state has the residual's dtype; not in stock hybrids
    attends: ClassVar[bool] = False  # some layers are attention

    def __init__(self, config: Any):
        super().__init__(config)
        # handed its weight, so that the constructor draws nothing (see linear.drawn_later)
        weight = torch.empty(config.vocab_size, config.hidden_size)
        setattr(self, self.embeddings_name, nn.Embedding.from_pretrained(weight, freeze=False))
        with drawn_later():
            blocks = nn.ModuleList(self.make_block(config, i) for i in range(config.num_hidden_layers))
            setattr(self, self.layers_name, blocks)
            setattr(self, self.norm_name, RMSNorm(config.hidden_size, config.layer_norm_epsilon))
        self.gradient_checkpointing = False
        self.post_init()

    def make_block(self, config: Any, layer_idx: int) -> nn.Module:
        """The block of one layer.

        It is called with the residual stream (B, L, d), which it returns with its own part added; see
        `blocks.ResidualBlock.forward`.
        """
        raise NotImplementedError

    def scale_embeddings(self, embeddings: Tensor) -> Tensor:
        """What enters the first block of the embeddings (B, L, d)."""
        return embeddings

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self, self.embeddings_name)

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self, self.embeddings_name, value)

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
        cache: Cache | None = None,
        for_head: bool = False,
        output_attentions: bool | None = None,
        **ignored: Any,
    ) -> tuple | StateOutput:
        """Hidden states (B, L, d) of tokens (B, L), or of embeddings (B, L, d).

        Args:
            cache_params, cache: the state of earlier tokens, continued from and updated; any number of tokens may
                follow. One argument with two names, as transformers renamed it.
            use_cache: return the state; the default is the configuration's outside training.
            attention_mask: (B, L), or (B, past + L) with a carried state; 0 is padding, wherever it is. What the model
                returns at padding means nothing.
            position_ids, seq_idx, cu_seq_lens_q: packed documents, by any of the three; see `layout.resolve_layout`.
            cu_seq_lens_k, max_length_q, max_length_k: what collators for flash attention send beside cu_seq_lens_q;
                nothing new to a scan, and refused where they contradict it.
            for_head: last_hidden_state in the weights' dtype, in which a head reads it, whatever the residual's is: no
                wide copy is made for it.
            output_attentions: a hybrid also returns the weights of its attention layers; a model without any refuses.
            ignored: what callers hand to every model (token_type_ids, ...) is taken and ignored, as in stock classes.

        Raises:
            ValueError: where arguments contradict each other or cannot be served.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if output_attentions is None:
            output_attentions = self.attends and config.output_attentions
        return_dict = config.return_dict if return_dict is None else return_dict
        cache_params = one_past(cache_params, cache, ignored)
        check_ignored(ignored)
        if output_attentions and not self.attends:
            raise ValueError("output_attentions is True, but a state-space model has no attentions: leave it out.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache_params is not None:
                raise ValueError(
                    "cache_params cannot be used with gradient checkpointing in training: the recomputation would "
                    "advance the state twice. Call gradient_checkpointing_disable() or leave cache_params out."
                )
            use_cache = False
        use_cache = (config.use_cache and not self.training) if use_cache is None else use_cache
        hidden_states = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states = self.scale_embeddings(hidden_states)
        if cache_params is None and use_cache:
            cache_params = DynamicCache(config=config)
        carried = cache_params is not None and has_state(cache_params)
        batch, length = hidden_states.shape[:2]
        check_attention_hints(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        layout = resolve_layout((batch, length), attention_mask, seq_idx, position_ids, cu_seq_lens_q, carried)

        output = self.run_blocks(
            hidden_states,
            layout=layout,
            cache_params=cache_params,
            use_cache=use_cache,
            wide=self.keeps_width and (bool(output_hidden_states) or not for_head),
            output_hidden_states=output_hidden_states,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
        )
        return output if return_dict else output.to_tuple()

    def run_blocks(
        self,
        hidden_states: Tensor,
        *,
        cache_params: Cache | None,
        use_cache: bool,
        wide: bool,
        output_hidden_states: Any,
        **options: Any,
    ) -> StateOutput:
        """The blocks and the final norm, of what enters the first block (B, L, d)."""
        collected = []
        for layer in getattr(self, self.layers_name):
            hidden_states = layer(hidden_states, cache_params=cache_params, **options)
            if output_hidden_states:
                collected.append(hidden_states)
        hidden_states = getattr(self, self.norm_name)(hidden_states, wide=wide)
        if output_hidden_states:
            collected.append(hidden_states)
        listed: Any = tuple(collected) if output_hidden_states else None
        past: Any = {PAST: cache_params if use_cache else None}
        return StateOutput(hidden_states, **past, hidden_states=listed)


class OverBackbone(StatePreTrainedModel):
    """A backbone, for a head of some kind to be put on it."""

    backbone_class: ClassVar[type[Backbone]]

    def __init__(self, config: Any):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.backbone_class(config))

    @property
    def _body(self) -> Any:
        return getattr(self, self.base_model_prefix)

    def get_input_embeddings(self) -> nn.Module:
        return self._body.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._body.set_input_embeddings(value)
