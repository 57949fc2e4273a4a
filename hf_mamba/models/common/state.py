"""The carried state, kept in transformers' own `DynamicCache` so that generate, beams and exports know it.

One `LinearAttentionLayer` per block holds `conv_states[0]` (B, E, k), the last k inputs of the convolution, oldest
first, and `recurrent_states[0]` (B, E, N) fp32, the state of the scan, which a family without a
convolution has alone. A block with attention has keys and values (attention.py).
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin


def _layer(cache: Cache, layer_idx: int) -> Any:  # a LinearAttentionCacheLayerMixin, whose tensors are typed optional
    layers = cache.layers
    if layer_idx >= len(layers) or not isinstance(layers[layer_idx], LinearAttentionCacheLayerMixin):
        raise ValueError(
            f"cache_params is a {type(cache).__name__} without a recurrent state for block {layer_idx}; "
            "write DynamicCache(config=model.config), or leave cache_params out."
        )
    layer: Any = layers[layer_idx]
    if layer.record_past:
        raise ValueError(
            "cache_params records its past so that it can be rolled back (assisted generation); a scan's state cannot "
            "be rolled back. Generate without an assistant."
        )
    return layer


def has_state(cache: Cache) -> bool:
    """Whether the cache carries the state of earlier tokens."""
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            return bool(_layer(cache, i).has_previous_state[0])
    attention: Any = cache.layers[0] if cache.layers else _layer(cache, 0)
    return bool(attention.is_initialized)


def read_states(cache: Cache, layer_idx: int) -> tuple[Any, Tensor] | None:
    """(conv_state (B, E, k) or None, ssm_state (B, E, N)) of one block, or None before the first token."""
    layer = _layer(cache, layer_idx)
    if not layer.has_previous_state[0]:
        return None
    return layer.conv_states[0], layer.recurrent_states[0]


def write_states(cache: Cache, layer_idx: int, conv_state: Tensor | None, ssm_state: Tensor) -> None:
    """Store one block's states: in place, so that addresses stay fixed, unless autograd still needs the old ones."""
    layer = _layer(cache, layer_idx)
    if not layer.is_recurrent_states_initialized[0]:
        layer.lazy_initialization(conv_states=conv_state, recurrent_states=ssm_state)
    for stored, new in ((layer.conv_states, conv_state), (layer.recurrent_states, ssm_state)):
        if new is None:
            continue
        if new.requires_grad or stored[0].requires_grad or stored[0].shape != new.shape:
            stored[0] = new
        else:
            stored[0].copy_(new)
    layer.has_previous_state[0] = True


STORED = ("conv", "ssm", "keys", "values")  # what a layer may carry


def stored_states(cache: Cache, layer_idx: int) -> dict[str, Tensor]:
    """What one block carries, by its names in STORED; of a static cache, the slots that were written."""
    layer: Any = cache.layers[layer_idx]
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        states = read_states(cache, layer_idx) or ()
        return {name: state for name, state in zip(STORED, states, strict=False) if state is not None}
    length = int(layer.get_seq_length())
    return {"keys": layer.keys[:, :, :length], "values": layer.values[:, :, :length]}


def restore_states(cache: Cache, layer_idx: int, stored: dict[str, Tensor]) -> None:
    """Put what `stored_states` found into a new cache."""
    if "keys" in stored:
        cache.update(stored["keys"], stored["values"], layer_idx)
    else:
        write_states(cache, layer_idx, stored.get("conv"), stored["ssm"])


def last_inputs(
    x: Tensor, before: Tensor | None, kernel: int, lengths: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """The convolution's state after x: the last k inputs of each row, zero where they belong to an earlier document.

    Args:
        x: (B, L, E). before: (B, E, k), the state before x, or None.
        kernel: k. lengths: (B,), real tokens at the start of each row; all L when absent.
        seq_idx: (B, L), document numbers.

    Returns:
        (B, E, k) in x's dtype.
    """
    batch, length, width = x.shape
    history = x.new_zeros(batch, kernel, width) if before is None else before.transpose(1, 2).to(x.dtype)
    if lengths is None and seq_idx is None:
        tail = x[:, -kernel:] if length >= kernel else torch.cat([history[:, length:], x], 1)
        return tail.transpose(1, 2).contiguous()
    if lengths is None:
        lengths = torch.full((batch,), length, device=x.device)
    index = lengths[:, None] + torch.arange(kernel, device=x.device)  # (B, k) into history + x
    tail = torch.cat([history, x], 1).gather(1, index[..., None].expand(-1, -1, width))
    if seq_idx is not None:
        document = torch.cat([seq_idx[:, :1].expand(-1, kernel), seq_idx], 1).gather(1, index)
        tail = tail * (document == document[:, -1:])[..., None]
    return tail.transpose(1, 2).contiguous()
