"""`--deepspeed auto`: the cheapest engine in which a run fits its GPUs: plain data parallelism, else the lowest stage.

Offloading is never chosen: a problem's fix offers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_mamba.dotted import get
from hf_mamba.findings import Findings
from hf_mamba.plan import FsdpPlan
from hf_mamba.preflight.cost.capacity import Request, known_capacity, needed_bytes
from hf_mamba.preflight.cost.memory import ASSUMED, parse_capacity, show
from hf_mamba.preflight.deepspeed.templates import TEMPLATES, template
from hf_mamba.preflight.optimizers import INSTEAD, MUON
from hf_mamba.preflight.settings import Settings

PLAIN = "none"
CHOICES = (PLAIN, "zero1", "zero2", "zero3")
CARDS = ("24GB", "40GB", "80GB", "141GB")
MARGIN = 0.1  # of a card, which stays free


def choose(request: Request, out: Findings) -> str:
    """A name of TEMPLATES, or "none"; what the run's folder was started with, where there is one."""
    if request.fsdp is not None or request.settings.get("optim") == MUON:
        return PLAIN
    if (kept := _stored(request.before)) is not None:
        out.provenance["engine"] = "the plan of the run that is gone on with"
        file = str((request.before.get("provenance") or {}).get("ds_config.zero_optimization.stage"))
        if kept != PLAIN and "." in file:
            out.note(f"The run had a DeepSpeed file, {file}; {kept} stands in its place: --deepspeed {file} keeps it.")
        return kept
    if request.world.device != "gpu" or (request.world.processes or 1) == 1:
        return PLAIN
    needs = _needs(request)
    if needs is None:
        out.note("--deepspeed auto chose nothing: the memory of this run is not predicted.")
        return PLAIN
    capacity = known_capacity(request)
    try:
        card = parse_capacity(ASSUMED if capacity is None else capacity)
    except ValueError:
        return PLAIN  # named where the fit is checked
    fitting = _fitting(needs, card)
    chosen = fitting or CHOICES[-1]
    out.provenance["engine"] = f"--deepspeed auto for {show(card)}" + " (assumed)" * (capacity is None)
    text = f"Engine {_title(chosen)}: it needs {show(needs[chosen])} of {show(card)} a GPU"
    if fitting is None:
        text += (
            f", and {MARGIN:.0%} should stay free: fewer rows, --gradient_checkpointing or {chosen}_offload need less"
        )
    elif chosen != PLAIN:
        cheaper = CHOICES[CHOICES.index(chosen) - 1]
        text += f"; {_title(cheaper)} needs {show(needs[cheaper])}, and {MARGIN:.0%} stay free"
    out.note(f"{text}. --deepspeed {PLAIN}, a name or a file decides otherwise.")
    if capacity is None:
        by_card = ", ".join(f"{each} {_fitting(needs, parse_capacity(each)) or 'nothing'}" for each in CARDS)
        out.note(f"No card is named (--gpu, --gpu_memory): {ASSUMED} is assumed. Without offloading, {by_card}.")
    return chosen


def replace_muon(settings: Settings, ds_config: Mapping[str, Any] | None, fsdp: FsdpPlan | None, out: Findings) -> None:
    """Put AdamW, for which the rate holds, too, in the place of a preset's Muon where Muon cannot serve."""
    if settings.get("optim") != MUON or settings.given("optim"):
        return
    if ds_config is not None or (fsdp is not None and fsdp.version == 1):
        why = f"{'DeepSpeed' if ds_config is not None else 'FSDP 1'} hands an optimizer flat pieces of the weights"
    elif settings.get("optim_args"):
        why = "--optim_args are AdamW's"
    else:
        return
    settings.rewrite("optim", INSTEAD[MUON])
    out.note(f"AdamW takes the place of Muon, which {settings.source('optim')} has: {why}.")


def _title(choice: str) -> str:
    return "plain data parallelism" if choice == PLAIN else choice


def _needs(request: Request) -> dict[str, int] | None:
    """Bytes of a GPU by choice; None where they are not predicted."""
    found = {}
    for choice in CHOICES:
        each = replace(request, ds_config=None if choice == PLAIN else template(choice))
        size = needed_bytes(each)
        if size is None:
            return None
        found[choice] = size
    return found


def _fitting(needs: dict[str, int], card: int) -> str | None:
    """The first choice that fits with the margin."""
    return next((choice for choice in CHOICES if needs[choice] <= (1 - MARGIN) * card), None)


def _stored(before: Mapping[str, Any]) -> str | None:
    """The template that a plan was started with; None where it says nothing."""
    if "ds_config" not in before:
        return None
    ds_config = before["ds_config"] or {}
    stage = get(ds_config, "zero_optimization.stage", 0)
    away = get(ds_config, "zero_optimization.offload_optimizer.device", "none") != "none"
    name = f"zero{stage}" + "_offload" * away
    return name if name in TEMPLATES else PLAIN
