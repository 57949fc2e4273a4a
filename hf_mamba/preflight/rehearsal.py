"""The arguments of a plan, given to those who will read them: TrainingArguments, optimizer, schedule, data loader.

Whatever one of them refuses becomes a problem that names the argument. Nothing is started: no device is opened, no
process group formed, and the optimizer holds one weight. Imports torch and transformers, as the run will.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from hf_mamba.findings import Findings, first_line
from hf_mamba.plan import Plan
from hf_mamba.preflight.arguments import for_transformers
from hf_mamba.preflight.consumers import OPTIMIZERS
from hf_mamba.preflight.deepspeed.rates import factor
from hf_mamba.preflight.kinds import show
from hf_mamba.run.changes import HISTORIC, settings_before, update_settings
from hf_mamba.run.resume import find_checkpoint

# What a launcher has written for TrainingArguments to act on, and what TrainingArguments writes itself.
_LAUNCHED = ("ACCELERATE_", "FSDP_")
# Without them the arguments are of another run, so that they are not asked about one by one.
_NEEDED = frozenset({"output_dir", "max_steps", "use_cpu", "per_device_train_batch_size", "learning_rate"})


def check_arguments(plan: Plan, out: Findings) -> None:
    """A problem where the installed transformers or torch refuses one of the plan's arguments.

    A plan for another machine is checked without what depends on its devices.
    """
    import torch

    given = {name: value for name, value in plan.training_arguments.items() if name != "deepspeed"}
    if plan.device == "gpu" and not torch.cuda.is_available():
        given = {**given, "use_cpu": True, "tf32": None}
    refusal = _refusal(given)
    if refusal is None:
        return
    names = [name for name in given if name not in _NEEDED and _refusal(_without(given, name)) is None]
    if len(names) > 1:  # without its kind, arguments of a kind are not read
        names = [name for name in names if name not in ("optim", "lr_scheduler_type")]
    key = names[0] if len(names) == 1 else next((name for name in names if name in refusal), "training arguments")
    found = show(given[key]) if key in given else ", ".join(names) or "their values"
    where = plan.provenance.get(key)
    out.problem(
        key,
        f"{found} ({where})" if where else found,
        f"It is refused when the run is built: {refusal.rstrip('.')}.",
        "Write another value, or remove it.",
        id="refused-by-transformers",
    )


def note_jump(plan: Plan, out: Findings) -> None:
    """A note where the rate of the first new step is not the one that the checkpoint's settings would have given."""
    checkpoint = find_checkpoint(plan.run.resume, plan.run.output_dir, Findings())
    before = settings_before(checkpoint) if checkpoint else None
    if before is None:
        return
    (step, old), new = before, update_settings(plan.known)
    if not 0 < step < plan.total_steps or not {old["lr_scheduler_type"], new["lr_scheduler_type"]}.isdisjoint(HISTORIC):
        return
    last, then, now = _rate(old, step - 1), _rate(old, step), _rate(new, step)
    if now != then:
        out.note(
            f"The learning rate goes from {last:g} at step {step} to {now:g} at step {step + 1}, "
            f"which was planned at {then:g}."
        )


def _rate(settings: Mapping[str, Any], step: int) -> float:
    """The learning rate at which update `step` (from 0) is made under these settings of a run."""
    import torch
    from transformers import get_scheduler

    peak = settings["learning_rate"]
    if settings["rates"]:
        return peak * factor(settings["rates"], step)
    schedule = get_scheduler(
        settings["lr_scheduler_type"],
        torch.optim.SGD([torch.zeros(1)], lr=peak),
        num_warmup_steps=settings["warmup_steps"],
        num_training_steps=settings["max_steps"],
        scheduler_specific_kwargs=settings["lr_scheduler_kwargs"],
    )
    return peak * schedule.lr_lambdas[0](step)


def _without(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != name}


def _refusal(given: Mapping[str, Any]) -> str | None:
    """The first line of the error that these arguments end in; None where there is none."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the run will say it
    try:
        with _alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _build(given)
    except Exception as error:  # whatever its type: a traceback is what this is for
        return first_line(error)
    finally:
        logging.disable(previous)
    return None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide the launcher's variables, and put every variable back."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(_LAUNCHED)]:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _build(given: Mapping[str, Any]) -> None:
    """Build what a run builds of its arguments, around one weight and one row."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments, get_scheduler
    from transformers.training_args import OptimizerNames

    class Rehearsed(TrainingArguments):
        """TrainingArguments that opens no device."""

        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

    args = Rehearsed(**for_transformers(given, TrainingArguments.__dataclass_fields__))
    model: Any = torch.nn.Linear(1, 1, bias=False)
    if not OPTIMIZERS[OptimizerNames(args.optim).value]:  # others look for their own modules or devices
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = kind(model.parameters(), **options)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(args.max_steps),
        num_training_steps=args.max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]  # a mapping by now
    )
    for rate in getattr(schedule, "lr_lambdas", ()):
        for step in {0, 1, args.get_warmup_steps(args.max_steps), args.max_steps // 2, args.max_steps}:
            float(rate(step))
    DataLoader(
        [0],  # type: ignore[arg-type]
        batch_size=args.per_device_train_batch_size,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
        pin_memory=args.dataloader_pin_memory,
    )
    torch.Generator().manual_seed(args.seed)
