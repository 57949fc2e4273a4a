"""Bytes that a run writes to disk, and whether the folders have room for them. No torch.

Of N parameters, with w bytes of a weight (4 in fp32, 2 under DeepSpeed in 16 bits), a checkpoint holds

    model.safetensors      w N
    without DeepSpeed      8 N      AdamW's moments                                 optimizer.pt
    ZeRO stage 0           w N + 8 N, and 4 N of fp32 masters in 16 bits            mp_rank_*_model_states.pt
    ZeRO stages 1 and 2    w N + 12 N                                               and the ranks' optim_states.pt
    ZeRO stage 3           12 N                                                     the ranks' optim_states.pt

All are lower bounds: a run that is refused would have filled the disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_mamba.data.sources import Source, parse_sources
from hf_mamba.data.tokenizer import not_tokenised
from hf_mamba.dotted import get
from hf_mamba.family import family_of
from hf_mamba.files import cache_folder
from hf_mamba.findings import Findings
from hf_mamba.names import NAME
from hf_mamba.plan import Plan
from hf_mamba.preflight.optimizers import ADAMW, MUON, moment_bytes
from hf_mamba.preflight.world import runs_elsewhere
from hf_mamba.run.resume import conversion_bytes, find_checkpoint, find_universal
from hf_mamba.sizes import ceil_div

BYTES_PER_TOKEN = 5  # of text: few tokenizers need less than one token for so much
UNPACKED = 2  # bytes in a byte of a compressed file, at least
TEXT_SHARE = {"text": 1.0, "jsonl": 0.5}  # of a file's bytes; of tables, the other columns are not known
SAVE_STEPS = 500  # transformers' default


@dataclass(frozen=True)
class Need:
    """What will be written below a folder."""

    what: str  # tokens, checkpoints, conversion or model
    text: str
    folder: Path
    size: int


@dataclass(frozen=True)
class Disk:
    """What is there: `device` tells two disks apart, `free` is in bytes."""

    device: object
    free: int


def disk_of(folder: Path) -> Disk:
    """The disk on which a folder lies, or will lie once it is made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return Disk(there.stat().st_dev, shutil.disk_usage(there).free)


def checkpoint_bytes(plan: Plan) -> int:
    """Bytes of one checkpoint, all ranks' files together."""
    count, weight = plan.parameters["estimated"], _weight_bytes(plan)
    if plan.training_arguments.get("save_only_model"):
        return weight * count
    if plan.optim == MUON:  # never DeepSpeed's
        return weight * count + moment_bytes(family_of(plan.model_config).parameters(plan.model_config), muon=True)
    moments = 8 if plan.optim in ADAMW else 0
    stage = None if plan.ds_config is None else plan.ds_config["zero_optimization"].get("stage", 0)
    return count * bytes_per_parameter(weight, moments, stage)


def bytes_per_parameter(weight: int, moments: int, stage: int | None) -> int:
    """Of a checkpoint; `stage` is ZeRO's, None without DeepSpeed."""
    if stage is None:
        return weight + moments
    masters = 4 if stage or weight < 4 else 0
    return weight + (weight if stage < 3 else 0) + masters + moments


def checkpoints_to_come(plan: Plan) -> int:
    """How many more checkpoints lie in the folder at once than today, at the most."""
    arguments, total = plan.training_arguments, plan.total_steps
    strategy = str(getattr(arguments.get("save_strategy"), "value", arguments.get("save_strategy", "steps")))
    done = _steps_saved(Path(plan.run.output_dir))
    if strategy == "no" or total in done:
        return 0
    every = arguments.get("save_steps", SAVE_STEPS)
    every = max(1, round(every * total) if every < 1 else int(every))
    begun = max(done, default=0)
    coming = ceil_div(total, every) - begun // every if strategy == "steps" else 1
    limit = arguments.get("save_total_limit")
    if not limit:
        return max(coming, 1)
    kept = max(limit, 2) if arguments.get("load_best_model_at_end") else limit
    return max(1, min(coming, kept + 1 - len(done)))


def needs(plan: Plan) -> list[Need]:
    """What the run will write, and where."""
    folder = Path(os.path.abspath(plan.run.output_dir))
    out = []
    if count := checkpoints_to_come(plan):
        size = checkpoint_bytes(plan)
        named = "a checkpoint" if count == 1 else f"{count} checkpoints"
        out.append(Need("checkpoints", f"{named} of {gigabytes(size)}", folder, count * size))
    if (checkpoint := _to_convert(plan)) is not None:
        size = conversion_bytes(checkpoint)
        text = f"the converted copy of {checkpoint.name}, {gigabytes(size)} while it is made"
        out.append(Need("conversion", text, checkpoint, size))
    exported = _weight_bytes(plan) * plan.parameters["estimated"]
    if not (folder / "model").exists():
        out.append(Need("model", f"the model of {gigabytes(exported)}", folder, exported))
    if tokens := token_bytes(plan):
        out.append(Need("tokens", f"tokens of at least {gigabytes(tokens)}", _cache(), tokens))
    return out


