"""What a model returns: transformers' own classes, with either name of the past.

It is `cache` from transformers 5.24 on, and was `cache_params`. Both names are understood in arguments, and read from
outputs, with every version.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.models.mamba.modeling_mamba import MambaCausalLMOutput, MambaOutput

PAST = "cache" if any(field.name == "cache" for field in fields(MambaOutput)) else "cache_params"


class _BothNames:
    """The past under the names that the installed transformers does not use; `past_key_values` is stock hybrids'."""

    def __getattr__(self, name: str) -> Any:
        if name in ("cache", "cache_params", "past_key_values") and name != PAST:
            return getattr(self, PAST)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def get(self, key: str, default: Any = None) -> Any:
        """The entry of a name; guided generation asks for its past so, as `past_key_values`."""
        return getattr(self, PAST) if key == "past_key_values" else super().get(key, default)  # type: ignore[misc]


@dataclass
class StateOutput(_BothNames, MambaOutput):
    """The backbone's output: last_hidden_state, the past, hidden_states; attentions of a hybrid's attention layers."""

    attentions: tuple[Tensor, ...] | None = None


@dataclass
class StateCausalLMOutput(_BothNames, MambaCausalLMOutput):
    """The language model's output: loss, logits, and the backbone's; token_losses where they were asked for."""

    attentions: tuple[Tensor, ...] | None = None
    token_losses: Tensor | None = None


class UnreadLogits:
    """What the logits of a training step are made of, in case somebody reads them."""

    def __init__(self, head: nn.Module, hidden_states: Tensor):
        self.head, self.hidden_states = head, hidden_states
        device = hidden_states.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def make(self) -> Tensor:
        with torch.autocast(*self.autocast):
            return logits_of(self.head, self.hidden_states)


@dataclass
class UnreadOutput(StateCausalLMOutput):
    """The output of a training step, whose logits are computed when they are first read.

    The loss is there without them; reading them costs one more product with the head. Until then `items()` shows
    `unread` in their place, so that accelerate, which rebuilds outputs item by item, does not compute them.
    """

    unread: UnreadLogits | None = None

    @property  # type: ignore[misc]
    def logits(self) -> Tensor | None:  # type: ignore[override]
        if self.unread is not None:
            made, self.unread = self.unread.make(), None
            OrderedDict.__delitem__(self, "unread")  # which ModelOutput forbids to others
            self["logits"] = made
        return self.__dict__.get("logits")

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        self.__dict__["logits"] = value

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            return self.logits
        return self.loss if key == 0 else super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key == "logits" or super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return self.logits if key == "logits" else super().get(key, default)

    def to_tuple(self) -> tuple:
        """As in transformers, in the order of the fields; the logits among them."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if value is not None)


def logits_of(head: nn.Module, hidden_states: Tensor) -> Tensor:
    """Logits (..., V), in fp32 at least."""
    logits = head(hidden_states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def one_past(cache_params: Cache | None, cache: Cache | None, others: dict[str, Any]) -> Cache | None:
    """The carried state, by any of its names; `past_key_values`, as stock hybrids call it, is taken out of `others`.

    Raises:
        ValueError: both are given.
    """
    if cache is not None and cache_params is not None and cache is not cache_params:
        raise ValueError("give the carried state once, as cache or as cache_params; both are given, and differ.")
    past = cache_params if cache is None else cache
    third = others.get("past_key_values")
    if isinstance(third, Cache) and any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in third.layers):
        del others["past_key_values"]
        if past is not None and past is not third:
            raise ValueError("give the carried state once; it is given as past_key_values, too, and differs.")
        return third
    return past


def check_ignored(ignored: Mapping[str, Any]) -> None:
    """Refuse the arguments that would change what the caller gets; ignore all others, as transformers' classes do.

    Raises:
        ValueError: naming the argument.
    """
    if ignored.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values is given, but a state-space model has no keys and values, so that prefix tuning cannot "
            "work on it either. A carried state is cache_params; of peft's methods, take LoRA or prompt tuning."
        )
