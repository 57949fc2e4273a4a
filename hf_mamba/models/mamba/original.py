"""The two checkpoint formats: transformers' and the original one of state-spaces/mamba, as configurations and names.

Both hold the same tensors in the same layouts. Only the embedding's name differs (`backbone.embedding.weight` there,
`backbone.embeddings.weight` here), and the original always writes the tied `lm_head.weight` a second time.
The original's fields are those of mamba_ssm/models/config_mamba.py and mamba_ssm/modules/mamba_simple.py.
"""

import math
from collections.abc import Mapping
from typing import Any

from hf_mamba.family import Original

_REQUIRED = ("d_model", "n_layer", "vocab_size")
# Original keys that choose a kernel, not a model; `layer` is checked by itself.
_IGNORED = {"fused_add_norm"}
_IGNORED_SSM = {"use_fast_path", "layer"}
_PLAIN = {"residual_in_fp32": "residual_in_fp32", "tie_embeddings": "tie_word_embeddings"}
_SSM = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is one of the original format, and of no other family's layers."""
    ssm = config.get("ssm_cfg")
    other = isinstance(ssm, Mapping) and ssm.get("layer") == "Mamba2"
    return "model_type" not in config and not other and any(key in config for key in ("d_model", "n_layer", "ssm_cfg"))


def config_from_original(original: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """MambaConfig fields of an original configuration; nothing that names a size is defaulted.

    Raises:
        ValueError: naming every field that is missing, unknown, or that a Mamba-1 cannot express.
    """
    problems = [f"{key} is missing" for key in _REQUIRED if key not in original]
    known = {*_REQUIRED, *_PLAIN, *_IGNORED, "ssm_cfg", "rms_norm", "pad_vocab_size_multiple"}
    ssm = original.get("ssm_cfg") or {}
    if not isinstance(ssm, Mapping):
        problems.append(f"ssm_cfg is {ssm!r}, not a block {{...}}")
        ssm = {}
    layer = ssm.get("layer", "Mamba1")
    if layer != "Mamba1":
        problems.append(f"ssm_cfg.layer is {layer!r}: only Mamba1 can be loaded")
    if not original.get("rms_norm", True):
        problems.append("rms_norm is false: the norm of this model is always RMSNorm")
    # present and empty in newer files; anything in them is another architecture
    for key in ("d_intermediate", "attn_layer_idx", "attn_cfg"):
        if original.get(key):
            problems.append(f"{key} is {original[key]!r}: MLP and attention layers are not part of a Mamba-1")
        known.add(key)
    problems += [f"{key} is not a field of a Mamba-1 that can be expressed" for key in original if key not in known]
    problems += [
        f"ssm_cfg.{key} is not a field of a Mamba-1 that can be expressed"
        for key in ssm
        if key not in _SSM and key not in _IGNORED_SSM
    ]
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
    fields: dict[str, Any] = {
        "hidden_size": original["d_model"],
        "num_hidden_layers": original["n_layer"],
        "vocab_size": math.ceil(original["vocab_size"] / multiple) * multiple,
        "layer_norm_epsilon": 1e-5,
        "rescale_prenorm_residual": False,
    }
    fields |= {ours: original[theirs] for theirs, ours in _PLAIN.items() if theirs in original}
    fields |= {ours: ssm[theirs] for theirs, ours in _SSM.items() if theirs in ssm}
    return fields


def config_to_original(config: Any) -> dict[str, Any]:
    """The original configuration of a MambaConfig, with only fields that its loader takes.

    Raises:
        ValueError: naming every field that the original format cannot express.
    """
    problems = []
    if config.hidden_act not in ("silu", "swish"):
        problems.append(f"hidden_act is {config.hidden_act!r}: the original's is always silu")
    if config.layer_norm_epsilon != 1e-5:
        problems.append(f"layer_norm_epsilon is {config.layer_norm_epsilon}: the original's is always 1e-05")
    if config.intermediate_size % config.hidden_size:
        problems.append(
            f"intermediate_size is {config.intermediate_size}: the original takes a multiple of "
            f"hidden_size {config.hidden_size} only"
        )
    if problems:
        raise ValueError(f"this model cannot be written in the original state-spaces format: {'; '.join(problems)}.")
    rank = math.ceil(config.hidden_size / 16)
    found = {theirs: getattr(config, ours) for theirs, ours in _SSM.items()}
    found["expand"] = config.intermediate_size // config.hidden_size
    found["dt_rank"] = "auto" if config.time_step_rank == rank else config.time_step_rank
    defaults = {
        "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "dt_min": 0.001, "dt_max": 0.1, "dt_init": "random",
        "dt_scale": 1.0, "dt_init_floor": 1e-4, "conv_bias": True, "bias": False,
    }  # fmt: skip
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {key: value for key, value in found.items() if value != defaults[key]},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": math.gcd(config.vocab_size, 8),
        "tie_embeddings": config.tie_word_embeddings,
    }


_NAMES = {"backbone.embedding.weight": "backbone.embeddings.weight"}  # theirs -> transformers'
ORIGINAL = Original(is_original, config_from_original, config_to_original, _NAMES)
