"""The arguments that make TrainingArguments exactly this run."""

from __future__ import annotations

import copy
import os
from typing import Any

from hf_mamba.findings import Findings
from hf_mamba.preflight.arguments import OURS, TRAINER_DEFAULTS
from hf_mamba.preflight.batch import Batch
from hf_mamba.preflight.schedule import Steps
from hf_mamba.preflight.settings import Settings
from hf_mamba.preflight.trackers import wanted_trackers
from hf_mamba.preflight.world import World

# Of TrainingArguments, what the pre-flight has turned into others.
DECIDED = frozenset(
    {"num_train_epochs", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_token"}
)


def output_dir(settings: Settings) -> str:
    """Where the run's files go, with ~ meaning the home folder, in a YAML file, too."""
    default = f"runs/{settings.preset.name if settings.preset else 'mamba'}"
    return os.path.expanduser(settings.get("output_dir") or default)


def trainer_arguments(
    settings: Settings,
    world: World,
    batch: Batch | None,
    dtype: str,
    steps: Steps,
    ds_config: dict[str, Any] | None,
    out: Findings,
) -> dict[str, Any]:
    """Keyword arguments for transformers.TrainingArguments, every decided number in its place."""
    arguments = {name: own.value for name, own in settings.items() if name not in OURS | DECIDED}
    if settings.get("output_dir") is None:
        out.provenance["output_dir"] = "default"
    kind, scheduler_arguments = steps.scheduler
    arguments |= {
        "output_dir": output_dir(settings),
        "per_device_train_batch_size": batch.micro if batch else None,
        "gradient_accumulation_steps": batch.accumulation if batch else None,
        "max_steps": steps.total,
        "warmup_steps": steps.warmup,
        "lr_scheduler_type": kind,
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
        "use_cpu": world.device == "cpu",
        "deepspeed": copy.deepcopy(ds_config),
    }
    if not arguments.get("gradient_checkpointing"):
        arguments.pop("gradient_checkpointing", None)  # even False brings a warning that the name will change
    if "trackio" in wanted_trackers(settings):  # whose Spaces would be public
        arguments["hub_private_repo"] = settings.get("hub_private_repo") is not False
    if scheduler_arguments:
        arguments["lr_scheduler_kwargs"] = scheduler_arguments
    return {name: value for name, value in arguments.items() if value is not None or name in TRAINER_DEFAULTS}
