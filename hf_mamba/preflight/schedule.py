"""Steps, tokens and the learning-rate schedule, as numbers that Trainer takes as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_mamba.findings import Findings, Problem
from hf_mamba.preflight.batch import Batch
from hf_mamba.preflight.deepspeed.rates import STOCK, Block, decide_rates
from hf_mamba.preflight.settings import Settings


@dataclass(frozen=True)
class Steps:
    """Optimizer steps, of which `warmup` with a rising rate; `scheduler` is (lr_scheduler_type, its arguments)."""

    total: int | None = None
    warmup: int | None = None
    scheduler: tuple[str, dict[str, Any]] = field(default_factory=lambda: ("linear", {}))
    rates: dict[str, Any] | None = None  # a DeepSpeed file's own schedule, in place of `scheduler`


EPOCHS_NOT_MEASURED = "epochs-not-measured"


def waits_for_data(problems: Sequence[Problem]) -> bool:
    """Whether a plan lacks nothing but the length of an epoch, which is known once its data are tokenised."""
    return [problem.id for problem in problems] == [EPOCHS_NOT_MEASURED]


def decide_steps(
    settings: Settings, batch: Batch | None, block: Block | None, epoch_tokens: int | None, out: Findings
) -> Steps:
    """Steps from max_steps, max_tokens or epochs, and the warm-up as a number of steps.

    Args:
        block: a DeepSpeed schedule.
        epoch_tokens: tokens of a pass over the data, once they are known.
    """
    total = _total(settings, batch, epoch_tokens, out)
    per_step = batch.total * settings.get("seq_len", 0) if batch else 0
    warmup = _warmup(settings, total, per_step, out) if total else None
    if block is not None and total:
        rates = decide_rates(block, warmup, total, settings, out)
        return Steps(total, rates["params"]["warmup_num_steps"], (STOCK[block.kind], {}), rates)
    return Steps(total, warmup, _scheduler(settings, total, warmup, out))


def _total(settings: Settings, batch: Batch | None, epoch_tokens: int | None, out: Findings) -> int | None:
    max_steps, max_tokens, seq_len = settings.get("max_steps", -1), settings.get("max_tokens"), settings.get("seq_len")
    if max_steps == 0:
        out.problem(
            settings.key("max_steps"), 0, "A run of no steps trains nothing.", "Write a number > 0.", id="no-steps"
        )
        return None
    by_steps, by_tokens = max_steps > 0, settings.given("max_tokens")
    if settings.given("num_train_epochs") and not by_steps and not by_tokens:
        return _by_epochs(settings, batch, epoch_tokens, out)
    if batch is None or seq_len is None:
        return max_steps if by_steps else None
    per_step = batch.total * seq_len
    if by_steps and by_tokens and max_steps != max_tokens // per_step:
        out.problem(
            settings.key("max_tokens"),
            f"{max_tokens} tokens and {max_steps} steps of {per_step} tokens = {max_steps * per_step}",
            "The two budgets differ.",
            "Keep one of --max_steps and --max_tokens.",
            id="two-budgets",
        )
        return None
    if by_steps:
        out.provenance["total_steps"] = settings.source("max_steps")
        return max_steps
    if max_tokens is None:
        out.problem(
            "max_steps", "nothing", "The run has no end.", "Write --max_steps or --max_tokens.", id="run-without-end"
        )
        return None
    if max_tokens < per_step:
        out.problem(
            settings.key("max_tokens"),
            f"{max_tokens} ({settings.source('max_tokens')})",
            f"One step already takes {per_step} tokens.",
            f"Write at least {per_step}, or make the batch smaller.",
            id="budget-below-one-step",
        )
        return None
    out.provenance["total_steps"] = f"{max_tokens} tokens ({settings.source('max_tokens')}) / {per_step} a step"
    return max_tokens // per_step


def _by_epochs(settings: Settings, batch: Batch | None, epoch_tokens: int | None, out: Findings) -> int | None:
    """Whole steps in which each token is seen at least as often as is wanted."""
    epochs, key, seq_len = settings.get("num_train_epochs"), settings.key("num_train_epochs"), settings.get("seq_len")
    if settings.get("streaming"):
        out.problem(
            key,
            epochs,
            "A stream is read as it goes, so an epoch has no length that is known beforehand.",
            "Write --max_steps or --max_tokens, or leave out --streaming.",
            id="epochs-have-no-length",
        )
        return None
    if epoch_tokens is None:
        out.problem(
            key,
            epochs,
            "How long an epoch is will be known once the data are tokenised.",
            "Run it: the recipe tokenises first and plans the rest then. To know it now, write --max_steps.",
            id=EPOCHS_NOT_MEASURED,
        )
        return None
    if batch is None or seq_len is None:
        return None
    per_step = batch.total * seq_len
    where = f"{epochs:g} epochs ({settings.source('num_train_epochs')}) of {epoch_tokens} tokens / {per_step} a step"
    out.provenance["total_steps"] = where
    return math.ceil(epochs * epoch_tokens / per_step)


def _warmup(settings: Settings, total: int, per_step: int, out: Findings) -> int:
    """Trainer's rule (TrainingArguments.get_warmup_steps): below 1 it is a share of the steps, rounded up."""
    if settings.given("warmup_tokens") and per_step:
        return _warmup_by_tokens(settings, total, per_step, out)
    name = "warmup_steps" if "warmup_steps" in settings else "warmup_ratio"
    if settings.given("warmup_steps") and settings.given("warmup_ratio"):
        out.problem(
            "warmup_ratio",
            "both warmup_ratio and warmup_steps",
            "They say the same thing twice.",
            "Keep one.",
            id="warmup-written-twice",
        )
    value = settings.get(name, 0)
    share = name == "warmup_ratio" or value < 1
    warmup = math.ceil(total * value) if share else int(value)
    if not share and warmup != value:
        out.note(f"warmup_steps of {value:g} is read as {warmup}, as Trainer reads it.")
    out.provenance["warmup_steps"] = (
        f"{value:g} of {total} steps ({settings.source(name)})" if share else settings.source(name)
    )
    if warmup >= total and total > 1:
        out.problem(
            settings.key(name),
            f"{warmup} of {total} steps",
            "The rate would never leave the warm-up.",
            f"Write less than {total}.",
            id="warmup-never-ends",
        )
    return warmup


