"""What others take from the arguments: the data, the run's folder, the Hub's repository, and TrainingArguments."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_mamba.data.sources import EMBEDDED, parse_sources
from hf_mamba.family import family_of
from hf_mamba.files import json_or_none
from hf_mamba.findings import Findings
from hf_mamba.names import PLAN_FILE
from hf_mamba.plan import CardPlan, DataPlan, HubPlan, RunPlan
from hf_mamba.preflight.arguments import IDENTITY, OURS, TRAINER_DEFAULTS
from hf_mamba.preflight.batch import Batch
from hf_mamba.preflight.data import recorded_data
from hf_mamba.preflight.schedule import Steps
from hf_mamba.preflight.settings import Settings, resume_of
from hf_mamba.preflight.trackers import wanted_trackers
from hf_mamba.preflight.world import World
from hf_mamba.run.owner import trained

_SHORT = 100  # steps of a run that is looked at once
# Of TrainingArguments, what the pre-flight has turned into others.
DECIDED = frozenset(
    {"num_train_epochs", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_token"}
)


def output_dir(settings: Settings) -> str:
    """Where the run's files go, with ~ meaning the home folder, in a YAML file, too."""
    preset = settings.preset if settings.get("config_overrides") is None else None
    default = f"runs/{preset.name if preset else 'mamba'}"
    return os.path.expanduser(settings.get("output_dir") or default)


def run_before(settings: Settings) -> Path | None:
    """The folder of the run that is gone on with, where there is one; None where the run begins anew."""
    resume = resume_of(settings)
    if resume == "never":
        return None
    return Path(output_dir(settings)) if resume == "auto" else Path(resume).parent


def plan_before(settings: Settings) -> Mapping[str, Any]:
    """plan.json of the run that is gone on with; empty where none made a step, or it cannot be read."""
    folder = run_before(settings)
    if folder is None or not folder.is_dir() or not trained(folder):
        return {}
    plan = json_or_none(folder / PLAN_FILE)
    return plan if isinstance(plan, Mapping) else {}


def data_plan(settings: Settings, model_config: Mapping[str, Any] | None) -> DataPlan:
    """The data; a model that training starts from lends its tokenizer where none is named."""
    tokenizer = settings.get("tokenizer_name") or settings.get("model_name_or_path")
    vocab_size = None
    if not tokenizer and model_config is not None:
        vocab_size = model_config.get("vocab_size") or family_of(model_config).geometry({}).vocab_size
    old = recorded_data(settings, output_dir(settings))
    template = not old or "text" in old  # a run keeps its handling: once, special tokens were text
    split = settings.get("split_special_tokens")
    return DataPlan(
        sources=settings.get("dataset") or [EMBEDDED],
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        streaming=settings.get("streaming"),
        text_column=settings.get("text_column"),
        eval_fraction=0.0 if settings.get("eval_dataset") else settings.get("eval_fraction"),
        eval_sources=settings.get("eval_dataset") or [],
        eos_token=settings.get("eos_token"),
        split_special_tokens=True if split is None and not template else split,
        template=template,
    )


def run_plan(settings: Settings, written: dict[str, Any]) -> RunPlan:
    """The run's folder, the arguments that keep their names there, and those that were `written`."""
    own = {f.name: settings.get(f.name) for f in fields(RunPlan) if f.name in OURS}
    own["resume"] = resume_of(settings)
    return RunPlan(output_dir=output_dir(settings), identity=list(IDENTITY), written=written, **own)


def card_plan(settings: Settings) -> CardPlan:
    """What the card says beside the numbers; the data sets by default those of the sources that are on the Hub."""
    names = settings.get("hub_datasets") or []
    if not settings.given("hub_datasets"):
        with contextlib.suppress(ValueError):  # a source that cannot be read is a problem by itself
            sources = parse_sources(settings.get("dataset") or [EMBEDDED])
            hub = ["/".join(source.spec.split("/")[:2]) for source in sources if source.kind == "hub"]
            names = list(dict.fromkeys(hub))  # once, and without a configuration
    return CardPlan(license=settings.get("license"), language=settings.get("language") or [], datasets=names)


def hub_plan(settings: Settings) -> HubPlan | None:
    """Where the models are pushed to, private unless public was written."""
    if not settings.get("push_to_hub") or not settings.get("hub_model_id"):
        return None
    private = settings.get("hub_private_repo") is not False
    return HubPlan(repo_id=settings.get("hub_model_id"), private=private, revision=settings.get("hub_revision"))


def _evaluations(settings: Settings, steps: Steps) -> dict[str, Any]:
    """What has a preset evaluate on its way, where the user says nothing of it; the recipe evaluates at the end."""
    count = settings.preset.evaluations if settings.preset else 1
    held_out = settings.get("eval_dataset") or settings.get("eval_fraction")
    if count == 1 or (steps.total or 0) < _SHORT or not held_out or "eval_strategy" in settings:
        return {}
    return {"eval_strategy": "steps", "eval_steps": (steps.total or 0) // count + 1}  # never the last step


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
        **_evaluations(settings, steps),
    }
    if not arguments.get("gradient_checkpointing"):
        arguments.pop("gradient_checkpointing", None)  # even False brings a warning that the name will change
    if "trackio" in wanted_trackers(settings):  # whose Spaces would be public
        arguments["hub_private_repo"] = settings.get("hub_private_repo") is not False
    if scheduler_arguments:
        arguments["lr_scheduler_kwargs"] = scheduler_arguments
    return {name: value for name, value in arguments.items() if value is not None or name in TRAINER_DEFAULTS}
