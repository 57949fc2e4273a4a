"""The original format of state-spaces/mamba for Mamba-2, as configurations and names.

Its fields are those of mamba_ssm/models/config_mamba.py and mamba_ssm/modules/mamba2.py. Tensors are the same in the
same layouts; only the embedding's name differs, and a tied head is written a second time.
"""

import math
from collections.abc import Mapping
from typing import Any

from hf_mamba.family import Original
from hf_mamba.models.mamba2.table import UNLIMITED

# transformers would keep them as unused attributes and build a model of its default sizes instead
ORIGINAL_KEYS = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "ssm_cfg": "num_heads, head_dim, state_size, n_groups, conv_kernel, expand",
    "d_intermediate": "nothing: an MLP between the mixers is not a Mamba-2",
    "attn_layer_idx": "nothing: attention layers are not part of a Mamba-2",
    "rms_norm": "nothing: the norm is always RMSNorm",
    "tie_embeddings": "tie_word_embeddings",
    "pad_vocab_size_multiple": "a vocab_size that is rounded up already",
}
_REQUIRED = ("d_model", "n_layer", "vocab_size")
_PLAIN = {"residual_in_fp32": "residual_in_fp32", "tie_embeddings": "tie_word_embeddings"}
_EMPTY = ("d_intermediate", "attn_layer_idx", "attn_cfg")  # anything in them is another architecture
# ssm_cfg's field -> (transformers' field, the default of mamba2.py)
_SSM: dict[str, tuple[str, Any]] = {
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 1),
    "dt_min": ("time_step_min", 0.001),
    "dt_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
    "dt_limit": ("time_step_limit", UNLIMITED),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
    "chunk_size": ("chunk_size", 256),
}
# ssm_cfg's fields that change the model where they are not this, which is all that transformers' format can express
_FIXED: dict[str, tuple[Any, str]] = {
    "D_has_hdim": (False, "D has one number a head"),
    "rmsnorm": (True, "the gated norm is always there"),
    "norm_before_gate": (False, "the gate comes before the norm"),
    "d_ssm": (None, "all of the inner width is the state space's"),
}
# what chooses a kernel, or how new weights are drawn
_IGNORED_SSM = {"layer", "use_mem_eff_path", "A_init_range", "conv_init", "sequence_parallel"}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is one of the original format, with Mamba-2 layers."""
    ssm = config.get("ssm_cfg")
    return "model_type" not in config and isinstance(ssm, Mapping) and ssm.get("layer") == "Mamba2"


def config_from_original(original: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """Mamba2Config fields of an original configuration; nothing that names a size is defaulted.

    Raises:
        ValueError: naming every field that is missing, unknown, or that a Mamba-2 cannot express.
    """
    problems = [f"{key} is missing" for key in _REQUIRED if key not in original]
    ssm = original.get("ssm_cfg") or {}
    if ssm.get("layer") != "Mamba2":
        problems.append(f"ssm_cfg.layer is {ssm.get('layer')!r}: only Mamba2 is a Mamba-2")
    if not original.get("rms_norm", True):
        problems.append("rms_norm is false: the norm of this model is always RMSNorm")
    problems += [
        f"{key} is {original[key]!r}: MLP and attention layers are not part of a Mamba-2"
        for key in _EMPTY
        if original.get(key)
    ]
    problems += [
        f"ssm_cfg.{key} is {ssm[key]!r}: {why}"
        for key, (only, why) in _FIXED.items()
        if key in ssm and ssm[key] != only
    ]
    known = {*_REQUIRED, *_PLAIN, *_EMPTY, "ssm_cfg", "rms_norm", "pad_vocab_size_multiple", "fused_add_norm"}
    unknown = [key for key in original if key not in known]
    unknown += [f"ssm_cfg.{key}" for key in ssm if not (key in _SSM or key in _FIXED or key in _IGNORED_SSM)]
    problems += [f"{key} is not a field of a Mamba-2 that can be expressed" for key in unknown]
    multiple = original.get("pad_vocab_size_multiple", 8)
    problems += [
        f"{key} is {original[key]!r}, not a whole number of at least 1"
        for key in (*_REQUIRED, "pad_vocab_size_multiple")
        if key in original and (not isinstance(original[key], int) or original[key] < 1)
    ]
    if problems:
        raise ValueError(
            f"{where} is an original state-spaces configuration that cannot be used: {'; '.join(problems)}."
        )
    return {
        "hidden_size": original["d_model"],
        "num_hidden_layers": original["n_layer"],
        "vocab_size": math.ceil(original["vocab_size"] / multiple) * multiple,
        "num_heads": "auto",
        "layer_norm_epsilon": 1e-5,
        "rescale_prenorm_residual": False,
        **{ours: original.get(theirs, True) for theirs, ours in _PLAIN.items()},
        **{ours: ssm.get(theirs, default) for theirs, (ours, default) in _SSM.items()},
    }


def config_to_original(config: Any) -> dict[str, Any]:
    """The original configuration of a Mamba2Config, with only fields that its loader takes.

    Raises:
        ValueError: naming every field that the original format cannot express.
    """
    problems = []
    if config.hidden_act not in ("silu", "swish"):
        problems.append(f"hidden_act is {config.hidden_act!r}: the original's is always silu")
    if config.layer_norm_epsilon != 1e-5:
        problems.append(f"layer_norm_epsilon is {config.layer_norm_epsilon}: the original's is always 1e-05")
    if problems:
        raise ValueError(f"this model cannot be written in the original state-spaces format: {'; '.join(problems)}.")
    found = {theirs: (getattr(config, ours), default) for theirs, (ours, default) in _SSM.items()}
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": "Mamba2"} | {key: value for key, (value, default) in found.items() if value != default},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": math.gcd(config.vocab_size, 16),
        "tie_embeddings": config.tie_word_embeddings,
    }


_NAMES = {"backbone.embedding.weight": "backbone.embeddings.weight"}  # theirs -> transformers'
ORIGINAL = Original(is_original, config_from_original, config_to_original, _NAMES)
