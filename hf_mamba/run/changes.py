"""What changed in the settings of an update since the checkpoint that a run continues from.

An update is a function of the plan and its step. The optimizer's and the scheduler's files hold the settings of the run
that wrote them, too; training/optimizers.py puts the plan's in their place. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_mamba.files import json_or_none
from hf_mamba.findings import Findings, Migration
from hf_mamba.names import PLAN_FILE
from hf_mamba.run.manifest import DamagedError, read_manifest

# Of the plan's TrainingArguments and of the plan itself, what decides an update.
_ARGUMENTS = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "optim_args",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps",
)  # fmt: skip
_FIELDS = ("rates", "z_loss", "dtype")
HISTORIC = ("reduce_lr_on_plateau", "greedy")  # schedules whose rate follows the losses that were, not the step


def update_settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide an update, JSON-ready, from a plan's fields by name."""
    arguments = plan.get("training_arguments") or {}
    found = {name: arguments.get(name) for name in _ARGUMENTS} | {name: plan.get(name) for name in _FIELDS}
    return json.loads(json.dumps(found, default=str))  # as it will be read back


def settings_before(checkpoint: Path) -> tuple[int, dict[str, Any]] | None:
    """(the checkpoint's step, the settings it was trained with); None where they are not known.

    A checkpoint of an earlier version holds none: its run's plan.json, which is of the last start, stands in.
    """
    try:
        manifest = read_manifest(checkpoint)
    except DamagedError:
        return None
    if settings := manifest.run.get("settings"):
        return manifest.step, settings
    plan = json_or_none(checkpoint.parent / PLAN_FILE)
    return (manifest.step, update_settings(plan)) if isinstance(plan, Mapping) else None


def note_changes(checkpoint: Path, plan: Mapping[str, Any], out: Findings) -> None:
    """Name every setting of an update that changes at this resume, and those that cannot."""
    if (before := settings_before(checkpoint)) is None:
        return
    step, old = before
    new = update_settings(plan)
    for name, was, now in _differing(old, new):
        out.migrations.append(
            Migration(f"{name} {_show(was)}", _show(now), f"from step {step + 1} on", id="changed-at-resume")
        )
    start_anew = f"start from its weights alone: --model_name_or_path {checkpoint}."
    if old["optim"] != new["optim"]:
        out.problem(
            "optim",
            f"{new['optim']}, and {old['optim']} in {checkpoint}",
            "Another optimizer cannot read this one's state.",
            f"Write --optim {old['optim']}, or {start_anew}",
            id="checkpoint-of-another-optimizer",
        )
    kinds = {old["lr_scheduler_type"], new["lr_scheduler_type"]}
    historic = next((kind for kind in HISTORIC if kind in kinds), None)
    of_rate = ("lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate")
    if historic and any(old[name] != new[name] for name in of_rate):
        out.problem(
            "lr_scheduler_type",
            f"{new['lr_scheduler_type']} at {_show(new['learning_rate'])}, and {old['lr_scheduler_type']} at "
            f"{_show(old['learning_rate'])} in {checkpoint}",
            f"The rate of {historic} follows the losses that were, so that no other can be put in its place.",
            f"Write the same schedule and learning rate, or {start_anew}",
            id="schedule-of-the-losses-changed",
        )


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, old, new) of each value that differs; blocks by their keys."""
    for name in {**old, **new}:
        was, now = old.get(name), new.get(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _differing(was, now, f"{prefix}{name}.")
        elif was != now:
            yield prefix + name, was, now


def _show(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
