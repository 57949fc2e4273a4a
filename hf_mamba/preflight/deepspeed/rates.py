"""The `scheduler` block of a DeepSpeed file: the same learning rates, step for step, without DeepSpeed's classes.

DeepSpeed steps its schedule after the update, from -1: update k (from 0) is made at the rate of iteration k - 1, and
the first two at the lowest (deepspeed/runtime/lr_schedules.py, engine.py). tests/preflight/test_deepspeed_rates.py
compares `factor` with those classes over whole runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from hf_mamba.findings import Findings
from hf_mamba.preflight.deepspeed.inert import is_off, leave_out
from hf_mamba.preflight.deepspeed.taking import check_block, number, take
from hf_mamba.preflight.kinds import Amount, Count, Kind, Share, Whole, show
from hf_mamba.preflight.settings import Settings

DEFAULT_PEAK = 0.001  # of WarmupDecayLR, where the block has no warmup_max_lr
DEFAULT_WARMUP = 1000

# parameter -> (type, DeepSpeed's default); None: filled from the run
_WARMUP: dict[str, tuple[Kind, Any]] = {
    "warmup_min_lr": (Amount, 0.0),
    "warmup_max_lr": (Amount, None),
    "warmup_num_steps": (Whole, None),
    "warmup_type": (str, "log"),
}
SCHEDULES: dict[str, dict[str, tuple[Kind, Any]]] = {
    "WarmupLR": _WARMUP,
    "WarmupDecayLR": {**_WARMUP, "total_num_steps": (Count, None)},
    "WarmupCosineLR": {
        "warmup_min_ratio": (Share, 0.0),
        "cos_min_ratio": (Share, 0.0001),
        "warmup_num_steps": (Whole, None),
        "warmup_type": (str, "log"),
        "total_num_steps": (Count, None),
    },
}
# what Trainer and the report call the same shape
STOCK = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_NEAREST = {
    "OneCycle": '"WarmupCosineLR", or remove the block and use --lr_scheduler_type cosine',
    "LRRangeTest": '"WarmupLR"; a range test is a series of short runs with other --learning_rate',
}


class Block(NamedTuple):
    """A scheduler block whose numbers are read; "auto" is left for when the steps are known."""

    kind: str
    params: dict[str, Any]
    where: str


def take_scheduler(config: dict[str, Any], name: str, settings: Settings, out: Findings) -> Block | None:
    """Take the block out of `config`; its numbers become arguments where nobody wrote these."""
    written = config.pop("scheduler", None)
    if written is None or (is_off(written) and not (isinstance(written, Mapping) and "type" in written)):
        if written is not None:
            leave_out(out, "scheduler", "it is empty")
        return None
    kind = written.get("type") if isinstance(written, Mapping) else None
    if not isinstance(kind, str) or kind not in SCHEDULES:
        near = _NEAREST.get(str(kind), "one of " + ", ".join(f'"{known}"' for known in SCHEDULES))
        why = (
            "No schedule of transformers has this shape."
            if str(kind) in _NEAREST
            else "DeepSpeed has no such schedule."
        )
        out.problem("scheduler.type", show(kind), why, f"Write {near}.", id="unknown-scheduler")
        return None
    check_block("scheduler", written, out)
    for flag in ("lr_scheduler_type", "lr_scheduler_kwargs", "min_lr", "decay_ratio"):
        if settings.given(flag):
            out.problem(
                flag,
                f"{settings.get(flag)} ({settings.source(flag)}) and a scheduler block in {name}",
                "The schedule is written in two places.",
                f"Remove the scheduler block from {name}, or --{flag}.",
                id="schedule-written-twice",
            )
    params = _read(kind, written.get("params", {}), out)
    _peak(kind, params, name, settings, out)
    if isinstance(steps := params.get("total_num_steps"), int) and not _bounded(settings):
        take(settings, "max_steps", steps, "scheduler.params.total_num_steps", name, out)
    settings.adopt("lr_scheduler_type", STOCK[kind], f"scheduler in {name}")
    return Block(kind, params, name)


def _bounded(settings: Settings) -> bool:
    return settings.given("max_steps") or settings.given("max_tokens")


def _read(kind: str, written: Any, out: Findings) -> dict[str, Any]:
    """The block's parameters in canonical form; a list with one rate for all groups counts as that rate."""
    params: dict[str, Any] = {}
    if not isinstance(written, Mapping):
        out.problem("scheduler.params", show(written), "It is no block.", "Write a block {...}.", id="params-no-block")
        return params
    for key, value in written.items():
        path = f"scheduler.params.{key}"
        if key == "last_batch_iteration":
            leave_out(out, path, "a resumed run continues its schedule by itself")
        elif key not in SCHEDULES[kind]:
            known = ", ".join(SCHEDULES[kind])
            out.problem(path, show(value), f"{kind} has no such parameter.", f"It has {known}.", id="unknown-parameter")
        elif value == "auto":
            params[key] = value
        else:
            if isinstance(value, list) and value and all(item == value[0] for item in value):
                value = value[0]
            if (read := number(SCHEDULES[kind][key][0], value, path, out)) is not None:
                params[key] = read
    return params