def _to_convert(plan: Plan) -> Path | None:
    """The checkpoint that the start will convert for another world or stage."""
    if not get(plan.ds_config or {}, "checkpoint.load_universal"):
        return None
    checkpoint = find_checkpoint(plan.run.resume, plan.run.output_dir, Findings())
    return None if checkpoint is None or find_universal(checkpoint)[0] else Path(os.path.abspath(checkpoint))


def token_bytes(plan: Plan) -> int:
    """Bytes of the tokens that will be cached, at least: of text and JSON files here that are not in the cache yet."""
    if plan.data.streaming:
        return 0
    lists = [specs for specs in (plan.data.sources, plan.data.eval_sources) if specs]  # each with weights of its own
    sources = [source for specs in lists for source in parse_sources(specs, text_column=plan.data.text_column)]
    width = 2 if plan.model_config.get("vocab_size", 0) <= 1 << 16 else 4
    local = [source for source in sources if source.kind == "files"]
    try:
        missing = not_tokenised(local, _cache())
    except ValueError:  # this user has no home, as the start will say
        return 0
    return sum(_text_bytes(source) for source in missing) * width // BYTES_PER_TOKEN


def _text_bytes(source: Source) -> int:
    try:
        files = [(f, os.path.getsize(f.path) * (UNPACKED if f.compression else 1)) for f in source.files()]
        return sum(int(size * TEXT_SHARE.get(f.kind, 0)) for f, size in files)
    except (OSError, ValueError):
        return 0  # named where the data are looked at


def check_room(plan: Plan, out: Findings, disk: Callable[[Path], Disk] = disk_of) -> tuple[dict[str, Any], ...]:
    """Compare what a run writes with what is free: a note, and a problem for each disk that would be full.

    What is planned here for another machine is a note alone.

    Returns:
        `what` (tokens, checkpoints, conversion, model), its `folder`, its `bytes`, and what is `free` there: None where
        the run is elsewhere.
    """
    elsewhere = runs_elsewhere(plan)
    wanted = needs(plan)
    disks = {need.folder: disk(need.folder) for need in wanted}
    for device in dict.fromkeys(d.device for d in disks.values()):
        here = [need for need in wanted if disks[need.folder].device == device]
        free = min(disks[need.folder].free for need in here)
        total = sum(need.size for need in here)
        listed = ", ".join(need.text for need in here)
        folders = " and ".join(dict.fromkeys(str(need.folder) for need in here))
        if elsewhere:
            out.note(f"Disk: {gigabytes(total)} in {folders}: {listed}.")
            continue
        out.note(f"Disk: {gigabytes(total)} in {folders}: {listed}; {gigabytes(free)} are free.")
        if total > free:
            out.problem(
                "output_dir" if any(need.folder != _cache() for need in here) else "dataset",
                f"{gigabytes(total)} to write in {folders} ({listed}), {gigabytes(free)} free",
                "The disk would be full before the run ends.",
                f"Free {gigabytes(total - free, up=True)} there{_less(plan, here)}.",
                id="disk-too-small",
            )
    return tuple(
        {
            "what": need.what,
            "folder": str(need.folder),
            "bytes": need.size,
            "free": None if elsewhere else disks[need.folder].free,
        }
        for need in wanted
    )


def _less(plan: Plan, here: list[Need]) -> str:
    """What else a user can write: ", or write --save_total_limit 2, or ..." """
    ways = []
    if "checkpoints" in here[0].text and (plan.training_arguments.get("save_total_limit") or 3) > 2:
        ways.append("--save_total_limit 2")
    if any(need.folder != _cache() for need in here):
        ways.append("another --output_dir")
    if any(need.folder == _cache() for need in here):
        ways.append("HF_HOME with a folder on another disk, or --streaming true")
    return "".join(f", or write {way}" for way in ways)


def _weight_bytes(plan: Plan) -> int:
    return 2 if plan.ds_config is not None and plan.dtype != "fp32" else 4


def _steps_saved(folder: Path) -> set[int]:
    """The steps of the checkpoints that lie there."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return set()
    return {int(name.rsplit("-", 1)[1]) for name in names if NAME.match(name)}


def _cache() -> Path:
    return Path(os.path.abspath(cache_folder("data")))


def gigabytes(size: int, up: bool = False) -> str:
    """ "1.55 GB"; small sizes in MB."""
    unit, name = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    return f"{size / unit + (0.05 if up else 0):.1f} {name}"