def _warmup_by_tokens(settings: Settings, total: int, per_step: int, out: Findings) -> int:
    """Whole steps that hold at least this many tokens."""
    tokens = settings.get("warmup_tokens")
    for other in ("warmup_steps", "warmup_ratio"):
        if settings.given(other):
            out.problem(
                "warmup_tokens",
                f"both warmup_tokens and {other}",
                "They say the same thing twice.",
                "Keep one.",
                id="warmup-written-twice",
            )
    warmup = math.ceil(tokens / per_step)
    out.provenance["warmup_steps"] = f"{tokens} tokens ({settings.source('warmup_tokens')}) / {per_step} a step"
    if warmup >= total and total > 1:
        out.problem(
            settings.key("warmup_tokens"),
            f"{warmup} of {total} steps",
            "The rate would never leave the warm-up.",
            f"Write less than {(total - 1) * per_step}.",
            id="warmup-never-ends",
        )
    return warmup


def _scheduler(settings: Settings, total: int | None, warmup: int | None, out: Findings) -> tuple[str, dict[str, Any]]:
    """lr_scheduler_type with the arguments it needs (transformers/optimization.py); those that the user wrote win."""
    kind = settings.get("lr_scheduler_type", "linear")
    kind = getattr(kind, "value", kind)  # an enum of transformers
    own = settings.get("lr_scheduler_kwargs")
    own = dict(own) if isinstance(own, dict) else {}
    min_lr, rate = settings.get("min_lr", 0.0), settings.get("learning_rate")
    if settings.given("min_lr") and kind == "cosine":
        kind = "cosine_with_min_lr"
    own_floor = own.keys() & {"min_lr", "min_lr_rate", "min_lr_ratio"}
    floor = kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
    if settings.given("min_lr") and not floor:
        out.problem(
            "min_lr",
            min_lr,
            f"The schedule {kind!r} has no floor.",
            "Use cosine_with_min_lr or warmup_stable_decay.",
            id="schedule-without-floor",
        )
    if settings.given("decay_ratio") and kind != "warmup_stable_decay":
        out.problem(
            "decay_ratio",
            settings.get("decay_ratio"),
            f"The schedule {kind!r} has no decay phase of its own.",
            "Use --lr_scheduler_type warmup_stable_decay.",
            id="schedule-without-decay-phase",
        )
    if floor and not own_floor and rate is not None and min_lr > rate:
        out.problem(
            settings.key("min_lr"),
            f"{min_lr:g} and learning_rate {rate:g}",
            "The floor is above the peak.",
            "Lower it.",
            id="floor-above-peak",
        )
    share = min_lr / rate if rate else 0.0
    if kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not own_floor:
        # a share of the peak: for an absolute floor transformers reads optimizer.defaults, which DeepSpeed's lacks
        own["min_lr_rate"] = share
    if kind == "warmup_stable_decay" and total:
        decay = min(math.ceil(total * settings.get("decay_ratio")), max(total - (warmup or 0), 0))
        own = {"num_decay_steps": decay, "min_lr_ratio": share, **own}
    return kind, own
