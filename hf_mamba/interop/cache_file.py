"""The state of a conversation or a long prompt as a file.

A Mamba's whole past is its state, so `past_key_values` of any length is one small safetensors file:
`layers.{i}.conv` (B, E, k), where the family has a convolution, and `layers.{i}.ssm` (B, E, N), with the geometry they
belong to. A layer with attention has `layers.{i}.keys` and `.values` (B, K, S, P) of its S earlier tokens.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from hf_mamba.family import family_of
from hf_mamba.files import write_whole
from hf_mamba.models.common.state import STORED, has_state, restore_states, stored_states

_FORMAT = "hf_mamba state 1"


def save_cache(cache: Cache, path: str | Path, config: PreTrainedConfig) -> None:
    """Write the state to a file; an existing one is replaced as a whole.

    Args:
        cache: `cache_params` of a forward, or `past_key_values` of `generate`.
        config: the model's configuration.

    Raises:
        ValueError: for a cache that no tokens have passed.
    """
    if not has_state(cache):
        raise ValueError("the cache is empty: run a prompt through the model with use_cache=True first.")
    tensors: dict[str, torch.Tensor] = {}
    for i in range(config.num_hidden_layers):
        stored = stored_states(cache, i)
        tensors |= {f"layers.{i}.{name}": state.detach().contiguous() for name, state in stored.items()}
    geometry = json.dumps({name: getattr(config, name) for name in family_of(config).state_sizes})
    write_whole(Path(path), save(tensors, metadata={"format": _FORMAT, "geometry": geometry}))


def load_cache(path: str | Path, config: PreTrainedConfig, device: torch.device | str = "cpu") -> Cache:
    """Read a state that `save_cache` wrote, to be given as `cache_params`.

    Raises:
        ValueError: where the file is damaged, is something else, or belongs to a model of another geometry.
    """
    try:
        opened = safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a saved state: {error}") from None
    metadata: dict[str, Any] = opened.metadata() or {}
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a state saved by hf_mamba.")
    theirs = json.loads(metadata["geometry"])
    differing = [
        f"{n} {theirs.get(n)} (the model: {getattr(config, n)})"
        for n in family_of(config).state_sizes
        if theirs.get(n) != getattr(config, n)
    ]
    if differing:
        raise ValueError(f"{path} holds the state of another model: {', '.join(differing)}.")
    cache = DynamicCache(config=config)
    present = set(opened.keys())
    for i in range(config.num_hidden_layers):
        names = {name: f"layers.{i}.{name}" for name in STORED if f"layers.{i}.{name}" in present}
        if not ({"ssm"} <= names.keys() or {"keys", "values"} <= names.keys()):
            raise ValueError(f"{path} is damaged: block {i} has {', '.join(names) or 'nothing'}. Save the cache again.")
        restore_states(cache, i, {name: opened.get_tensor(key) for name, key in names.items()})
    return cache
