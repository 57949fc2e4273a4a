"""Every argument of a run that is ours: its name, type, default, bounds and help, declared once.

Flags, YAML keys, help texts, checks of kind, defaults, and what is kept from TrainingArguments all come from here. To
add an argument, add a field to RunArguments, and the one line that uses it. Imports no torch and no transformers.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from annotated_types import Ge

from hf_mamba.preflight.kinds import Amount, Count, Kind, Positive, Share, Whole
from hf_mamba.preflight.optimizers import INSTEAD


def argument(
    default: Any,
    help: str,
    *,
    identity: bool = False,
) -> Any:
    """A field of RunArguments.

    Args:
        default: the value where neither the user nor a preset says anything; None where there is none.
        help: one line for `--help`; "" keeps it from being a flag.
        identity: whether two runs with different values are different runs, of which one cannot resume the other.
    """
    return field(default=default, metadata={"help": help, "identity": identity})


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """The arguments that TrainingArguments does not have."""

    preset: str | None = argument(None, "a named size with its published training numbers: see `hf-mamba presets`")
    config: str | None = argument(None, "a YAML file with any of these flags as keys")
    model_name_or_path: str | None = argument(None, "start from this model instead of a fresh one")
    config_name: str | None = argument(
        None, "train a fresh model of this configuration: a folder, a config.json or a Hub name"
    )
    config_overrides: str | None = argument(
        None, "fields to change in the preset or configuration: 'hidden_size=128,num_hidden_layers=2'; YAML: a block"
    )
    model_config: dict[str, Any] | None = argument(None, "", identity=True)
    tokenizer_name: str | None = argument(None, "a tokenizer's name or folder; by default one is trained on the data")
    eos_token: str | None = argument(None, "the token that ends a document; by default the tokenizer's own")
    split_special_tokens: bool | None = argument(
        None, "read special tokens that stand in a text as plain text; by default as the tokenizer does"
    )
    dataset: list[str] | None = argument(
        None,
        "'embedded', or files, folders, patterns, Hub names; '@content' after one is its column, ':0.3' its share of "
        "the mix, as in a.jsonl@content:0.3",
    )
    eval_dataset: list[str] | None = argument(
        None, "evaluate on these instead of a part of the data; written like --dataset, weights average their losses"
    )
    streaming: bool = argument(
        False, "read the data while training instead of tokenising it first; see the notes of the plan"
    )
    text_column: str = argument("text", "the column that holds the text")
    eval_fraction: Share = argument(0.01, "share of the documents that is held out for evaluation; 0.01 by default")
    vocab_size: Count | None = argument(None, "rows of the embedding")
    seq_len: Count | None = argument(None, "tokens per row", identity=True)
    micro_batch_size: Count | None = argument(
        None, "rows per device and micro-step, or 'auto' (= per_device_train_batch_size)"
    )
    global_batch_size: Count | None = argument(None, "rows per optimizer step over all devices", identity=True)
    global_batch_tokens: Count | None = argument(None, "tokens per optimizer step over all devices")
    max_tokens: Count | None = argument(None, "tokens to train on in all")
    min_lr: Amount | None = argument(None, "the floor of the cosine and WSD schedules")
    warmup_tokens: Count | None = argument(None, "tokens with a rising rate")
    warmup_ratio: Share | None = argument(None, "share of the steps with a rising rate")
    decay_ratio: Share = argument(0.1, "share of the steps that WSD decays over")
    z_loss: Amount = argument(
        0.0,
        "weight of logsumexp(logits)^2 in the training loss, which keeps the logits from drifting (PaLM: 1e-4); it is "
        "part of the `loss` that is logged, not of an evaluation's or of a source's",
    )
    accelerate_config: str | None = argument(
        None, "accelerate's own file, planned as `accelerate launch --config_file` would start it"
    )
    num_gpus: Count | None = argument(None, "devices per node")
    num_nodes: Count = argument(1, "machines")
    gpu: str | None = argument(None, "the card, for example 'H100 SXM': its memory, where --gpu_memory does not say it")
    gpu_memory: str | None = argument(None, "memory of one GPU, for example 80GB")
    resume: str = argument(
        "auto",
        "'auto' (from the run's last checkpoint), 'never', a run's folder (go on with it as it was begun), or a "
        "checkpoint's folder",
    )
    max_bad_steps: Count = argument(
        5, "updates in a row that are not finite (or spikes) before the run ends; 5 by default"
    )
    spike_sigma: Positive | None = argument(
        None, "withhold updates whose loss or gradient is this many standard deviations above the mean"
    )
    rewind: bool = argument(
        False, "instead of ending for good, go back to the last checkpoint without the samples of those updates"
    )
    sample_prompt: str = argument("def ", "the text that samples of the model continue; empty: no samples")
    license: str | None = argument(
        None, "the model's licence for its card, by the Hub's id, such as apache-2.0; without it the card names none"
    )
    language: list[str] | None = argument(
        None, "languages of the data for the card: codes such as en or zh, or code, multilingual"
    )
    hub_datasets: list[str] | None = argument(
        None, "the data's names on the Hub for the card; by default those of --dataset that are there"
    )
    dry_run: bool = argument(False, "print the plan and stop")


OURS = frozenset(f.name for f in fields(RunArguments))
# The order of the data is TrainingArguments' seed's, too.
IDENTITY = (*(f.name for f in fields(RunArguments) if f.metadata["identity"]), "seed")

# Bounds of TrainingArguments' own fields that the pre-flight computes with.
TRAINER_KINDS: dict[str, Kind] = {
    "per_device_train_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "num_train_epochs": Positive,
    "max_steps": Annotated[int, Ge(-1)],
    "warmup_steps": Amount,
    "learning_rate": Amount,
    "weight_decay": Amount,
    "adam_beta1": Share,
    "adam_beta2": Share,
    "adam_epsilon": Amount,
    "max_grad_norm": Amount,
    "bf16": bool,
    "fp16": bool,
    "use_cpu": bool,
    "gradient_checkpointing": bool,
    "save_only_model": bool,
    "auto_find_batch_size": bool,
    "seed": Whole,
    "lr_scheduler_type": str,
    "optim": str,
}

# Our defaults of TrainingArguments' own fields, where its would be wrong for a pretraining run.
TRAINER_DEFAULTS: dict[str, Any] = {
    "adam_epsilon": 1e-8,
    "seed": 42,
    "optim": "adamw_torch_fused",
    "gradient_checkpointing": False,
    "save_only_model": False,
    "logging_nan_inf_filter": False,  # a NaN must be seen
    "report_to": "none",
    "logging_steps": 10,
    "remove_unused_columns": False,
}

# transformers' names of 5.23 and later -> those that the older versions and the Plan have
RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def for_transformers(arguments: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """The plan's arguments by the names `known` to transformers, with AdamW in the place of an optimizer of ours."""
    names = {old: new for new, old in RENAMED.items() if new in known}
    given = {names.get(name, name): value for name, value in arguments.items()}
    return given | ({"optim": INSTEAD[given["optim"]]} if given.get("optim") in INSTEAD else {})


# Other names of the same argument.
ALIASES = {"micro_batch_size": "per_device_train_batch_size", **RENAMED}
# Read as they are: a path, a size with its unit, or a text that may be a block, too.
_OPEN = ("gpu_memory", "resume", "config_overrides")


def _hints(extras: bool) -> dict[str, Any]:
    """Each argument of ours with its type, without "or None"."""
    hints = get_type_hints(RunArguments, include_extras=extras).items()
    return {name: get_args(hint)[0] if type(None) in get_args(hint) else hint for name, hint in hints}


@cache
def types() -> dict[str, type]:
    """Each argument of ours with its Python type, without bounds."""
    return _hints(extras=False)


@cache
def kinds() -> dict[str, Kind]:
    """Each argument with its type and bounds, for `kinds.check`."""
    return {**TRAINER_KINDS, **_hints(extras=True), **dict.fromkeys(_OPEN, Any)}


def defaults() -> dict[str, Any]:
    """The value of every argument that has one without being written."""
    own = {f.name: f.default for f in fields(RunArguments) if f.default is not None}
    return own | TRAINER_DEFAULTS
