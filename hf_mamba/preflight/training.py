"""The arguments that make TrainingArguments exactly this run."""

from __future__ import annotations

import copy
import os
from typing import Any

from hf_mamba.findings import Findings
from hf_mamba.preflight.batch import Batch
from hf_mamba.preflight.schedule import Steps
from hf_mamba.preflight.settings import DEFAULTS, Settings
from hf_mamba.preflight.trackers import wanted_trackers
from hf_mamba.preflight.world import World

# Arguments that are ours, or that the pre-flight has turned into others: TrainingArguments does not take them.
OURS = frozenset(
    {
        "preset", "config", "model_name_or_path", "model_config", "tokenizer_name", "dataset", "text_column",
        "eval_fraction", "vocab_size", "seq_len", "micro_batch_size", "global_batch_size", "global_batch_tokens",
        "streaming", "max_tokens", "num_gpus", "num_nodes", "dry_run", "resume", "sample_prompt", "max_bad_steps",
        "spike_sigma", "rewind", "min_lr", "decay_ratio", "z_loss",
        "warmup_ratio", "warmup_tokens", "num_train_epochs", "gpu_memory",
        "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_token",
    }
)  # fmt: skip


def output_dir(settings: Settings) -> str:
    """Where the run's files go, with ~ meaning the home folder, in a YAML file, too."""
    default = f"runs/{settings.preset.name if settings.preset else 'mamba'}"
    return os.path.expanduser(settings.get("output_dir") or default)


def training_arguments(
    settings: Settings,
    world: World,
    batch: Batch | None,
    dtype: str,
    steps: Steps,
    ds_config: dict[str, Any] | None,
    out: Findings,
) -> dict[str, Any]:
    """Keyword arguments for transformers.TrainingArguments, every decided number in its place."""
    arguments = {name: value for name, value in settings.values.items() if name not in OURS}
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
    return {name: value for name, value in arguments.items() if value is not None or name in DEFAULTS}
