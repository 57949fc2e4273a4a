"""What becomes of a run here and in today's stack, and whether the two agree.

The stack is stack_oracle.py: Hugging Face's processing of the file, then DeepSpeedConfig, in the world of the run.
"""

from __future__ import annotations

import io
import json
import math
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from hf_mamba.dotted import get
from hf_mamba.preflight import resolve
from hf_mamba.preflight.screen import print_report

from .fuzz_cases import Case
from .stack_oracle import Refused, numbers, run_stack

HIDDEN = 192  # of tiny_mamba

# The kinds of which there must be none.
CRASH, LATE, NUMBERS, UNSAID = "a traceback", "accepted here, refused there", "other numbers", "changed, and not said"
BAD = (CRASH, LATE, NUMBERS, UNSAID)
SAME, MENDED = "accepted by both", "mended: accepted here alone"
STRICTER, REFUSED = "refused here alone", "refused by both"


class Verdict(NamedTuple):
    """One kind of outcome; the detail tells apart what has different causes."""

    kind: str
    detail: str = ""


def judge(case: Case, seconds: list[float] | None = None) -> Verdict:
    """Resolve a case, ask the stack about the user's file and about ours, and compare.

    Args:
        seconds: gets the CPU time that our side took.
    """
    start = time.process_time()
    try:
        plan = resolved(case)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(CRASH, f"{type(error).__name__} in {Path(last.filename).name}, {last.name}")
    finally:
        if seconds is not None:
            seconds.append(time.process_time() - start)
    steps = plan.total_steps if plan.ok else 10
    asked = plan.training_arguments if plan.ok else case.arguments
    try:
        theirs = run_stack(case.config, asked, case.world, HIDDEN, steps)
    except Refused:
        theirs = None
    if not plan.ok:
        ids = sorted({problem.id for problem in plan.problems})
        return Verdict(STRICTER if theirs else REFUSED, ", ".join(ids))
    if plan.ds_config is None:
        return Verdict(UNSAID, "the whole file") if case.config else Verdict(SAME)
    try:
        ours = run_stack(plan.ds_config, plan.training_arguments, case.world, HIDDEN, steps)
    except Refused as error:
        return Verdict(LATE, str(error).splitlines()[0][:100])
    if wrong := other_numbers(plan, numbers(ours)):
        return Verdict(NUMBERS, ", ".join(wrong))
    if unsaid := [*unsaid_keys(case.config, plan), *unsaid_flags(case.arguments, plan)]:
        return Verdict(UNSAID, ", ".join(unsaid))
    if theirs is None:
        return Verdict(MENDED)
    if unsaid := [*other_meanings(plan, theirs, ours), *other_blocks(plan, theirs)]:
        return Verdict(UNSAID, ", ".join(unsaid))
    return Verdict(SAME)


def resolved(case: Case) -> Any:
    """The plan of a case, as `hf-mamba preflight` shows it: on a screen and as JSON."""
    arguments = {**case.arguments, "deepspeed": case.config}
    plan = resolve(arguments, world_size=case.world, environ={}, device=case.device)
    json.dumps(plan.to_dict(), allow_nan=False).encode()
    print_report(plan, io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), provenance=True)
    return plan


def other_numbers(plan: Any, got: Mapping[str, Any]) -> list[str]:
    """What the engine would do otherwise than the plan says."""
    zero = plan.ds_config["zero_optimization"]
    planned = {
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "global_batch_size": plan.global_batch_size,
        "stage": zero["stage"],
        "gradient_clipping": plan.training_arguments["max_grad_norm"],
        "bf16": plan.dtype == "bf16",
        "fp16": plan.dtype == "fp16",
        "offload_optimizer": get(zero, "offload_optimizer.device", "none"),
        "offload_param": get(zero, "offload_param.device", "none"),
    }
    return [name for name, value in planned.items() if got[name] != value]


def leaves(block: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of a file that is no block, with its keys."""
    for key, value in block.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def unsaid_keys(config: Mapping[str, Any], plan: Any) -> list[str]:
    """The keys of a user's file whose values are not in ours, and of which nothing is said."""
    found = []
    for path, value in leaves(config):
        now: Any = plan.ds_config
        for key in path:
            now = now.get(key) if isinstance(now, Mapping) else None
        dotted = ".".join(path)
        if value not in ("auto", {}, now) and not _taken_over(path, value, plan) and not said(dotted, plan):
            found.append(dotted)
    return found


def _taken_over(path: tuple[str, ...], value: Any, plan: Any) -> bool:
    """Whether a value has become a number of the plan."""
    arguments, last = plan.training_arguments, path[-1]
    if path[0] == "optimizer":
        names = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
        if last == "betas":
            return value in ([arguments["adam_beta1"], arguments["adam_beta2"]],)
        if last == "type":
            return str(value).lower() in ("adam", "adamw", arguments["optim"])
        return last in names and value == arguments[names[last]]
    if path[0] == "scheduler":
        rates = plan.rates or {"type": None, "params": {}}
        return value == (rates["type"] if last == "type" else rates["params"].get(last))
    numbers = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
    }
    return numbers.get(".".join(path), math.nan) == value