def _peak(kind: str, params: dict[str, Any], name: str, settings: Settings, out: Findings) -> None:
    """The block's highest rate is the run's learning rate."""
    path, peak = "scheduler.params.warmup_max_lr", params.get("warmup_max_lr")
    if isinstance(peak, int | float):
        take(settings, "learning_rate", float(peak), path, name, out)
    elif kind == "WarmupDecayLR" and peak is None:
        if settings.is_flag("learning_rate"):
            out.note(f"{path} is not in {name}: the learning rate is taken (DeepSpeed would rise to {DEFAULT_PEAK}).")
        else:
            settings.adopt("learning_rate", DEFAULT_PEAK, f"DeepSpeed's default of {path}")
            out.note(f"{path} is not in {name}: DeepSpeed's default is the learning rate, {DEFAULT_PEAK}.")


def decide_rates(block: Block, warmup: int | None, total: int, settings: Settings, out: Findings) -> dict[str, Any]:
    """The block with every number known; `warmup` is what the arguments say, where the block leaves it to them."""
    params = dict(block.params)
    wanted = params.get("warmup_num_steps")
    by_flag = any(settings.given(name) for name in ("warmup_steps", "warmup_ratio", "warmup_tokens"))
    if wanted is None and not by_flag:
        wanted = DEFAULT_WARMUP
        out.note(f"scheduler.params.warmup_num_steps is not in {block.where}: DeepSpeed's default, {wanted}, is taken.")
    if isinstance(wanted, int):
        if by_flag and warmup != wanted:
            _differ("warmup_num_steps", wanted, f"a warm-up of {warmup} steps", block.where, out)
        elif wanted >= total > 1:
            out.note(f"The rate still rises when the run ends: a warm-up of {wanted} of {total} steps ({block.where}).")
        warmup = wanted
        out.provenance["warmup_steps"] = f"scheduler.params.warmup_num_steps in {block.where}"
    if warmup == 0 and (by_flag or wanted == 0):
        zero = "warmup_steps" if by_flag else "scheduler.params.warmup_num_steps"
        out.note(f"{zero} of 0 becomes 2: a {block.kind} always rises over two updates ({block.where}).")
    params["warmup_num_steps"] = max(1, warmup or 0)
    if "total_num_steps" in SCHEDULES[block.kind]:
        if params.get("total_num_steps") not in (None, "auto", total):
            _differ("total_num_steps", params["total_num_steps"], f"a run of {total} steps", block.where, out)
        params["total_num_steps"] = total
    for key, (_, default) in SCHEDULES[block.kind].items():
        if params.get(key) in (None, "auto"):
            params[key] = settings.get("learning_rate", 0.0) if key == "warmup_max_lr" else default
    return {"type": block.kind, "params": params}


def _differ(key: str, value: Any, other: str, where: str, out: Findings) -> None:
    out.problem(
        f"scheduler.params.{key}",
        f"{value} in {where}, and {other}",
        "Trainer refuses a schedule of another length.",
        f'Write "{key}": "auto".',
        id="schedule-of-another-length",
    )


def factor(rates: Mapping[str, Any], step: int) -> float:
    """The share of the learning rate at which update `step` (from 0) is made."""
    params, iteration = rates["params"], step - 1
    warmup = max(2, params["warmup_num_steps"])
    rising = (
        iteration / warmup if params["warmup_type"] == "linear" else math.log(max(iteration, 0) + 1) / math.log(warmup)
    )
    if rates["type"] == "WarmupCosineLR":
        return _cosine(params, iteration, warmup, rising)
    low, peak = params["warmup_min_lr"], params["warmup_max_lr"]
    if iteration < 0:
        share = 0.0
    elif iteration < warmup:
        share = rising
    elif rates["type"] == "WarmupLR":
        share = 1.0
    else:
        total = params["total_num_steps"]
        share = max(0.0, (total - iteration) / max(1.0, total - warmup))
    return float((low + (peak - low) * share) / peak) if peak else 0.0


def _cosine(params: Mapping[str, Any], iteration: int, warmup: int, rising: float) -> float:
    if iteration < 0:
        return 0.0
    if iteration < warmup:
        return float(params["warmup_min_ratio"] + (1.0 - params["warmup_min_ratio"]) * rising)
    progress = min(1.0, (iteration - warmup + 1) / max(1, params["total_num_steps"] - warmup))
    lowest = params["cos_min_ratio"]
    return float(max(0.0, lowest + (1.0 - lowest) * (1 + math.cos(math.pi * progress)) / 2))
