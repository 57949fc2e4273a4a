"""Small models of every family, and what a cache of theirs holds."""

import inspect

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from hf_mamba.family import Family
from hf_mamba.models.common.state import stored_states

# transformers' gated norm of some versions knows no groups: what is compared with such a one has a single group
GROUPS = 2 if "group_size" in inspect.signature(MambaRMSNormGated).parameters else 1
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 5, "pad_token_id": 0}
# A test that asks for `family`, `make` or `model` runs with each of these.
SIZES = {
    "mamba": {},
    "mamba2": {"num_heads": 6, "head_dim": 8, "n_groups": GROUPS, "tie_word_embeddings": True},
    "granitemoehybrid": {  # the last of a few layers is attention, the others are Mamba-2
        "num_attention_heads": 4, "num_key_value_heads": 2, "shared_intermediate_size": 20, "num_heads": 6,
        "mamba_d_head": 8, "mamba_n_groups": GROUPS, "tie_word_embeddings": True,
    },
}  # fmt: skip
FEWEST = {"granitemoehybrid": 2}  # layers of a model that has each kind of them; one elsewhere
WORDS = {
    "granitemoehybrid": {
        "state_size": "mamba_d_state", "conv_kernel": "mamba_d_conv", "expand": "mamba_expand",
        "use_bias": "mamba_proj_bias", "use_conv_bias": "mamba_conv_bias", "num_heads": "mamba_n_heads",
        "layer_norm_epsilon": "rms_norm_eps",
    },
}  # fmt: skip


def word(family: Family, name: str) -> str:
    """What a family's configuration calls a field of Mamba's."""
    return WORDS.get(family.model_type, {}).get(name, name)


def lively(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every weight off its initial value, so that no term of the model is invisible to a test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def carried(cache: Cache, row: int = 0) -> list[dict[str, torch.Tensor]]:
    """What each layer carries of a row, by name; of keys and values, the tokens that are still seen."""
    found = [{name: state[row] for name, state in stored_states(cache, i).items()} for i in range(len(cache.layers))]
    for states in found:
        if "keys" in states:
            filled = states["keys"][0, :, 0] != 0
            states |= {name: states[name][:, filled] for name in ("keys", "values")}
    return found


def addresses(cache: Cache) -> list[int]:
    """Where the tensors lie that a cache does not move: all but the keys and values of a dynamic one."""
    fixed = [layer for layer in cache.layers if not isinstance(layer, DynamicLayer)]
    lists = [value if isinstance(value, dict) else {0: value} for layer in fixed for value in vars(layer).values()]
    return [t.data_ptr() for values in lists for t in values.values() if isinstance(t, torch.Tensor)]