def said(dotted: str, plan: Any) -> bool:
    """Whether the plan has a line about a key or a block around it: left out, changed, or in a note."""
    parts = dotted.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    for line in plan.provenance:
        kind, _, what = line.partition(" ds_config: ")
        if kind in ("left out of", "changed in") and any(what == one or what.startswith(f"{one}:") for one in around):
            return True
    return any(f"{parts[-1]} " in note or dotted in note for note in plan.notes)


def unsaid_flags(arguments: Mapping[str, Any], plan: Any) -> list[str]:
    """The flags whose values are not the plan's, and of which no note speaks."""
    arguments = {name: value for name, value in arguments.items() if value is not None}
    now = {**plan.training_arguments, "global_batch_size": plan.global_batch_size}
    now |= {"bf16": plan.dtype == "bf16", "fp16": plan.dtype == "fp16", "resume": arguments.get("resume")}
    if "max_tokens" in arguments:
        now["max_tokens"] = arguments["max_tokens"] if plan.total_tokens <= float(arguments["max_tokens"]) else None
    if isinstance(share := arguments.get("warmup_steps"), float) and share < 1:
        now["warmup_steps"] = share if plan.warmup_steps == math.ceil(share * plan.total_steps) else None
    if (floor := arguments.get("min_lr")) is not None:
        kwargs = plan.training_arguments.get("lr_scheduler_kwargs", {})
        share = kwargs.get("min_lr_rate", kwargs.get("min_lr_ratio", math.nan))
        now["min_lr"] = floor if math.isclose(share * plan.training_arguments["learning_rate"], floor) else None
        if arguments.get("lr_scheduler_type") == "cosine":
            now["lr_scheduler_type"] = "cosine"  # with a floor, under its own name
    if not arguments.get("gradient_checkpointing", True):
        now["gradient_checkpointing"] = now.get("gradient_checkpointing", False)
    return [
        f"--{name}"
        for name, value in arguments.items()
        if now.get(name) != value and not any(name in note for note in plan.notes)
    ]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every attribute of a DeepSpeedConfig, by dotted name; objects as text."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    elif type(value).__module__.startswith("deepspeed") and hasattr(value, "__dict__"):
        value = vars(value)
    if not isinstance(value, dict):
        plain = isinstance(value, int | float | str | None)
        return {prefix.removesuffix("."): value if plain else repr(value)}
    rows: dict[str, Any] = {}
    for key, inner in value.items():
        rows |= flat(inner, f"{prefix}{key}.")
    return rows


def other_meanings(plan: Any, theirs: Any, ours: Any) -> list[str]:
    """Attributes in which DeepSpeed's reading of the user's file and of ours differ, without a line of their own."""
    lines = [f"{key} {what}" for key, what in plan.provenance.items() if key.startswith(("left out", "changed"))]
    lines += [
        key
        for key, where in plan.provenance.items()
        if key.startswith("ds_config.") and not where.endswith((".json", "the deepspeed dictionary"))
    ]
    mine, found = flat(vars(ours)), []
    for name, value in flat(vars(theirs)).items():
        if name.startswith(("_param_dict", "optimizer_", "scheduler_")) or mine.get(name) == value:
            continue
        block, *inner = name.split(".")
        names = {name.rpartition(".")[2], *inner[:1]} | ({block.removesuffix("_config")} if inner else set())
        names |= {"gradient_accumulation_steps"} if name == "train_batch_size" else set()
        if not any(one in key for one in names for key in lines):
            found.append(name)
    return found


def other_blocks(plan: Any, theirs: Any) -> list[str]:
    """Numbers of the optimizer and the schedule that DeepSpeed would have built, which are not the plan's."""
    arguments = plan.training_arguments
    betas = [arguments["adam_beta1"], arguments["adam_beta2"]]
    planned = {"lr": arguments["learning_rate"], "betas": betas, "eps": arguments["adam_epsilon"]}
    planned["weight_decay"] = arguments["weight_decay"]
    adam = str(theirs.optimizer_name).lower() in ("adam", "adamw")
    found = [
        f"optimizer.params.{key}"
        for key, value in (theirs.optimizer_params or {}).items()
        if adam and planned.get(key, value) != value
    ]
    if (theirs.scheduler_name is None) != (plan.rates is None):
        return [*found, "scheduler"]
    for key, value in ((theirs.scheduler_params or {}) if plan.rates else {}).items():
        if plan.rates["params"].get(key) != value and not said(f"scheduler.params.{key}", plan):
            found.append(f"scheduler.params.{key}")
    return found
