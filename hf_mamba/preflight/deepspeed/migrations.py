"""Deprecated, renamed, moved, removed and unusable DeepSpeed keys, one row each, and the function that applies them.

Sources are files of the deepspeed package; "docs" is a form of older DeepSpeed documentation or releases that the
installed release ignores or refuses. tests/preflight/test_tables.py holds the rows
against the installed release: a new deprecation or removal fails there until it has a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hf_mamba.dotted import get, pop, put
from hf_mamba.findings import Findings
from hf_mamba.preflight.deepspeed.inert import is_off, leave_out
from hf_mamba.preflight.kinds import show


class Row(NamedTuple):
    """One legacy key. `action` says what happens to it:

    move     the value goes to `new` as it is
    offload  true becomes `new: {"device": "cpu"}`, false is dropped
    pin      the value becomes `pin_memory` of each offload block that is there
    stage    true / false becomes `new: {"stage": 1 / 0}`
    fp32     true becomes `new: "fp32"`, false is dropped
    removed  dropped where it is switched off, refused where it is on
    """

    old: str
    action: str
    new: str
    why: str
    source: str

    @property
    def id(self) -> str:
        """The row's name: the action and the key."""
        return f"{self.action}-{self.old}".replace("_", "-").replace(".", "-")


_ZERO = "runtime/zero/config.py"
_CONFIG = "runtime/config.py"
_OPTIMIZER, _PARAM = "zero_optimization.offload_optimizer", "zero_optimization.offload_param"

# In the order in which they are applied: a key that moves into a block is then seen by that block's own rows.
MIGRATIONS: tuple[Row, ...] = (
    Row("zero_optimization", "stage", "zero_optimization", "true / false is the form of 2019", _ZERO),
    Row("allgather_size", "move", "zero_optimization.allgather_bucket_size", "renamed", _ZERO),
    Row("cpu_offload", "move", "zero_optimization.cpu_offload", "DeepSpeed ignores it at the top level", "docs"),
    Row("cpu_offload_params", "move", "zero_optimization.cpu_offload_param", "ignored at the top level", "docs"),
    Row("cpu_offload_param", "move", "zero_optimization.cpu_offload_param", "ignored at the top level", "docs"),
    Row("cpu_offload_use_pin_memory", "move", "zero_optimization.cpu_offload_use_pin_memory", "ignored there", "docs"),
    Row("offload_optimizer", "move", _OPTIMIZER, "DeepSpeed ignores it at the top level", _CONFIG),
    Row("offload_param", "move", _PARAM, "DeepSpeed ignores it at the top level", _CONFIG),
    Row("zero_optimization.cpu_offload_params", "move", "zero_optimization.cpu_offload_param", "renamed", "docs"),
    Row("zero_optimization.cpu_offload", "offload", _OPTIMIZER, "deprecated; crashes under Trainer's optimizer", _ZERO),
    Row("zero_optimization.cpu_offload_param", "offload", _PARAM, "deprecated", _ZERO),
    Row("zero_optimization.cpu_offload_use_pin_memory", "pin", "pin_memory", "deprecated; its value is lost", _ZERO),
    Row(
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
        "move",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "deprecated",
        _ZERO,
    ),
    *(
        Row(f"zero_optimization.{name}", "move", f"zero_optimization.stage3_{name}", "the documented name", _ZERO)
        for name in (
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
        )
    ),
    Row("bfloat16", "move", "bf16", "renamed; accelerate overrides the old name without a word", _CONFIG),
    Row("bf16.check_overflow", "move", "bf16.check_grad_overflow", "renamed", "runtime/constants.py"),
    Row("fp32_allreduce", "fp32", "communication_data_type", "replaced", "docs"),
    Row("allreduce_always_fp32", "fp32", "communication_data_type", "replaced", "docs"),
    Row("optimizer.params.max_grad_norm", "move", "gradient_clipping", "clipping is not the optimizer's", _CONFIG),
    Row("nebula", "removed", "", "Nebula checkpointing has been removed", _CONFIG),
    Row("compression_training", "removed", "", "the compression library has been removed", _CONFIG),
    Row("amp", "removed", "", "Apex AMP has been removed: use bf16, fp16 or torch_autocast", _CONFIG),
    Row("quantize_training", "removed", "", "Mixture-of-Quantization has been removed", _CONFIG),
    Row("sparse_gradients", "removed", "", "sparse embedding gradients have been removed", _CONFIG),
    Row("eigenvalue", "removed", "", "eigenvalue-based quantization has been removed", _CONFIG),
    Row("sparse_attention", "removed", "", "sparse attention has been removed; Mamba has no attention", _CONFIG),
    Row("elasticity", "removed", "", "elastic training has been removed: give the batch sizes", _CONFIG),
    Row("graph_harvesting", "removed", "", "graph harvesting has been removed", _CONFIG),
    Row("curriculum_learning", "removed", "", "the top-level curriculum has been removed", _CONFIG),
    Row("progressive_layer_drop", "removed", "", "progressive layer dropping has been removed", _CONFIG),
    Row("zero_optimization.mics_shard_size", "removed", "", "MiCS sharding has been removed", _CONFIG),
    Row("zero_optimization.mics_hierarchical_params_gather", "removed", "", "MiCS sharding has been removed", _CONFIG),
    Row("zero_optimization.zeropp_loco_param", "removed", "", "LoCo-ZeRO++ has been removed", _CONFIG),
)

