"""Causal attention that never leaves a document, and its keys and values in transformers' caches.

PyTorch's `scaled_dot_product_attention` computes it. On a CPU each document is a call of its own, which measured 1.5 to
13 times faster than one call with a block mask (rows of 512 to 8,192 tokens, of 4 to 16 documents); on a GPU, in fp16
or bf16, documents are one call of flash attention's varlen kernel, and a block mask otherwise.

`attend_eagerly` is the definition with all of its weights, for who asks for them or for `attn_implementation="eager"`.

Under torch.func's transforms and forward-mode autograd it is torch's own definition, `SDPBackend.MATH`, because kernels
cannot be transformed. For second derivatives the caller asks for it: `with sdpa_kernel(SDPBackend.MATH)`.

A cache holds nothing but keys and values, so that an empty slot is one whose key has a first channel of 0: padding, an
earlier document, the unfilled rest of a static cache. A token's own first channel is never 0.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from hf_mamba.models.common.layout import Layout, take
from hf_mamba.private.torch import is_transformed


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Layout) -> Tensor:
    """Causal attention within each document: (B, L, H, P) of queries, (B, L, K, P) of keys and values -> (B, L, H, P).

    Args:
        scale: multiplies q k. layout: where the documents are; padding follows each row's tokens, which do not see it.
    """
    if layout.seq_idx is None:
        return _sdpa(query, key, value, scale)
    traced = torch.compiler.is_compiling() or is_transformed()
    if traced or query.is_cuda:
        if not traced and _flash_serves(query):
            return _varlen(query, key, value, scale, layout)
        return _sdpa(query, key, value, scale, _within_documents(layout.seq_idx))
    flat = [t.flatten(0, 1).split(layout.document_lengths) for t in (query, key, value)]  # (T, H, P) each
    parts = [_sdpa(q[None], k[None], v[None], scale)[0] for q, k, v in zip(*flat, strict=True)]
    return torch.cat(parts).view_as(query)


def _flash_serves(query: Tensor) -> bool:
    """Whether PyTorch's varlen kernel, which pads and falls back on nothing, takes these heads on this GPU."""
    width = query.shape[-1]
    if query.dtype not in (torch.float16, torch.bfloat16) or width % 8 or width > 256:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _within_documents(seq_idx: Tensor) -> Tensor:
    """(B, L, L) bool: the key's token is the query's or an earlier one of its document."""
    length = seq_idx.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=seq_idx.device).tril()
    return (seq_idx[:, :, None] == seq_idx[:, None, :]) & causal


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """Attention (B, L, H, P); causal, or over what is `visible`, (B, L, S) bool."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    mask = None if visible is None else visible[:, None]
    share = q.shape[1] // k.shape[1]
    in_kernel = not q.is_cuda or (mask is None and q.dtype in (torch.float16, torch.bfloat16))
    if share > 1 and not in_kernel:  # flash attention alone shares keys on a GPU; without it, pairs would be stored
        k, v = (t.repeat_interleave(share, 1) for t in (k, v))
    with sdpa_kernel(SDPBackend.MATH) if is_transformed() else nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
    return out.transpose(1, 2)


def _varlen(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Layout) -> Tensor:
    """Flash attention over the documents of all rows, as one sequence of B·L tokens."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = layout.document_lengths
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32)
    q, k, v = (t.flatten(0, 1) for t in (query, key, value))
    longest, shared = max(lengths), q.shape[1] != k.shape[1]
    options: Any = {"scale": scale, "window_size": (-1, 0), "enable_gqa": shared}
    out: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
    return out.view_as(query)


def attend_cached(
    query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Layout, cache: Cache, layer_idx: int
) -> Tensor:
    """Causal attention over the carried document's earlier tokens and the new ones; the cache keeps the last document.

    Args:
        cache: with a DynamicLayer or StaticLayer at `layer_idx`.

    Raises:
        ValueError: for a cache of another kind.
    """
    keys, values, start, carried = _store(key, value, layout, cache, layer_idx)
    if carried:
        k, v = keys.to(query.dtype), values.to(query.dtype)
        out = _sdpa(query, k, v, scale, _visible(keys, start, query.shape[1], layout))
    else:
        out = attend(query, key, value, scale, layout)
    _keep_last_document(layout, cache, layer_idx, start)
    return out


