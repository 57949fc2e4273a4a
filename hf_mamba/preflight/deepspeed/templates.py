"""DeepSpeed files by name: `--deepspeed zero3` is ds_configs/zero3.json, without the file."""

from __future__ import annotations

import copy
from typing import Any

_SHARDS: dict[str, Any] = {"reduce_bucket_size": "auto", "contiguous_gradients": True, "overlap_comm": True}
_WHOLE: dict[str, Any] = {
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_gather_16bit_weights_on_model_save": "auto",
}
_HOST = {"device": "cpu", "pin_memory": True}
_ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1, **_SHARDS},
    "zero2": {"stage": 2, **_SHARDS},
    "zero2_offload": {"stage": 2, **_SHARDS, "offload_optimizer": _HOST},
    "zero3": {"stage": 3, **_SHARDS, **_WHOLE},
    "zero3_offload": {"stage": 3, **_SHARDS, **_WHOLE, "offload_optimizer": _HOST, "offload_param": _HOST},
}
TEMPLATES = tuple(_ZERO)


def template(name: str) -> dict[str, Any]:
    """The configuration of a name of TEMPLATES, every number "auto"."""
    decided = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    switches = {dtype: {"enabled": "auto"} for dtype in ("bf16", "fp16")}
    return copy.deepcopy({**dict.fromkeys(decided, "auto"), **switches, "zero_optimization": _ZERO[name]})