# Blocks that DeepSpeed knows and that cannot do under Trainer what they say: (reason, what to write instead).
# Switched off ("enabled": false), they are dropped.
REFUSED: dict[str, tuple[str, str]] = {
    "data_efficiency": (
        "It acts on data loaders that DeepSpeed builds; Trainer builds its own, so nothing would happen.",
        "Remove the block.",
    ),
    "pipeline": ("Pipeline parallelism needs a PipelineModule, which this model is not.", "Remove the block."),
    "hybrid_engine": ("It is the RLHF generation engine; it has no part in pretraining.", "Remove the block."),
    "autotuning": (
        "It is read by the `deepspeed` launcher only; under accelerate nothing would be tuned.",
        "Remove the block; `hf-mamba memory` finds the micro-batch.",
    ),
    "datastates_ckpt": (
        "It needs the DataStates engine, and Trainer's own files would not be part of its snapshots.",
        "Remove the block.",
    ),
    "msamp": ("MS-AMP (FP8) kernels do not cover Mamba's scan.", "Remove the block; use bf16."),
}

_MISSING = object()


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any] | None:
    """Two blocks as one; None where a key has two values. Any value agrees with "auto"."""
    both = {**first, **second}
    for key in first.keys() & second.keys():
        if first[key] != second[key] and "auto" not in (first[key], second[key]):
            return None
        both[key] = first[key] if second[key] == "auto" else second[key]
    return both


def _move(config: dict[str, Any], row: Row, value: Any, out: Findings) -> None:
    present = get(config, row.new, _MISSING)
    if isinstance(present, dict) and isinstance(value, dict) and (both := _merged(value, present)) is not None:
        value = present = both
    if present is not _MISSING and present != value and present != "auto":
        out.problem(
            f"{row.old}",
            f"{row.old}: {show(value)} and {row.new}: {show(present)}",
            "Both names mean the same thing, and the values differ.",
            f"Keep {row.new} only.",
            id="legacy-key-contradicts",
        )
    elif not put(config, row.new, value):
        out.problem(
            row.old,
            show(value),
            f"It belongs at {row.new}, whose block is not a block.",
            "Repair the block.",
            id="legacy-block-missing",
        )
    else:
        out.migrated(row.old, row.new, row.why, id=row.id)


def _offload(config: dict[str, Any], row: Row, value: Any, out: Findings) -> None:
    if is_off(value):
        out.migrated(f"{row.old}: {show(value)}", "(dropped)", f"{row.why}; it was switched off", id=row.id)
    elif value not in (True, "true", "True"):
        out.problem(
            row.old,
            show(value),
            "It is a deprecated switch.",
            f'Write "{row.new.rpartition(".")[2]}": {{"device": "cpu"}}.',
            id="legacy-switch-of-another-kind",
        )
    elif (device := get(config, f"{row.new}.device", _MISSING)) not in (_MISSING, "cpu", "auto"):
        out.problem(
            row.old,
            f"{row.old}: true and {row.new}.device: {show(device)}",
            "The old key asks for the CPU, the new one for something else.",
            f"Keep {row.new} only.",
            id="legacy-key-contradicts",
        )
    elif put(config, f"{row.new}.device", "cpu"):
        out.migrated(f"{row.old}: true", f'{row.new}: {{"device": "cpu"}}', row.why, id=row.id)
    else:
        out.problem(
            row.old,
            show(value),
            f"{row.new} is there too, and is not a block.",
            f"Keep {row.new} only.",
            id="legacy-block-missing",
        )


def _pin(config: dict[str, Any], row: Row, value: Any, out: Findings) -> None:
    blocks = [b for b in (_OPTIMIZER, _PARAM) if get(config, f"{b}.device", "none") != "none"]
    for block in blocks:
        if get(config, f"{block}.pin_memory") is None:
            put(config, f"{block}.pin_memory", value)
    new = ", ".join(f"{b}.pin_memory" for b in blocks) or "(dropped)"
    out.migrated(row.old, new, row.why if blocks else "deprecated; nothing is offloaded", id=row.id)


def _stage(config: dict[str, Any], row: Row, value: Any, out: Findings) -> None:
    if isinstance(value, bool):
        config[row.new] = {"stage": int(value)}
        out.migrated(f"{row.old}: {show(value)}", f'{row.new}: {{"stage": {int(value)}}}', row.why, id=row.id)
    else:
        config[row.old] = value  # a block already: nothing to migrate


def _fp32(config: dict[str, Any], row: Row, value: Any, out: Findings) -> None:
    if is_off(value):
        out.migrated(f"{row.old}: {show(value)}", "(dropped)", f"{row.why}; it was switched off", id=row.id)
    else:
        _move(config, row, "fp32", out)


def _removed(config: dict[str, Any], row: Row, value: Any, out: Findings) -> None:
    if is_off(value, row.old):
        leave_out(out, row.old, f"{row.why}; it was switched off")
    else:
        out.problem(row.old, show(value), f"{row.why[0].upper()}{row.why[1:]}.", "Remove it.", id=row.id)


_ACTIONS: dict[str, Callable[[dict[str, Any], Row, Any, Findings], None]] = {
    "move": _move,
    "offload": _offload,
    "pin": _pin,
    "stage": _stage,
    "fp32": _fp32,
    "removed": _removed,
}


def migrate(config: dict[str, Any], out: Findings) -> dict[str, Any]:
    """Apply every row to `config` (changed in place and returned): what could be kept has moved, the rest is named."""
    for row in MIGRATIONS:
        if get(config, row.old, _MISSING) is not _MISSING:
            _ACTIONS[row.action](config, row, pop(config, row.old), out)
    for key, (why, fix) in REFUSED.items():
        if key in config:
            value = config.pop(key)
            if is_off(value, key):
                leave_out(out, key, "it was switched off")
            else:
                out.problem(key, show(value), why, fix, id=f"refused-{key.replace('_', '-')}")
    return config
