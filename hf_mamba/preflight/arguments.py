"""Every argument of a run that is ours: its name, type, default, bounds and help, declared once.

Flags, YAML keys, help texts, checks of kind, defaults, and what is kept from TrainingArguments all come from here. To
add an argument, add a field to RunArguments, and the one line that uses it. Imports no torch and no transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_type_hints


def argument(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    identity: bool = False,
) -> Any:
    """A field of RunArguments.

    Args:
        default: the value where neither the user nor a preset says anything; None where there is none.
        help: one line for `--help`; "" keeps it from being a flag.
        above, at_least, at_most: bounds of a number.
        identity: whether two runs with different values are different runs, of which one cannot resume the other.
    """
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    return field(default=default, metadata={"help": help, "identity": identity, **bounds})


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """The arguments that TrainingArguments does not have."""

    preset: str | None = argument(None, "a named size with its published training numbers: see `hf-mamba presets`")
    config: str | None = argument(None, "a YAML file with any of these flags as keys")
    model_name_or_path: str | None = argument(None, "start from this model instead of a fresh one")
    model_config: dict[str, Any] | None = argument(None, "", identity=True)
    tokenizer_name: str | None = argument(None, "a tokenizer's name or folder; by default one is trained on the data")
    dataset: list[str] | None = argument(
        None, "'embedded', or files, folders, patterns, Hub names; ':0.3' after one is its share of the mix"
    )
    streaming: bool = argument(
        False, "read the data while training instead of tokenising it first; see the notes of the plan"
    )
    text_column: str = argument("text", "the column that holds the text")
    eval_fraction: float = argument(
        0.01, "share of the documents that is held out for evaluation; 0.01 by default", at_least=0, at_most=1
    )
    vocab_size: int | None = argument(None, "rows of the embedding", above=0)
    seq_len: int | None = argument(None, "tokens per row", above=0, identity=True)
    micro_batch_size: int | None = argument(
        None, "rows per device and micro-step, or 'auto' (= per_device_train_batch_size)", above=0
    )
    global_batch_size: int | None = argument(None, "rows per optimizer step over all devices", above=0, identity=True)
    global_batch_tokens: int | None = argument(None, "tokens per optimizer step over all devices", above=0)
    max_tokens: int | None = argument(None, "tokens to train on in all", above=0)
    min_lr: float | None = argument(None, "the floor of the cosine and WSD schedules", at_least=0)
    warmup_tokens: int | None = argument(None, "tokens with a rising rate", above=0)
    warmup_ratio: float | None = argument(None, "share of the steps with a rising rate", at_least=0, at_most=1)
    decay_ratio: float = argument(0.1, "share of the steps that WSD decays over", at_least=0, at_most=1)
    z_loss: float = argument(
        0.0,
        "weight of logsumexp(logits)^2 in the training loss, which keeps the logits from drifting (PaLM: 1e-4); it is "
        "part of the `loss` that is logged, not of an evaluation's or of a source's",
        at_least=0,
    )
    num_gpus: int | None = argument(None, "devices per node", above=0)
    num_nodes: int = argument(1, "machines", above=0)
    gpu_memory: str | None = argument(None, "memory of one GPU, for example 80GB")
    resume: str = argument("auto", "'auto' (from the run's last checkpoint), 'never', or a checkpoint's folder")
    max_bad_steps: int = argument(
        5, "updates in a row that are not finite (or spikes) before the run ends; 5 by default", above=0
    )
    spike_sigma: float | None = argument(
        None, "withhold updates whose loss or gradient is this many standard deviations above the mean", above=0
    )
    rewind: bool = argument(
        False, "instead of ending for good, go back to the last checkpoint without the samples of those updates"
    )
    sample_prompt: str = argument("def ", "the text that the sample at the end continues")
    dry_run: bool = argument(False, "print the plan and stop")


OURS = frozenset(f.name for f in fields(RunArguments))
# The order of the data is TrainingArguments' seed's, too.
IDENTITY = (*(f.name for f in fields(RunArguments) if f.metadata["identity"]), "seed")

# Bounds of TrainingArguments' own fields that the pre-flight computes with.
TRAINER_KINDS: dict[str, str] = {
    "per_device_train_batch_size": "int>0",
    "gradient_accumulation_steps": "int>0",
    "max_steps": "int>=-1",
    "warmup_steps": "float>=0",
    "learning_rate": "float>=0",
    "weight_decay": "float>=0",
    "adam_beta1": "float 0..1",
    "adam_beta2": "float 0..1",
    "adam_epsilon": "float>=0",
    "max_grad_norm": "float>=0",
    "bf16": "bool",
    "fp16": "bool",
    "use_cpu": "bool",
    "gradient_checkpointing": "bool",
    "save_only_model": "bool",
    "auto_find_batch_size": "bool",
    "seed": "int>=0",
    "lr_scheduler_type": "str",
    "optim": "str",
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
# Other names of the same argument.
ALIASES = {"micro_batch_size": "per_device_train_batch_size", **RENAMED}
# Read as they are: a path, or a size with its unit.
_OPEN = ("gpu_memory", "resume")


@cache
def types() -> dict[str, type]:
    """Each argument of ours with its type, without "or None"."""
    hints = get_type_hints(RunArguments)
    return {
        name: next((t for t in get_args(hint) if _optional(hint) and t is not type(None)), hint)
        for name, hint in hints.items()
    }


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


@cache
def kinds() -> dict[str, str]:
    """Each argument with its kind, in the words of `kinds.check`: "int>0", "float 0..1", "list"."""
    found = dict(TRAINER_KINDS)
    for f in fields(RunArguments):
        kind, bounds = getattr(types()[f.name], "__name__", "any"), f.metadata
        if bounds["at_most"] is not None:
            kind += f" {bounds['at_least']}..{bounds['at_most']}"
        elif bounds["above"] is not None:
            kind += f">{bounds['above']}"
        elif bounds["at_least"] is not None:
            kind += f">={bounds['at_least']}"
        found[f.name] = "any" if f.name in _OPEN else kind
    return found


def defaults() -> dict[str, Any]:
    """The value of every argument that has one without being written."""
    own = {f.name: f.default for f in fields(RunArguments) if f.default is not None}
    return own | TRAINER_DEFAULTS
