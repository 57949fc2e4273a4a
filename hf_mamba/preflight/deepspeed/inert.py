"""Keys of a DeepSpeed file without any effect on a run of ours: left out, with one note for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_mamba.findings import Findings

LISTED = 12  # names in the note

_LOADER = "it acts on data loaders that DeepSpeed builds; Trainer builds its own"
_BF16 = "bf16 needs no loss scaling"
# key -> why it has no effect under Trainer
INERT: dict[str, str] = {
    "activation_checkpointing": "transformers models do not call DeepSpeed's; use --gradient_checkpointing",
    "steps_per_print": "accelerate overwrites it",
    "zero_allow_untested_optimizer": "Trainer sets it to true for its own optimizer",
    "data_parallel_size": "DeepSpeed derives it from the world size",
    "dataloader_drop_last": f"{_LOADER}, with full rows only",
    "inference": "it is for inference",
    "weight_quantization": "it is for inference",
    "expert_parallel": "this model has no experts",
    "use_data_before_expert_parallelism": "this model has no experts",
    "zero_optimization.legacy_stage1": "the old stage 1 is gone",
    "zero_optimization.elastic_checkpoint": "it no longer exists; --convert makes a checkpoint fit another world",
    "aio.thread_count": "it is called intra_op_parallelism now, which has a default",
    **{
        f"bf16.{key}": _BF16
        for key in (
            "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
            "min_loss_scale", "auto_cast", "loss_scale_growth_factor",
        )
    },
    "fp16.opt_level": "it belonged to Apex AMP, which is gone",
    "bf16.opt_level": "it belonged to Apex AMP, which is gone",
}  # fmt: skip

# Blocks that DeepSpeed leaves off unless "enabled" is true in them.
OFF_BY_DEFAULT = frozenset(
    {
        "autotuning", "compression_training", "curriculum_learning", "data_efficiency", "eigenvalue", "elasticity",
        "hybrid_engine", "nebula", "progressive_layer_drop", "quantize_training", "amp", "msamp", "datastates_ckpt",
    }
)  # fmt: skip

# Blocks whose unknown keys DeepSpeed ignores; in the others pydantic refuses them.
LENIENT = frozenset({"", "checkpoint", "checkpoint.parallel_write", "aio", "flops_profiler", "data_types", "timers"})

_COMMENTARY = ("_", "//", "#", "/*")
_WORDS = frozenset({"comment", "comments", "note", "notes", "description", "doc", "help", "todo", "$schema", "schema"})


def is_commentary(key: str) -> bool:
    """Whether a key is a remark for people."""
    return key.startswith(_COMMENTARY) or key.lower().strip(" -:") in _WORDS


def is_off(value: Any, key: str = "") -> bool:
    """Whether a block or flag is plainly switched off: false, null, 0, {} or {"enabled": false}."""
    if isinstance(value, Mapping):
        if key in OFF_BY_DEFAULT:
            return not _enabled(value)
        return not value or ("enabled" in value and value["enabled"] in (False, None, "false", "False"))
    return value in (False, None, 0, "false", "False") or value == []


def _enabled(block: Mapping[str, Any]) -> bool:
    """Whether "enabled" is true anywhere in a block."""
    if block.get("enabled") in (False, None, "false", "False"):
        return any(_enabled(value) for value in block.values() if isinstance(value, Mapping))
    return True


def leave_out(out: Findings, path: str, why: str) -> None:
    """Remember a key that DeepSpeed does not get, and why; `say_left_out` tells all of them together."""
    out.provenance[f"left out of ds_config: {path}"] = why


def say_left_out(out: Findings) -> None:
    """Add the one note about every key that was left out."""
    prefix = "left out of ds_config: "
    keys = [key.removeprefix(prefix) for key in out.provenance if key.startswith(prefix)]
    if keys:
        more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
        listed = ", ".join(keys[:LISTED])
        out.note(f"Without effect on this run, and left out: {listed}{more} (--provenance says why of each).")