def attend_eagerly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    layout: Layout,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    layer_idx: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention as `attend` and `attend_cached` compute it, and its weights (B, H, L, S), of which it is made.

    The weights' rows and columns are in the caller's order of tokens. Columns of padding are 0, its rows mean nothing.

    Args:
        attention_mask: the caller's, (B, L) or (B, past + L). Columns of earlier tokens that it leaves out are slots of
            the cache. cache: S is all of its slots.
    """
    length, start = query.shape[1], 0
    if cache is None:
        one = torch.zeros(1, length, device=query.device)
        visible = _within_documents(one if layout.seq_idx is None else layout.seq_idx)
        padding = layout.padding(length)
        filled = None if padding is None else ~padding
    else:
        key, value, start, _ = _store(key, value, layout, cache, layer_idx)
        visible, filled = _visible(key, start, length, layout), _filled(key)
    if attention_mask is not None and filled is not None:
        index = _columns(attention_mask, filled, start + length - attention_mask.shape[1])
        key, value = (take(t.flatten(2), index).view_as(t) for t in (key, value))
        visible = visible.expand(len(index), -1, -1)
        visible = visible.gather(2, index[:, None].expand_as(visible))
    query, visible = layout.restore(query.flatten(2)).view_as(query), layout.restore(visible.expand(len(query), -1, -1))
    q, k, v = (t.transpose(1, 2).to(query.dtype) for t in (query, key, value))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~visible[:, None], -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    out = layout.compact((weights @ v).transpose(1, 2).flatten(2)).view_as(query)
    if cache is not None:
        _keep_last_document(layout, cache, layer_idx, start)
    return out, weights


def _columns(attention_mask: Tensor, filled: Tensor, first: Any) -> Tensor:
    """(B, S) the slot of each column: `attention_mask`, from column `first` on, says where the tokens are, in order."""
    at = torch.arange(filled.shape[1], device=filled.device) - first
    masked = attention_mask.bool().gather(1, at.clamp(0, attention_mask.shape[1] - 1).expand(len(filled), -1))
    real = torch.where(at < 0, filled, masked & (at < attention_mask.shape[1]))
    # the last tokens are sure to be there: an ended document's slots are empty
    slots, columns = (where.to(torch.int8).argsort(dim=1, stable=True) for where in (filled, real))
    return slots.gather(1, columns.argsort(1))


def _store(
    key: Tensor, value: Tensor, layout: Layout, cache: Cache, layer_idx: int
) -> tuple[Tensor, Tensor, Any, bool]:
    """Put new tokens into a cache: all its keys and values (B, S, K, P), the first new slot, whether it is not 0."""
    layer = _layer(cache, layer_idx)
    before = layer.get_seq_length() if layer.is_initialized else 0
    start = before.clone() if isinstance(before, Tensor) else before  # which a static cache counts on in place
    carried = layer.is_initialized and not (isinstance(before, int) and before == 0)
    if carried and layout.restart is not None:
        _forget(layer, layout.restart[:, None].expand(-1, layer.keys.shape[2]))
    stored = layer.keys.dtype if layer.is_initialized else key.dtype  # a cache of another run's dtype keeps it
    slots = _slots(key.to(stored), value.to(stored), layout.padding(key.shape[1]))
    keys, values = (t.transpose(1, 2) for t in cache.update(*slots, layer_idx))
    return keys, values, start, carried


def _keep_last_document(layout: Layout, cache: Cache, layer_idx: int, start: Any) -> None:
    if layout.seq_idx is not None:
        layer = _layer(cache, layer_idx)
        _forget(layer, _documents(layout.seq_idx, start, layer.keys.shape[2]) != layout.seq_idx[:, -1:])


def _layer(cache: Cache, layer_idx: int) -> Any:
    layers = cache.layers
    if layer_idx >= len(layers) or type(layers[layer_idx]) not in (DynamicLayer, StaticLayer):
        found = type(layers[layer_idx]).__name__ if layer_idx < len(layers) else "nothing"
        raise ValueError(
            f"cache_params is a {type(cache).__name__} with {found} for the attention of block {layer_idx}; "
            "write DynamicCache(config=model.config), or leave cache_params out."
        )
    return layers[layer_idx]


def _slots(key: Tensor, value: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the cache stores of tokens (B, L, K, P), as (B, K, L, P): padding is empty, and nothing else is."""
    first = key[..., :1, :1]
    head = torch.where(first == 0, torch.finfo(key.dtype).tiny, first)
    key = torch.cat([torch.cat([head, key[..., :1, 1:]], -1), key[..., 1:, :]], -2)
    if padding is not None:
        key, value = (t.masked_fill(padding[..., None, None], 0.0) for t in (key, value))
    return key.transpose(1, 2), value.transpose(1, 2)


def _documents(seq_idx: Tensor, start: Any, slots: int) -> Tensor:
    """(B, S) the document of each slot: the carried one, 0, before `start`; the new tokens' after it."""
    index = torch.arange(slots, device=seq_idx.device) - start
    found = seq_idx.gather(1, index.clamp(0, seq_idx.shape[1] - 1).expand(len(seq_idx), -1))
    return found.masked_fill(index < 0, 0)


def _filled(keys: Tensor) -> Tensor:
    """(B, S) bool: the slots of keys (B, S, K, P) that hold a token."""
    return keys[:, :, 0, 0] != 0


def _visible(keys: Tensor, start: Any, length: int, layout: Layout) -> Tensor:
    """(B, L, S) bool: filled slots of the query's document up to its own, and each query's own."""
    visible = _filled(keys)[:, None]
    if length == 1 and layout.plain:
        return visible
    slot = torch.arange(keys.shape[1], device=keys.device)
    own = torch.arange(length, device=keys.device)[:, None] + start  # (L, 1)
    visible = visible & (slot <= own)
    if layout.seq_idx is not None:
        visible = visible & (layout.seq_idx[:, :, None] == _documents(layout.seq_idx, start, len(slot))[:, None])
    return visible | (slot == own)


def _forget(layer: Any, slots: Tensor) -> None:
    """Empty those (B, S) slots: in place in a static cache, whose addresses are fixed."""
    for name in ("keys", "values"):
        stored = getattr(layer, name)
        gone = slots[:, None, :, None]
        if isinstance(layer, StaticLayer):
            stored.masked_fill_(gone, 0.0)
        else:
            setattr(layer, name, stored.masked_fill(gone, 0.0))
